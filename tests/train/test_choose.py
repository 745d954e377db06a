"""`train.strategy: auto` takes what is fastest of what fits, and says why."""

from collections.abc import Callable

import pytest

from pipelines.lake import runs_path
from pipelines.stage import Made

NETWORK: dict[str, object] = {"network": "mlp", "hidden": [512, 512]}
EXACT = ("data_parallel", "pipeline_parallel", "tensor_parallel", "sharded")


Told = Callable[..., str]


@pytest.fixture
def told(forked_ranks: None, train: Callable[..., Made], capsys: pytest.CaptureFixture[str]) -> Told:
    """Train, and what was told of the choice in front of the first epoch; nothing where nothing was chosen."""

    def run(*network: dict[str, object], **settings: object) -> str:
        capsys.readouterr()
        train(*network, **settings)
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        chosen = [number for number, line in enumerate(lines) if line.startswith("strategy ")]
        epochs = [number for number, line in enumerate(lines) if line.startswith("epoch ")]
        assert len(chosen) <= 1 and all(number < min(epochs, default=len(lines)) for number in chosen)
        return "".join(lines[number].removeprefix("strategy ") for number in chosen)

    return run


def test_what_is_tried_is_told(told: Told) -> None:
    why = told(NETWORK, strategy="auto")
    assert why.startswith(tuple(f"{name}: a network of 1.1 MB, " for name in EXACT)) and "Mbit/s between ranks" in why
    assert all(f"{name} " in why for name in EXACT) and "powersgd" not in why, "unless they are asked for"


def test_what_does_not_fit_is_not_tried(told: Told) -> None:
    """Parameters, gradients and Adam's two moments are 4.3 MB."""
    why = told(NETWORK, strategy={"name": "auto", "lossy": True}, memory_mb=3)
    assert "powersgd does not fit: 4 of 3 MB" in why and "data_parallel does not fit: 4 of 3 MB" in why
    assert not why.startswith(("data_parallel", "powersgd", "local_sgd", "fp16"))


def test_what_cannot_be_cut_is_not_taken(told: Told) -> None:
    why = told({"network": "mlp", "hidden": [8]}, strategy="auto", ranks=3, batch_size=15)
    assert "pipeline_parallel does not fit: wanted a layer with parameters for each of 3 stages, seen 2" in why
    assert "tensor_parallel does not fit: wanted layers of a multiple of 3 units, seen 8 in hidden.0" in why


def test_lanes_move_where_the_choice_lets_them(told: Told) -> None:
    assert told(NETWORK, strategy="auto", balance="auto")


def test_a_run_that_goes_on_keeps_its_strategy(told: Told) -> None:
    first = told(NETWORK, strategy="auto", epochs=1)
    assert first and list(runs_path("tiny").glob("train/*/strategy-2-ranks.json"))
    assert told(NETWORK, strategy="auto", epochs=1) == first
    assert not told(NETWORK, strategy="data_parallel", epochs=1), "nothing was chosen"


def test_another_number_of_ranks_chooses_anew(told: Told) -> None:
    """What was taken on 2 ranks need not fit 3: neither the layers nor the stages can be cut in 3."""
    network, settings = {"network": "mlp", "hidden": [8]}, {"strategy": "auto", "batch_size": 12, "lanes": 6}
    told(network, **settings, epochs=1)
    (path,) = runs_path("tiny").glob("train/*/strategy-2-ranks.json")
    path.write_text('{"strategy": {"name": "tensor_parallel"}, "why": "as on a slow link"}')
    assert told(network, **settings, epochs=2, ranks=3).startswith(("data_parallel: ", "sharded: "))
    assert not told(network, **settings, epochs=3, ranks=1), "one rank has no choice"


def test_any_network_that_trains_can_be_tried_and_logged(told: Told) -> None:
    assert told({"network": "tests.networks:Recurrent"}, strategy="auto", epochs=1)
