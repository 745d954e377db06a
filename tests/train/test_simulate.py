"""The cost model: bytes by formula, what makes a step longer, and constants found again."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipelines.config.strategies import DataParallel, LocalSGD, PipelineParallel, Strategy
from pipelines.errors import ConfigError
from pipelines.lake import LabelSpec
from pipelines.models.mlp import MLP
from pipelines.train import simulate
from pipelines.train.costs import Compute, Fitted, Link, Run, Size, exchange, kind, predicted_step_s
from pipelines.train.strategies.sizes import size_of
from tests.tables import IMAGE, contract_of

STRATEGY: TypeAdapter[Any] = TypeAdapter(Strategy)
SIZE = Size(parameters=669_706, tensors=6, thin=2842, vectors=1034, boundary=512, summed=512, sums=1)
COMPUTE = Compute(row_s=5e-5, part_s=1e-3, step_s=4e-3, packing_s={"none": 1e-9, "topk": 8e-9}, overlap=0.2, spread=0.1)
ALL = [
    "data_parallel",
    {"name": "data_parallel", "hook": "fp16"},
    {"name": "data_parallel", "hook": "powersgd"},
    {"name": "data_parallel", "hook": "topk"},
    {"name": "data_parallel", "hook": "qsgd"},
    "sharded",
    "tensor_parallel",
    "pipeline_parallel",
    "local_sgd",
    "diloco",
    "parameter_server",
    "backup_workers",
    "gossip",
]


def test_a_network_is_sized_by_what_passes_between_its_layers() -> None:
    """The pair's sum of 12 numbers goes forward only: its inputs are pixels, which need no gradient."""
    network = MLP(
        contract_of(IMAGE, label=LabelSpec(kind="multiclass", column="y", classes=("a", "b", "c"))), 3, hidden=[20, 12]
    )
    size = size_of(network, [torch.zeros(1, 4, 4)])
    weights = [(20, 16), (12, 20), (3, 12)]
    assert size == Size(
        parameters=sum(rows * columns + rows for rows, columns in weights),
        tensors=6,
        thin=sum(rows + columns for rows, columns in weights),
        vectors=20 + 12 + 3,
        boundary=20,
        summed=12,
        sums=1,
    )


@pytest.mark.parametrize(
    ("strategy", "ranks", "wanted"),
    [
        ("data_parallel", 2, 2_678_824),
        ("data_parallel", 4, 1.5 * 2_678_824),
        ({"name": "data_parallel", "hook": "bf16"}, 2, 2_678_824 / 2),
        ({"name": "data_parallel", "hook": {"name": "powersgd", "rank": 4}}, 2, 4 * (4 * 2842 + 1034)),
        ({"name": "data_parallel", "hook": "topk"}, 4, 3 * 8 * 6697.06),
        ({"name": "data_parallel", "hook": {"name": "qsgd", "bits": 4}}, 2, 669_706 / 2 + 4 * 669_706 / 512),
        ("sharded", 2, 2 * 2_678_824),
        ("tensor_parallel", 2, 128 * 512 * 4),
        ({"name": "tensor_parallel", "size": 2}, 4, 64 * 512 * 4 + 2_678_824 / 2),
        ("pipeline_parallel", 2, 128 * 512 * 4),
        ({"name": "local_sgd", "every_steps": 100}, 2, 26_788.24),
        ("parameter_server", 2, 2_678_824),
        ({"name": "gossip", "every_steps": 4}, 4, 0.75 * 2_678_824 / 4),
    ],
)
def test_bytes_that_a_rank_sends(strategy: Any, ranks: int, wanted: float) -> None:
    sent = exchange(STRATEGY.validate_python(strategy), SIZE, ranks=ranks, rows=128).sent_bytes
    assert sent == pytest.approx(wanted, rel=1e-9)


@given(
    strategy=st.sampled_from(ALL),
    ranks=st.integers(3, 1024),  # backup workers need a third
    rate=st.floats(1e5, 1e10),
    faster=st.floats(1.0, 100.0),
    latency=st.floats(0, 0.1),
)
def test_a_better_link_never_makes_a_step_longer(
    strategy: Any, ranks: int, rate: float, faster: float, latency: float
) -> None:
    known = STRATEGY.validate_python(strategy)

    def step_s(link: Link) -> float:
        return predicted_step_s(known, SIZE, ranks=ranks, rows=64 * ranks, link=link, compute=COMPUTE)

    assert step_s(Link(rate * faster, latency)) <= step_s(Link(rate, latency)) * (1 + 1e-12)
    assert step_s(Link(rate, latency / faster)) <= step_s(Link(rate, latency)) * (1 + 1e-12)


def test_what_a_strategy_is_for() -> None:
    """An endless link leaves the bubble of a pipeline, and the slowest rank; local steps even the latter out."""
    free = Link(math.inf, 0.0)
    steady = COMPUTE.model_copy(update={"spread": 0.0, "packing_s": {}, "part_s": 0.0, "step_s": 0.0})
    alone = predicted_step_s(DataParallel(), SIZE, ranks=1, rows=128, link=free, compute=steady)
    piped = predicted_step_s(PipelineParallel(), SIZE, ranks=4, rows=128, link=free, compute=steady)
    assert piped == pytest.approx(alone / 4 * (16 + 3) / 16)
    uneven = steady.model_copy(update={"spread": 0.3})
    together, apart = (
        predicted_step_s(strategy, SIZE, ranks=64, rows=64 * 128, link=free, compute=uneven)
        for strategy in (DataParallel(), LocalSGD(every_steps=100))
    )
    assert alone < apart < 1.1 * alone < 1.5 * alone < together


def test_constants_are_found_again_from_runs_that_the_model_made() -> None:
    """Of all strategies, and of one rank alone at two sizes of a batch."""
    known = [STRATEGY.validate_python(strategy) for strategy in ALL]
    packing = {kind(strategy): place * 1e-9 for place, strategy in enumerate(known, start=1)}
    compute = COMPUTE.model_copy(update={"packing_s": packing | {"local_sgd": 0.0, "diloco": 0.0}})
    truth = Fitted(sizes={"mlp": SIZE}, compute={"mlp": compute}, goodput=0.9, latency_s=3e-4, held=0.3, crowded=0.2)

    def run(strategy: Any, ranks: int, rows: int, mbit_per_s: int) -> Run:
        rate = mbit_per_s * 1e6 / 8
        run = Run(name="", network="mlp", strategy=strategy, ranks=ranks, rows=rows, bytes_per_s=rate, step_s=1.0)
        return run.model_copy(update={"step_s": truth.step_s(run)})

    runs = [run(DataParallel(), 1, rows, 1000) for rows in (64, 256)]
    runs += [
        run(strategy, ranks, rows, rate)
        for strategy in known
        for ranks, rows in ((3, 96), (4, 128), (8, 512))
        for rate in (1000, 100, 20)
    ]
    fitted = simulate.fit(runs, {"mlp": SIZE}, spread=0.1)
    assert max(abs(fitted.relative_error(run)) for run in runs) < 1e-4
    assert (fitted.goodput, fitted.held, fitted.crowded) == pytest.approx((0.9, 0.3, 0.2), rel=1e-3)
    assert fitted.latency_s == pytest.approx(3e-4, rel=1e-2)
    assert fitted.compute["mlp"].row_s == pytest.approx(5e-5, rel=1e-2)


def test_what_a_cluster_of_ones_own_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the constants that the docs tell of."""

    def at_1024(*arguments: str) -> float:
        told = ["--model", str(simulate.KEPT_PATH), "--plot", str(tmp_path / "p" / "plot.png"), *arguments]
        assert simulate.main(told) == 0 and (tmp_path / "p" / "plot.png").is_file()
        return float(re.findall(r"^data_parallel .* (\S+)$", capsys.readouterr().out, re.MULTILINE)[-1])

    assert at_1024() < at_1024("--latency-ms", "0.03") < at_1024("--latency-ms", "0.03", "--rows", "256")
    with pytest.raises(ConfigError, match="--network: wanted one of mlp, gpt, seen resnet"):
        simulate.main(["--network", "resnet", "--model", str(simulate.KEPT_PATH)])
