"""However the ranks share the work, they learn what one process learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.distributed.tensor import DTensor

from pipelines.config.learning import Train
from pipelines.errors import ConfigError, TrainingError
from pipelines.lake import Snapshot
from pipelines.models.build import build_network
from pipelines.train import checkpoint, loop
from pipelines.train.job import TrainJob, checkpoints
from pipelines.train.loop import Trainer
from pipelines.train.objective import Objective
from pipelines.train.strategies.groups import local
from pipelines.train.strategies.pipeline_parallel import PipelineParallel
from tests.ranks import run_ranks
from tests.tables import DENSE, IMAGE, NEXT, SEQUENCE, contract_of, feature_table
from tests.train.test_loop import assert_trained_alike, interrupted, job_of, train

LAYERS = {"network": "tests.networks:DoubleLayers"}
DECODER = {"network": "tests.networks:DoubleDecoder"}
ADAM = {"optimizer": {"name": "AdamW", "weight_decay": 0.1}, "clip_grad_norm": 0.5}
EXACT: list[tuple[int, Any, dict[str, Any]]] = [
    (2, "data_parallel", {"micro_batches": 3}),
    (4, "data_parallel", {}),
    (2, "sharded", {}),
    (4, "sharded", {"micro_batches": 2}),
    (2, "tensor_parallel", {"micro_batches": 2}),
    (4, "tensor_parallel", {}),
    (2, "pipeline_parallel", {}),
    (4, {"name": "pipeline_parallel", "schedule": "GPipe"}, {"micro_batches": 5}),
    (4, {"name": "tensor_parallel", "size": 2}, {}),
    (4, {"name": "pipeline_parallel", "size": 2}, {"micro_batches": 3}),
    (2, {"name": "local_sgd", "warmup_steps": 10**6}, {}),
]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [61, 40, 2], contract_of(DENSE))


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("v") / "v", [37], contract_of(DENSE), seed=9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot, validation: Snapshot) -> Any:
    job = job_of(tmp_path_factory.mktemp("alone"), snapshot, network=LAYERS, **ADAM)
    return run_ranks(1, train, job.model_copy(update={"validation": validation}))[0]


@pytest.mark.parametrize(("ranks", "strategy", "settings"), EXACT)
def test_ranks_learn_what_one_process_learns(
    tmp_path: Path, snapshot: Snapshot, validation: Snapshot, alone: Any, ranks: int, strategy: Any, settings: Any
) -> None:
    """In float64, with a clipped gradient, lanes that are uneven and a last batch that leaves ranks without rows."""
    job = job_of(tmp_path, snapshot, network=LAYERS, strategy=strategy, ranks=ranks, **ADAM, **settings)
    for trained in run_ranks(ranks, train, job.model_copy(update={"validation": validation})):
        assert_trained_alike(trained, alone, atol=1e-10, loss_atol=1e-10)
        for ours, theirs in zip(trained[1], alone[1], strict=True):
            assert ours.metrics == pytest.approx(theirs.metrics, abs=1e-10)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("s") / "s", [31, 20, 2], contract_of(SEQUENCE, label=NEXT))


@pytest.fixture(scope="module")
def decoder_alone(tmp_path_factory: pytest.TempPathFactory, texts: Snapshot) -> Any:
    return run_ranks(1, train, job_of(tmp_path_factory.mktemp("decoder"), texts, network=DECODER, clip_grad_norm=0.5))[
        0
    ]


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, "data_parallel"),
        (2, "sharded"),
        (2, "tensor_parallel"),
        (4, "tensor_parallel"),
        (3, "pipeline_parallel"),
        (4, {"name": "pipeline_parallel", "size": 2}),
    ],
)
def test_ranks_learn_what_comes_next_as_one_process_does(
    tmp_path: Path, texts: Snapshot, decoder_alone: Any, ranks: int, strategy: Any
) -> None:
    """In float64; the sequences hold padding, and each row counts by the mean of its own tokens."""
    job = job_of(tmp_path, texts, network=DECODER, strategy=strategy, ranks=ranks, clip_grad_norm=0.5)
    for trained in run_ranks(ranks, train, job):
        assert_trained_alike(trained, decoder_alone, atol=1e-10, loss_atol=1e-10)
        assert trained[1][0].metrics == pytest.approx(decoder_alone[1][0].metrics, abs=1e-10)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "data_parallel", "hook": "fp16"},
        {"name": "data_parallel", "hook": {"name": "powersgd", "warmup_steps": 2}},
        {"name": "data_parallel", "hook": {"name": "topk", "share": 0.1, "warmup_steps": 3}},
        {"name": "data_parallel", "hook": {"name": "qsgd", "bits": 4}},
        "sharded",
        "tensor_parallel",
        "pipeline_parallel",
        {"name": "local_sgd", "every_steps": 3},
        {"name": "diloco", "every_steps": 3},
    ],
)
def test_goes_on_inside_an_epoch_bit_for_bit(tmp_path: Path, snapshot: Snapshot, strategy: Any) -> None:
    settings = {"strategy": strategy, "ranks": 2, "checkpoint": {"every_steps": 3}, "network": LAYERS, **ADAM}
    unbroken, job = (job_of(tmp_path / folder, snapshot, **settings) for folder in ("whole", "parts"))
    whole = run_ranks(2, train, unbroken)
    if unbroken.layer_times_path.is_file():  # two jobs that each measured their layers may be cut at different ones
        shutil.copy(unbroken.layer_times_path, job.layer_times_path)
    run_ranks(2, interrupted, job, 7)
    assert list(job.folder.glob("epoch-0000-step-*")), "it left a checkpoint"
    for trained, wanted in zip(run_ranks(2, train, job), whole, strict=True):
        assert_trained_alike(trained, wanted, atol=0, loss_atol=1e-12)


def stages(job: TrainJob) -> list[range]:
    """On a rank: the layers of each stage."""
    strategy = Trainer(job, torch.device("cpu")).strategy
    assert isinstance(strategy, PipelineParallel)
    return list(strategy.stages)


def test_a_job_that_goes_on_is_cut_as_it_was(tmp_path: Path, snapshot: Snapshot) -> None:
    """Though another layer takes longest by now."""

    def stages_at(folder: str, slow: int) -> list[range]:
        network = {**LAYERS, "slow": slow}
        job = job_of(tmp_path / folder, snapshot, network=network, strategy="pipeline_parallel", ranks=2)
        first, second = run_ranks(2, stages, job)
        assert first == second
        return first

    begun = stages_at("a", slow=1)
    assert stages_at("b", slow=7) != begun
    assert stages_at("a", slow=7) == begun


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "data_parallel"), (2, "data_parallel"), (2, "sharded")])
def test_weights_with_two_names_are_learned_once(tmp_path: Path, snapshot: Snapshot, ranks: int, strategy: str) -> None:
    def trained(*, named_twice: bool, ranks: int, strategy: str) -> Any:
        network = {"network": "tests.networks:DoubleTied", "named_twice": named_twice}
        folder = tmp_path / f"{named_twice}"
        return run_ranks(
            ranks, train, job_of(folder, snapshot, network=network, strategy=strategy, ranks=ranks, **ADAM)
        )

    (once,) = trained(named_twice=False, ranks=1, strategy="data_parallel")
    for weights, epochs in trained(named_twice=True, ranks=ranks, strategy=strategy):
        alike = {name: values for name, values in weights.items() if not name.startswith("second.")}
        assert_trained_alike((alike, epochs), once, atol=1e-10, loss_atol=1e-10)


def test_a_compiled_network_learns_the_same(tmp_path: Path, snapshot: Snapshot, alone: Any) -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile takes a C++ compiler")
    for trained in run_ranks(
        2, train, job_of(tmp_path, snapshot, network=LAYERS, strategy="sharded", compile=True, **ADAM)
    ):
        assert_trained_alike(trained, alone, atol=1e-10, loss_atol=1e-10)


def test_without_a_compiler_it_says_so(tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(TrainingError, match=r"train\.compile: wanted .*compiler found.*set compile: false"):
        run_ranks(1, train, job_of(tmp_path, snapshot, network=LAYERS, compile=True))


def test_one_strategy_goes_on_where_another_stopped(tmp_path: Path, snapshot: Snapshot, alone: Any) -> None:
    """A checkpoint holds the whole network by its names; so it fits any number of ranks and any exact strategy."""
    job = None
    for ranks, strategy, epochs in (
        (4, "sharded", 1),
        (2, "tensor_parallel", 2),
        (4, "pipeline_parallel", 3),
        (1, "sharded", 4),
    ):
        job = job_of(tmp_path / "a", snapshot, network=LAYERS, strategy=strategy, ranks=ranks, epochs=epochs, **ADAM)
        trained = run_ranks(ranks, train, job)[0]
    wanted = run_ranks(1, train, job_of(tmp_path / "b", snapshot, network=LAYERS, epochs=4, **ADAM))[0]
    assert_trained_alike(trained, wanted, atol=1e-10, loss_atol=1e-10)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "data_parallel"), (2, "data_parallel"), (2, "sharded")])
def test_a_batch_of_one_row_is_learned_without_batch_statistics(tmp_path: Path, ranks: int, strategy: str) -> None:
    """Which torch's BatchNorm1d refuses to take of one row."""
    table = feature_table(tmp_path / "t", [13], contract_of(DENSE))
    network = {"network": "tests.networks:Recurrent"}
    for weights, epochs in run_ranks(
        ranks, train, job_of(tmp_path / "job", table, network=network, strategy=strategy, ranks=ranks)
    ):
        assert [epoch.rows for epoch in epochs] == [13, 13]
        assert weights["norm.num_batches_tracked"] == 2, "the batch of 12 rows in each of two epochs"


def held_and_live(job: TrainJob) -> tuple[int, int, int]:
    """On a rank: bytes of parameters and optimizer state that it holds, of all, and the most parts that it held at once."""
    trainer = Trainer(job, torch.device("cpu"))
    whole = sum(parameter.nbytes for parameter in build_network(job.model, trainer.contract).parameters())
    trainer.run(lambda _: None)
    parameters = [local(parameter) for parameter in trainer.strategy.parameters]
    moments = [local(x) for state in trainer.optimizer.state.values() for x in state.values() if x.dim()]
    return sum(x.nbytes for x in (*parameters, *moments)), 3 * whole, getattr(trainer.strategy, "most_live", 0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_rank_holds_its_share(tmp_path: Path, snapshot: Snapshot, ranks: int) -> None:
    """Of parameters and both moments of Adam."""
    network = {"network": "mlp", "hidden": [64, 64]}
    job = job_of(tmp_path, snapshot, network=network, strategy="sharded", ranks=ranks, optimizer="Adam", epochs=1)
    for held, whole, _ in run_ranks(ranks, held_and_live, job):
        assert held == pytest.approx(whole / ranks, rel=0.1)


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
def test_parts_that_a_stage_holds(tmp_path: Path, snapshot: Snapshot, schedule: str) -> None:
    """With 1F1B at most as many as there are stages, with GPipe all."""
    strategy = {"name": "pipeline_parallel", "schedule": schedule}
    job = job_of(tmp_path, snapshot, network=LAYERS, strategy=strategy, ranks=2, epochs=1, micro_batches=6)
    live = [most for _, _, most in run_ranks(2, held_and_live, job)]
    assert live == [6, 6] if schedule == "GPipe" else max(live) <= 2


@pytest.mark.parametrize(
    ("strategy", "network", "wanted"),
    [
        ("tensor_parallel", {"network": "softmax"}, "pairs of linear layers to cut.*seen Softmax"),
        ("pipeline_parallel", {"network": "softmax"}, "a network that names its layers.*seen Softmax"),
        ("pipeline_parallel", {"network": "mlp", "hidden": []}, "a layer with parameters for each of 2 stages, seen 1"),
        ("pipeline_parallel", {**LAYERS, "tied": True}, "stages with weights of their own"),
        ("tensor_parallel", {"network": "mlp", "hidden": [7]}, "a multiple of 2 units, seen 7 in hidden.0"),
    ],
)
def test_a_network_that_cannot_be_cut(
    tmp_path: Path, snapshot: Snapshot, strategy: str, network: dict[str, Any], wanted: str
) -> None:
    job = job_of(tmp_path, snapshot, network=network, strategy=strategy, ranks=2)
    job.layer_times_path.write_text("[1, 1, 1, 0.5, 0.5]")  # by which stages are cut between layers that are tied
    with pytest.raises(ConfigError, match=wanted):
        run_ranks(2, train, job)


def test_heads_that_cannot_be_cut(tmp_path: Path, texts: Snapshot) -> None:
    network = {"network": "gpt", "layers": 1, "heads": 1, "width": 8}
    with pytest.raises(ConfigError, match="whole heads of 8 on each rank, seen 4"):
        run_ranks(2, train, job_of(tmp_path, texts, network=network, strategy="tensor_parallel", ranks=2))


def learned_whole(job: TrainJob) -> dict[str, Any]:
    """On a rank: train, or go on; what it holds whole of what is not cut."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.resume()
    trainer.run(lambda _: None)
    return {
        name: tensor.detach().numpy().copy()
        for name, tensor in trainer.strategy.held().items()
        if not isinstance(tensor, DTensor)
    }


@pytest.mark.parametrize("begins_as", [None, "data_parallel", "tensor_parallel"])
def test_what_is_not_cut_stays_alike_under_dropout(tmp_path: Path, snapshot: Snapshot, begins_as: str | None) -> None:
    network = {"network": "mlp", "hidden": [8, 8], "dropout": 0.5}
    settings: dict[str, Any] = {"ranks": 4, "checkpoint": {"every_steps": 3}, "network": network}
    if begins_as:
        run_ranks(4, interrupted, job_of(tmp_path, snapshot, strategy=begins_as, **settings), 7)
    job = job_of(tmp_path, snapshot, strategy={"name": "tensor_parallel", "size": 2}, **settings)
    first, *others = run_ranks(4, learned_whole, job)
    assert first.keys() == {"head.weight", "head.bias"}
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(other[name], values)


@pytest.mark.parametrize("strategy", ["data_parallel", "sharded"])
def test_batch_statistics_are_those_of_the_first_rank(tmp_path: Path, strategy: str) -> None:
    images = feature_table(tmp_path / "t", [60, 40], contract_of(IMAGE))
    job = job_of(tmp_path, images, network={"network": "tests.networks:Normalized"}, strategy=strategy, ranks=2)
    first, second = ({k: v for k, v in held.items() if "running" in k} for held in run_ranks(2, learned_whole, job))
    assert first == second
    saved = checkpoint.Saved(checkpoints(job.folder)[-1])
    assert {name: saved.tensor(f"model.{name}").numpy() for name in first} == first


def test_what_the_warm_up_saves_does_not_hang_on_when(tmp_path: Path) -> None:
    images = feature_table(tmp_path / "t", [60, 40], contract_of(IMAGE))
    found = []
    for name, settings in (("rare", {}), ("often", {"checkpoint": {"every_steps": 2}})):
        strategy = {"name": "local_sgd", "warmup_steps": 7, "every_steps": 3}
        network = {"network": "tests.networks:Normalized"}
        job = job_of(tmp_path / name, images, network=network, strategy=strategy, ranks=2, **settings)
        found.append(run_ranks(2, train, job)[0][0])
    rare, often = found
    assert all(np.array_equal(often[name], values) for name, values in rare.items())


@pytest.mark.parametrize("strategy", ["sharded", "local_sgd", "pipeline_parallel"])
def test_layers_share_what_is_not_learned(tmp_path: Path, snapshot: Snapshot, strategy: str) -> None:
    network = {**LAYERS, "places": True}
    (by_one,) = run_ranks(1, train, job_of(tmp_path / "1", snapshot, network=network, epochs=1))
    job = job_of(tmp_path / "2", snapshot, network=network, strategy=strategy, ranks=2, epochs=1)
    seen = run_ranks(2, train, job)[0]
    if strategy != "local_sgd":
        assert_trained_alike(seen, by_one, atol=1e-10, loss_atol=1e-10)


def in_16_bits(job: TrainJob) -> tuple[set[torch.dtype], float, float]:
    """On a rank: train in mixed precision, as a GPU would; what its layers give, the epoch's loss and the progress told."""
    loop.Objective, loop.PROGRESS_EVERY_S = _Mixed, 0.0  # type: ignore[misc]
    trainer = Trainer(job, torch.device("cpu"))
    seen = set()
    for layer in trainer.strategy.parallel.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *given: seen.add(given[2].dtype))
    trainer.run(lambda _: None)
    return seen, trainer.epochs[0].loss, json.loads(job.progress_path.read_text())["loss"]


class _Mixed(Objective):
    is_autocast = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]


def test_a_pipeline_computes_in_16_bits_and_tells_its_loss(tmp_path: Path, snapshot: Snapshot) -> None:
    network = {"network": "mlp", "hidden": [64, 64]}
    alone = run_ranks(1, train, job_of(tmp_path / "1", snapshot, network=network, epochs=1))[0][1][0].loss
    job = job_of(tmp_path / "2", snapshot, network=network, strategy="pipeline_parallel", ranks=2, epochs=1)
    for seen, loss, told in run_ranks(2, in_16_bits, job):
        assert seen == {torch.bfloat16} and loss == pytest.approx(alone, rel=0.01) and told == pytest.approx(loss)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"strategy": "data_paralel"}, "did you mean 'data_parallel'"),
        ({"strategy": {"name": "data_parallel", "hook": "powersgdd"}}, "did you mean 'powersgd'"),
        ({"strategy": {"name": "data_parallel", "hok": "fp16"}}, "hok"),
        ({"strategy": {"name": "data_parallel", "hook": {"name": "topk", "share": 2}}}, "less than or equal to 1"),
        (
            {"strategy": {"name": "tensor_parallel", "size": 3}, "ranks": 4},
            "strategy.size: wanted a divisor of the 4 ranks",
        ),
        ({"strategy": "tensor_parallel", "balance": "auto"}, "balance: wanted off with tensor_parallel"),
        ({"strategy": "diloco", "balance": "auto"}, "balance: wanted off with diloco"),
        ({"strategy": "pipeline_parallel", "ranks": 4, "micro_batches": 2}, "one for each of the 4 stages with 1F1B"),
        (
            {"strategy": {"name": "backup_workers", "backups": 2}, "ranks": 3},
            "ranks: wanted at least 4 .*leave no worker of 3",
        ),
        (
            {"strategy": {"name": "tensor_parallel", "size": 3}},
            "strategy.size: wanted a divisor of the 2 ranks, seen 3",
        ),
        ({"strategy": {"size": 3}}, "wanted a strategy, a name or .* of auto, .* seen {'size': 3}"),
    ],
)
def test_settings_that_do_not_fit(section: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValidationError, match=wanted):
        Train.model_validate(section)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"strategy": {"name": "data_parallel", "hook": "powersgd"}}, "all 60 steps are in the warm-up of 100"),
        ({"strategy": {"name": "diloco", "warmup_steps": 60}}, "all 60 steps are in the warm-up of 60"),
        ({"strategy": "parameter_server", "ranks": 1}, "one rank trains alone, parameter_server has no use"),
        ({"strategy": "diloco", "ranks": 1, "balance": "auto"}, "one rank trains alone, diloco has no use"),
    ],
)
def test_settings_that_have_no_use_are_told(section: dict[str, Any], wanted: str) -> None:
    (remark,) = Train.model_validate(section | {"epochs": 3}).remarks(20)
    assert wanted in remark
    assert not Train.model_validate({"strategy": {"name": "data_parallel", "hook": "powersgd"}}).remarks(2000)


def test_what_is_learned_is_the_same_by_any_exact_strategy() -> None:
    def learned(strategy: Any, ranks: int) -> dict[str, Any]:
        return Train.model_validate({"strategy": strategy, "ranks": ranks, "lanes": 4, "batch_size": 64}).learned()

    exact = [
        learned(*case)
        for case in (("data_parallel", 1), ("sharded", 4), ("tensor_parallel", 2), ("pipeline_parallel", 4))
    ]
    assert all(one == exact[0] for one in exact)
    assert learned("local_sgd", 2) != learned("local_sgd", 4) != exact[0]


def test_powersgd_takes_a_network_of_several_buckets(tmp_path: Path, snapshot: Snapshot) -> None:
    """Its exchanges of a bucket follow one from the other, and must not meet those of another bucket."""
    network = {"network": "mlp", "hidden": [512, 512, 512]}  # DDP's first bucket ends at 1 MB
    strategy = {"name": "data_parallel", "hook": {"name": "powersgd", "warmup_steps": 2}}
    job = job_of(tmp_path, snapshot, network=network, strategy=strategy, ranks=2)
    ours, theirs = run_ranks(2, train, job)
    assert_trained_alike(ours, theirs, atol=0, loss_atol=0)


def trained_by_two_threads(job: TrainJob) -> Any:
    torch.set_num_threads(2)
    return train(job)


def test_powersgd_is_the_same_in_any_of_its_threads(tmp_path: Path, snapshot: Snapshot) -> None:
    """What it computes between its exchanges runs in the rank's thread or in gloo's, as it happens."""
    network = {"network": "mlp", "hidden": [512, 512]}
    strategy = {"name": "data_parallel", "hook": {"name": "powersgd", "warmup_steps": 2}}
    first, *others = (
        run_ranks(
            2, trained_by_two_threads, job_of(tmp_path / f"{turn}", snapshot, network=network, strategy=strategy)
        )[0]
        for turn in range(6)
    )
    for other in others:
        assert_trained_alike(other, first, atol=0, loss_atol=0)
