"""Compressed exchange of gradients: how far it is from the mean, and what it sends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.lake import Snapshot
from pipelines.train.job import TrainJob
from pipelines.train.loop import Trainer
from pipelines.train.strategies.hooks import QSGD, TopK
from tests.ranks import run_ranks
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_loop import assert_trained_alike, job_of, train

WIDE = {"network": "mlp", "hidden": [256, 256]}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [61, 40, 2], contract_of(DENSE))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000), st.sampled_from([2, 4, 8]), st.floats(1e-20, 1e20), st.integers(0, 99))
def test_a_quantized_number_is_within_a_step_of_its_own(num: int, bits: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    hook, numbers = quantizer(bits), torch.randn(num) * size
    message = hook.encode(numbers)
    assert message.numel() == -(-num // 512) * (4 + 512 * bits // 8)
    largest = numbers.abs().amax()
    assert (hook.decode(message, num) - numbers).abs().amax() <= largest / (2 ** (bits - 1) - 1) * 1.001


def quantizer(bits: int) -> QSGD:
    hook = QSGD.__new__(QSGD)
    hook.bits, hook.generator = bits, torch.Generator().manual_seed(0)
    return hook


def test_quantized_numbers_are_right_on_average() -> None:
    hook, numbers = quantizer(2), torch.linspace(-1, 1, 401)
    mean = torch.stack([hook.decode(hook.encode(numbers), 401) for _ in range(4000)]).mean(0)
    assert (mean - numbers).abs().amax() < 5 * 0.5 / 4000**0.5


def test_the_share_falls_by_equal_factors() -> None:
    hook = TopK(share=0.01, warmup_steps=4)
    found = []
    for hook.step in range(6):
        found.append(hook.num(10_000))
    assert found == [10_000, 3162, 1000, 316, 100, 100]


def test_all_numbers_are_the_mean(tmp_path: Path, snapshot: Snapshot) -> None:
    """topk with a share of 1 leaves nothing out, in float64."""
    plain = run_ranks(2, train, job_of(tmp_path / "plain", snapshot, ranks=2))[0]
    strategy = {"name": "data_parallel", "hook": {"name": "topk", "share": 1.0}}
    for trained in run_ranks(2, train, job_of(tmp_path / "all", snapshot, ranks=2, strategy=strategy)):
        assert_trained_alike(trained, plain, atol=1e-14, loss_atol=1e-13)


def sent(job: TrainJob) -> int:
    """On a rank: bytes of its last epoch."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.run(lambda _: None)
    return trainer.epochs[-1].ranks[0].sent_bytes


@pytest.mark.parametrize(
    ("hook", "less"),
    [
        ("fp16", 1.8),
        ("bf16", 1.8),
        ({"name": "powersgd", "warmup_steps": 2}, 15),
        ({"name": "topk", "share": 0.01, "warmup_steps": 2}, 20),
        ({"name": "qsgd", "bits": 4}, 7),
    ],
)
def test_fewer_bytes_are_sent(tmp_path: Path, snapshot: Snapshot, hook: Any, less: float) -> None:
    """Behind the warm-up, over the ranks' connections, checkpoints' and receipts' exchanges included."""
    plain = run_ranks(2, sent, job_of(tmp_path / "plain", snapshot, network=WIDE, ranks=2, epochs=2))[0]
    strategy = {"name": "data_parallel", "hook": hook}
    job = job_of(tmp_path / "hook", snapshot, network=WIDE, ranks=2, epochs=2, strategy=strategy)
    assert plain / run_ranks(2, sent, job)[0] > less
