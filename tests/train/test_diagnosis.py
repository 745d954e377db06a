"""The verdict on an epoch names what was slowed on purpose."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipelines.lake import Snapshot
from pipelines.stream import batches, reader
from pipelines.stream.plan import EpochPlan
from pipelines.train.diagnosis import RankTimes, why_slow
from pipelines.train.loop import Trainer
from pipelines.train.objective import Objective
from pipelines.train.strategies import Strategy
from tests.ranks import run_ranks
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_loop import job_of, train

SLOW_S = 0.15


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [40, 40, 40, 40], contract_of(DENSE))


def slowed(function: Callable[..., Any], *, rank: int | None = None) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        if rank is None or dist.get_rank() == rank:
            time.sleep(SLOW_S)
        return function(*arguments, **named)

    return slow


@pytest.mark.parametrize(
    ("where", "name", "verdict"),
    [
        (reader.ArrowReaderWorker, "_load_rows", r"rank \d waits \d+% for data: reading and decompressing the files"),
        (
            reader,
            "to_array",
            r"rank \d waits \d+% for data: decoding list column dense; raise train\.read_threads to 4",
        ),
        (EpochPlan, "window_rows", r"rank \d waits \d+% for data: putting rows in order; lower train\.window to 1"),
        (batches.BatchReader, "_collate", r"rank \d waits \d+% for data: making tensors"),
    ],
)
def test_a_slow_loader(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, verdict: str
) -> None:
    monkeypatch.setattr(where, name, slowed(getattr(where, name)))
    _, (result, *_) = run_ranks(2, train, job_of(tmp_path, snapshot, epochs=1, window=2))[0]
    assert re.match(verdict, result.verdict), result.verdict
    assert result.data_wait_share > 0.15


@pytest.mark.parametrize(
    ("where", "name", "phase", "rank"),
    [
        (Trainer, "_on_device", "copy", 1),
        (Objective, "outputs", "forward", None),
        (Objective, "outputs", "forward", 1),
        (Strategy, "optimize", "optimizer", None),
    ],
)
def test_a_slow_step(
    tmp_path: Path,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    phase: str,
    rank: int | None,
) -> None:
    monkeypatch.setattr(where, name, slowed(getattr(where, name), rank=rank))
    _, (result, *_) = run_ranks(2, train, job_of(tmp_path, snapshot, epochs=1, batch_size=48))[0]
    if rank is None:
        named = {"copy": "copying batches to the device", "forward": "the forward pass", "optimizer": "the optimizer"}
        assert result.verdict.endswith(f"of the time is {named[phase]}"), result.verdict
    else:
        assert result.verdict.startswith("rank 1 takes "), result.verdict
        assert f"times as long as the others, most of it in {phase}" in result.verdict


def times(*, loader: str = "read", **phases: float) -> RankTimes:
    known = dict.fromkeys(("data", "copy", "forward", "backward", "communication", "optimizer", "other"), 0.0)
    return RankTimes(
        phases=known | phases, loader=dict.fromkeys(("read", "decode", "shuffle", "collate"), 0.0) | {loader: 1.0}
    )


def test_exchange_is_named_only_where_nobody_is_late() -> None:
    settings = {"columns": "columns", "read_threads": 2, "window": 4, "may_balance": True}
    alike = [times(forward=2, backward=2, communication=4)] * 2
    assert "all ranks spend 50% or more exchanging gradients" in why_slow(alike, **settings)
    late = [times(forward=6, backward=2), times(forward=2, backward=2, communication=4)]
    slow = "rank 0 takes 2.0 times as long as the others, most of it in forward; look at its machine"
    assert why_slow(late, **settings) == f"{slow}, or set train.balance: auto"
    assert why_slow(late, **settings | {"may_balance": False}) == slow
    starved = [times(data=5, forward=2, loader="decode"), times(forward=2, communication=5)]
    assert why_slow(starved, **settings).startswith("rank 0 waits 71% for data: decoding columns")
