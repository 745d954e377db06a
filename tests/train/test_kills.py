"""kill -9 of a rank at any moment, and in the middle of a checkpoint: nothing is lost, and nothing differs.

Moments are drawn uniformly over the wall time of an undisturbed run. The seed is printed; HEADRACE_FAULT_SEED
repeats a run with it.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from pipelines.errors import TrainingError
from pipelines.lake import runs_path
from pipelines.stage import Made
from pipelines.train import checkpoint
from pipelines.train.checkpoint import Saved, State
from pipelines.train.job import checkpoints
from pipelines.train.tally import Sums
from tests.faults import SEED
from tests.train.conftest import Killing, killed_at, plant, rank_processes, weights_of

SETTINGS = {"batch_size": 8, "epochs": 3, "timeout_s": 30, "threads": 1, "checkpoint": {"every_steps": 4}}
# Keeps which rows a rank was given, by epoch, step, and the number of ranks at that time.
RECORD = """
import json, os
if "RANK" in os.environ:
    from pipelines.train.loop import Trainer
    on_device = Trainer._on_device
    def recorded(self, batch):
        ids = batch.tensors["row_id"][:batch.rows].tolist()
        name = f"{{self.loader.epoch}}-{{batch.step}}-{{os.environ['WORLD_SIZE']}}-{{os.environ['RANK']}}"
        with open({folder!r} + "/" + name, "w") as file:
            json.dump(ids, file)
        return on_device(self, batch)
    Trainer._on_device = recorded
"""


def killed(lake: Path, rank: int, after_s: float) -> contextlib.AbstractContextManager[Killing]:
    """Kill the rank that long after it is there."""

    def victim() -> psutil.Process | None:
        for process in rank_processes(lake):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        return None

    return killed_at(after_s, victim)


def undisturbed(
    train: Callable[..., Made], lake: Path, tmp_path: Path, ranks: int
) -> tuple[Made, dict[str, list[float]], float]:
    with killed(lake, 0, math.inf) as seen:
        made = train(ranks=ranks, **SETTINGS)
    seconds = time.monotonic() - seen.since
    shutil.rmtree(runs_path("tiny"))
    return made, weights_of(made, tmp_path / f"undisturbed-{ranks}"), seconds


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "kills"), [(2, 40), (3, 30), (4, 30)])
def test_a_rank_killed_at_any_moment_changes_nothing(
    train: Callable[..., Made], lake: Path, tmp_path: Path, ranks: int, kills: int
) -> None:
    made, wanted, wall_s = undisturbed(train, lake, tmp_path, ranks)
    receipts = [(epoch["rows"], epoch["row_id_sum"]) for epoch in made.result["epochs"]]
    generator = random.Random(f"{SEED}:{ranks}")
    print(f"seed {SEED}; {ranks} ranks; undisturbed {wall_s:.1f} s")
    restarts = 0
    for number in range(kills):
        rank, after_s = generator.randrange(ranks), generator.uniform(0, wall_s)
        with killed(lake, rank, after_s):
            made = train(ranks=ranks, **SETTINGS)
        restarts += len(made.result["restarts"])
        print(f"{number}: rank {rank} after {after_s:.2f} s; {made.result['restarts']}", flush=True)
        assert [(epoch["rows"], epoch["row_id_sum"]) for epoch in made.result["epochs"]] == receipts
        assert weights_of(made, tmp_path / f"{number}") == wanted
        shutil.rmtree(runs_path("tiny"))
    print(f"{restarts} restarts of {kills} runs")


@pytest.mark.faults
@pytest.mark.parametrize("number", range(10))
def test_other_numbers_of_ranks_see_the_same_batches(
    train: Callable[..., Made], lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """4 ranks, then 2, then 3, each killed but the last."""

    def record(folder: Path) -> None:
        folder.mkdir()
        plant(monkeypatch, tmp_path / "record", RECORD.format(folder=str(folder)))

    def batches(folder: Path) -> dict[tuple[int, int], dict[int, list[int]]]:
        """By epoch and step: the row ids of the global batch, by the number of ranks that saw it."""
        found: dict[tuple[int, int], dict[int, list[int]]] = {}
        for path in folder.iterdir():
            epoch, step, ranks, _ = map(int, path.name.split("-"))
            with contextlib.suppress(ValueError):  # a killed rank was about to write it
                found.setdefault((epoch, step), {}).setdefault(ranks, []).extend(json.loads(path.read_text()))
        return found

    record(tmp_path / "whole")
    made, _, wall_s = undisturbed(train, lake, tmp_path, 2)
    wanted = {place: sorted(seen[2]) for place, seen in batches(tmp_path / "whole").items()}
    record(tmp_path / "parts")
    generator = random.Random(f"{SEED}:{number}")
    print(f"seed {SEED}")
    for ranks in (4, 2):
        moment = generator.uniform(0.4, 1) * wall_s
        with killed(lake, generator.randrange(ranks), moment), contextlib.suppress(TrainingError):
            train(ranks=ranks, max_restarts=0, **SETTINGS)
    again = train(ranks=3, **SETTINGS)
    seen = batches(tmp_path / "parts")
    assert seen.keys() == wanted.keys()
    for place, by_ranks in seen.items():
        assert any(sorted(ids) == wanted[place] for ids in by_ranks.values()), place
        assert all(set(ids) <= set(wanted[place]) for ids in by_ranks.values()), place
    for epoch, first in zip(again.result["epochs"], made.result["epochs"], strict=True):
        assert (epoch["rows"], epoch["row_id_sum"]) == (first["rows"], first["row_id_sum"])
        assert epoch["loss"] == pytest.approx(first["loss"], abs=1e-5)


def save_on_and_on(folder: Path, first: int, pipe: "Connection[int, None]") -> None:
    """Checkpoints number first, first + 1, ..., each with its number as every weight; tells of each."""
    torch.set_num_threads(1)  # makes the pool of threads anew, which a fork leaves broken
    network = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(100)).sum().backward()
    optimizer.step()
    for number in range(first, 10**6):
        for tensor in network.state_dict().values():
            tensor.fill_(number)
        state = State(
            loader={"epoch": 0, "step": number},
            sums=Sums(rows=number),
            seconds=0.0,
            epochs=[],
            best_epoch=0,
            schedule={},
            param_groups=checkpoint.param_groups(optimizer),
        )
        held = checkpoint.held_by(network)
        checkpoint.save(folder, state, checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, optimizer))
        pipe.send(number)
        checkpoint.prune(folder, keep=2, best_epoch=0)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.faults)])
def test_a_kill_inside_a_checkpoint_leaves_the_last_whole_one(tmp_path: Path, kills: int) -> None:
    context = multiprocessing.get_context("fork")
    generator = random.Random(SEED)
    print(f"seed {SEED}")
    told, network = 0, nn.Linear(100, 100)
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(kills):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=save_on_and_on, args=(tmp_path, told + 1, there))
        process.start()
        there.close()
        told = here.recv()
        time.sleep(generator.uniform(0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                told = here.recv()
        saved, held = Saved(checkpoints(tmp_path)[-1]), checkpoint.held_by(network)
        checkpoint.put_back_model(saved, held)
        checkpoint.put_back_optimizer(saved.optimizer(), saved.state.param_groups, held, optimizer)
        number = saved.state.loader["step"]
        assert number in (told, told + 1), "the last that was told of, or the one behind it"
        assert all(bool((tensor == number).all()) for tensor in network.state_dict().values())
        told = number
