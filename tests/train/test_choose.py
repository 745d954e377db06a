"""`train.strategy: auto` takes what is fastest of what fits, and says why."""

from collections.abc import Callable

import pytest

from pipelines.lake import runs_path
from pipelines.stage import Made

NETWORK: dict[str, object] = {"network": "mlp", "hidden": [512, 512]}
EXACT = ("data_parallel", "pipeline_parallel", "tensor_parallel", "sharded")


def why(made: Made) -> str:
    (line,) = [line for line in made.lines if line.startswith("strategy ")]
    return line.removeprefix("strategy ")


def test_what_is_tried_is_told(forked_ranks: None, train: Callable[..., Made]) -> None:
    told = why(train(NETWORK, strategy="auto"))
    assert told.startswith(tuple(f"{name}: a network of 1.1 MB, " for name in EXACT)) and "Mbit/s between ranks" in told
    assert all(f"{name} " in told for name in EXACT) and "powersgd" not in told, "unless they are asked for"


def test_what_does_not_fit_is_not_tried(forked_ranks: None, train: Callable[..., Made]) -> None:
    """Parameters, gradients and Adam's two moments are 4.3 MB."""
    told = why(train(NETWORK, strategy={"name": "auto", "lossy": True}, memory_mb=3))
    assert "powersgd does not fit: 4 of 3 MB" in told and "data_parallel does not fit: 4 of 3 MB" in told
    assert not told.startswith(("data_parallel", "powersgd", "local_sgd", "fp16"))


def test_what_cannot_be_cut_is_not_taken(forked_ranks: None, train: Callable[..., Made]) -> None:
    told = why(train({"network": "mlp", "hidden": [8]}, strategy="auto", ranks=3, batch_size=15))
    assert "pipeline_parallel does not fit: wanted a layer with parameters for each of 3 stages, seen 2" in told
    assert "tensor_parallel does not fit: wanted layers of a multiple of 3 units, seen 8 in hidden.0" in told


def test_a_run_that_goes_on_keeps_its_strategy(
    forked_ranks: None, train: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = why(train(NETWORK, strategy="auto", epochs=1))
    assert list(runs_path("tiny").glob("train/*/strategy.json"))
    assert why(train(NETWORK, strategy="auto", epochs=1)) == first
    asked = train(NETWORK, strategy="data_parallel", epochs=1)
    assert not any(line.startswith("strategy ") for line in asked.lines), "nothing was chosen"
