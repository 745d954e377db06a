"""Ranks that no collective joins: every row is accounted for, and one that is lost costs only itself."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ConfigError, TrainingError
from pipelines.lake import Snapshot, runs_path
from pipelines.models.build import build_network
from pipelines.stage import Made
from pipelines.train import checkpoint
from pipelines.train.checkpoint import Saved
from pipelines.train.elastic import server, wire
from pipelines.train.elastic.certificates import Identity, issue
from pipelines.train.elastic.chief import Chief, _Journal
from pipelines.train.elastic.ledger import Lease, Ledger
from pipelines.train.elastic.wire import Address, Message, Peer, Server, address_path
from pipelines.train.job import TrainJob, checkpoints
from pipelines.train.optimizer import make_optimizer, make_schedule
from pipelines.train.tally import Sums
from pipelines.train.watch import Watch
from tests.ranks import run_ranks
from tests.tables import DENSE, append_shard, contract_of
from tests.train.conftest import run_of
from tests.train.test_loop import job_of

SETTINGS: dict[str, Any] = {"ranks": 3, "batch_size": 16, "epochs": 3, "timeout_s": 60, "threads": 1, "lr": 0.05}


@given(st.integers(1, 4), st.integers(1, 12), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_each_part_is_noted_once_whoever_is_lost(groups: int, steps: int, moves: list[tuple[int, bool]]) -> None:
    """Workers move in any order, any of them may forget its lease at any time, and the ledger may be put away."""
    ledger, leases = Ledger(0, groups, steps), dict[int, tuple[Lease, int]]()
    noted: list[tuple[int, int]] = []

    def move(worker: int) -> None:
        if worker not in leases:
            lease = ledger.lease(worker)
            assert (lease is None) == ledger.is_complete
            if lease is not None:
                leases[worker] = (lease, lease.first)
            return
        lease, part = leases[worker]
        if not ledger.is_wanted(lease.number, part):
            leases.pop(worker)
            return
        ledger.note(lease.number, part)
        noted.append((lease.group, part))
        leases[worker] = (lease, part + 1)

    for worker, is_lost in moves:
        if is_lost and worker == 4:
            ledger = Ledger.of(json.loads(json.dumps(ledger.state())))
            leases.clear()
        elif is_lost:
            leases.pop(worker, None)
        else:
            move(worker)
    for _ in range(4 * groups * steps + 8):
        move(0)
    assert ledger.is_complete and ledger.done == groups * steps
    assert sorted(noted) == [(group, part) for group in range(groups) for part in range(steps)]


def test_who_has_nothing_left_takes_half_of_the_longest_range() -> None:
    ledger = Ledger(0, groups=2, steps=8)
    first, second = ledger.lease(1), ledger.lease(2)
    assert first is not None and second is not None and {first.group, second.group} == {0, 1}
    for part in range(8):
        ledger.note(first.number, part)
    third = ledger.lease(1)
    assert third is not None and (third.group, third.first, third.end) == (second.group, 4, 8)
    assert ledger.end_of(second.number) == 4, "the other is told with its next part"


def _call_as(folder: Path) -> list[str]:
    """What a server answers to a worker, a server, somebody of another authority, and one without a certificate."""
    ours, theirs = folder / "ours", folder / "theirs"
    for place in (ours, theirs):
        place.mkdir()
        issue(place, ["server", "worker", "server"])
    server = Server(ours, 0, {"load": ({"server"}, lambda rank, message: Message({"rank": rank, **message.header}))})
    address_path(theirs, 0).write_bytes(address_path(ours, 0).read_bytes())
    found = []
    for place, rank in ((ours, 2), (ours, 1), (theirs, 2)):
        try:
            answer = Peer(place, rank, 0).call("load", Message({"x": 1}), patience_s=0.5)
            found.append(str(answer.header))
        except TrainingError as error:
            found.append(str(error))
    address = Address.model_validate_json(address_path(ours, 0).read_bytes())
    try:
        with grpc.insecure_channel(f"{address.host}:{address.port}") as channel:
            channel.unary_unary("/headrace/load")(b"", timeout=1)
    except grpc.RpcError as error:
        found.append(error.code().name)
    server.close()
    return found


def test_a_rank_is_answered_by_its_role(tmp_path: Path) -> None:
    server, worker, foreign, plain = run_ranks(1, _call_as, tmp_path)[0]
    assert server == "{'rank': 2, 'x': 1}"
    assert worker == "rank 0: load: wanted the role server, seen worker of rank 1"
    assert foreign.startswith("rank 0: load: ") and "rank': 2" not in foreign
    assert plain == "UNAVAILABLE"


def test_a_key_is_read_by_its_owner_alone_and_the_authority_has_none(tmp_path: Path) -> None:
    issue(tmp_path, ["server", "worker"])
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o077 == 0
    assert Identity.read(tmp_path, 0).authority == Identity.read(tmp_path, 1).authority
    assert len(list(tmp_path.iterdir())) == 2


def test_a_message_comes_back_as_it_was() -> None:
    sent = Message({"a": [1, {"b": None}]}, {"x": torch.arange(3), "y": torch.tensor(1.5, dtype=torch.float64)})
    came = Message.of(sent.to_bytes())
    assert came.header == sent.header and came.tensors.keys() == sent.tensors.keys()
    assert all(torch.equal(came.tensors[name], tensor) for name, tensor in sent.tensors.items())


def updates() -> set[float]:
    """How often each tensor of the network was moved, by the last checkpoint."""
    (folder,) = runs_path("tiny").glob("train/*")
    saved = Saved(checkpoints(folder)[-1])
    return {
        float(saved.tensor(name)) for name in saved.names if name.startswith("optimizer.") and name.endswith(".step")
    }


def accounted(made: Made, table: Snapshot | None = None) -> bool:
    rows = {(epoch["rows"], epoch["row_id_sum"]) for epoch in made.result["epochs"]}
    return len(rows) == 1 and next(iter(rows))[0] == (table.rows if table else 120)


@pytest.mark.parametrize(
    "strategy",
    [
        "parameter_server",
        {"name": "parameter_server", "max_staleness": 0},
        {"name": "parameter_server", "servers": 2},
        "backup_workers",
    ],
)
def test_every_row_is_accounted_for(forked_ranks: None, train: Callable[..., Made], strategy: Any) -> None:
    made = train(strategy=strategy, **SETTINGS | {"ranks": 4}, optimizer={"name": "SGD", "momentum": 0.5})
    assert accounted(made) and not made.result["restarts"]
    assert not list(runs_path("tiny").glob("train/*/identity-*")), "keys are there only while they are needed"
    last = made.result["epochs"][-1]
    assert last["loss"] < made.result["epochs"][0]["loss"]
    assert last["exchange"]["staleness_max"] <= (0 if isinstance(strategy, str) and "backup" in strategy else 12)
    if isinstance(strategy, dict) and strategy.get("max_staleness") == 0:
        assert last["exchange"]["staleness_max"] == 0
    servers = strategy.get("servers", 1) if isinstance(strategy, dict) else 1
    stale = [times["staleness"] for times in last["ranks"]]
    assert all(value is None for value in stale[:servers]) and len(stale) == 4
    assert all(0 <= value <= last["exchange"]["staleness_max"] for value in stale[servers:] if value is not None)
    assert all(times["sent_bytes"] > 0 < times["received_bytes"] for times in last["ranks"][:servers])
    assert any(f"exchange_rank_{rank}/staleness" in run_of("tiny").data.metrics for rank in range(servers, 4))


LONG = SETTINGS | {"batch_size": 8, "epochs": 12}


@pytest.mark.parametrize(("strategy", "restarts"), [("parameter_server", 0), ("backup_workers", 2)])
def test_a_killed_worker_costs_only_itself(
    forked_ranks: None,
    train: Callable[..., Made],
    signalled: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    strategy: str,
    restarts: int,
) -> None:
    signalled(2, signal.SIGKILL, epoch=1)
    made = train(strategy=strategy, max_restarts=restarts, **LONG)
    (told,) = made.result["restarts"]
    assert told.startswith("rank 2 on ") and told.endswith("started again" if restarts else "given up")
    assert re.search(r", epoch \d+, step \d+, phase \w+, lanes \d+ to \d+, reading ", told)
    assert told in capsys.readouterr().out and told in run_of("tiny").data.tags["headrace.alert"]
    assert accounted(made)
    assert sum(epoch["exchange"]["repeated_rows"] for epoch in made.result["epochs"]) == 0, "what counts is applied"
    times = [epoch["ranks"][2] for epoch in made.result["epochs"]]
    assert all(one != two or not one["sent_bytes"] for one, two in pairwise(times)), "nothing of an epoch before"


@pytest.mark.parametrize(
    ("local_world", "master", "wanted"),
    [("2", "rank0.example", "127.0.0.1"), ("1", "rank0.example", "10.0.0.5"), ("1", "127.0.0.1", "127.0.0.1")],
)
def test_a_machine_that_is_loopback_to_itself_is_found_by_others(
    monkeypatch: pytest.MonkeyPatch, local_world: str, master: str, wanted: str
) -> None:
    """As Debian has it in /etc/hosts, where rank 0's machine is asked for its own name."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
    monkeypatch.setenv("MASTER_ADDR", master)
    found = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found])
    monkeypatch.setattr(
        wire, "_own_on_the_way_to", lambda host, _: "127.0.0.1" if host.startswith("127.") else "10.0.0.5"
    )
    assert wire._own_host() == wanted


def test_rows_that_are_lost_again_and_again_are_all_told(tmp_path: Path) -> None:
    """The chief is killed at 100 noted rows of a checkpoint's 50, and then at 60."""
    job: Any = SimpleNamespace(folder=tmp_path)
    _Journal(job).note(0, 100, 0)
    repeated = _Journal(job).repeated(0, 50)
    _Journal(job).note(0, 60, repeated)
    assert (_Journal(job).repeated(0, 50), _Journal(job).repeated(1, 0)) == (60, 0)


def test_a_killed_chief_comes_back_from_its_last_checkpoint(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    signalled(0, signal.SIGKILL, epoch=3)
    made = train(strategy="parameter_server", checkpoint={"every_steps": 4}, **LONG)
    (told,) = made.result["restarts"]
    assert told.startswith("rank 0 on ") and told.endswith("ended by signal 9; started again")
    assert accounted(made) and len(made.result["epochs"]) == 12


def test_a_chief_that_is_given_up_is_named(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    signalled(0, signal.SIGKILL, epoch=1)
    with pytest.raises(
        TrainingError, match=r"^rank 0 on [^;]*, epoch \d+, step \d+, .*: ended by signal 9; the ranks' log"
    ):
        train(strategy="parameter_server", max_restarts=0, **LONG)


def test_a_server_goes_on_with_the_schedule_of_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was ahead of the chief when a checkpoint was left, it does not do those parts again."""
    monkeypatch.setattr(server, "Server", lambda *_: None)
    settings: dict[str, Any] = {"ranks": 4, "strategy": {"name": "parameter_server", "servers": 2}, "optimizer": "SGD"}
    job = job_of(tmp_path / "job", two_classes(tmp_path / "t"), schedule="OneCycleLR", **settings)
    held = checkpoint.held_by(build_network(job.model, job.contract))
    optimizer = make_optimizer(job.train, list(held.values()))
    schedule = make_schedule(job.train, optimizer, total_steps=36)
    assert schedule is not None
    part_server = server.PartServer(job, 1)

    def load(run: str, noted: int, done: list[list[int]], tensors: dict[str, torch.Tensor]) -> None:
        header = {"run": run, "steps": 18, "epoch": 0, "noted": noted, "done": done}
        header |= {"groups": checkpoint.param_groups(optimizer), "schedule": checkpoint.schedule_state(schedule)}
        part_server._load(0, Message(header, tensors))

    def push(part: int) -> None:
        asked = {"run": "a", "version": part_server._store.version, "epoch": 0, "group": 0, "part": part, "norm": None}
        part_server._push(2, Message(asked, {name: torch.ones_like(tensor) for name, tensor in held.items()}))

    load("a", 0, [], checkpoint.model_tensors(held))
    for part in range(5):
        push(part)
    optimizer.step()
    schedule.step()  # the chief noted the first two, a batch of two workers
    before = part_server._optimizer.param_groups[0]["lr"]
    load("b", 2, [[0, 2], [0, 3], [0, 4]], part_server._state(0, Message({"wanted": True})).tensors)
    assert part_server._optimizer.param_groups[0]["lr"] == pytest.approx(before)
    assert before > schedule.get_last_lr()[0] > job.train.lr / 25


def test_another_server_that_is_killed_is_filled_again(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    signalled(1, signal.SIGKILL, epoch=3, watch=0)
    made = train("mlp", strategy={"name": "parameter_server", "servers": 2}, **LONG | {"ranks": 4})
    assert any(line.startswith("rank 1 on ") for line in made.result["restarts"])
    assert accounted(made) and len(made.result["epochs"]) == 12


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_each_server_learns_from_each_part_once(
    forked_ranks: None, train: Callable[..., Made], max_staleness: int | None
) -> None:
    """Parts that the chief refuses are done again, and at the end of an epoch two do the same one."""
    strategy = {"name": "parameter_server", "servers": 2, "max_staleness": max_staleness}
    settings = SETTINGS | {"ranks": 5, "batch_size": 24, "lanes": 3, "schedule": "OneCycleLR", "clip_grad_norm": 0.5}
    made = train("mlp", strategy=strategy, **settings)
    assert accounted(made) and not made.result["restarts"]
    assert updates() == {sum(epoch["exchange"]["updates"] for epoch in made.result["epochs"])}


def test_more_servers_than_tensors_are_refused(forked_ranks: None, train: Callable[..., Made]) -> None:
    with pytest.raises(ConfigError, match="servers: wanted at most 2, one for each tensor .* seen 3"):
        train(strategy={"name": "parameter_server", "servers": 3}, **SETTINGS | {"ranks": 4})


def test_ranks_that_the_launcher_ends_are_not_started_again_by_themselves(
    forked_ranks: None, train: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their supervisors would keep a fault going that the watch has seen."""
    look, said = Watch.look, list[str]()

    def blame_once(watch: Watch) -> str:
        verdict = look(watch)
        is_on = any(beat.place.epoch for beat in watch.beats.values())
        if is_on and not said:
            said.append("rank 1 stands still")
            return said[0]
        return verdict

    monkeypatch.setattr(Watch, "look", blame_once)
    made = train(strategy="parameter_server", **LONG | {"epochs": 40})
    (told,) = made.result["restarts"]
    assert told.startswith("rank 1 stands still; ") and accounted(made)


def waiting_chief(job: TrainJob) -> set[int]:
    """On a rank: the ticks of a chief that no worker asks for work."""

    class Waiting(Chief):
        def _look(self) -> None:
            time.sleep(0.01)

        def _gather(self) -> None:
            """There is nothing."""

    issue(job.folder, job.train.roles)
    chief = Waiting(job, torch.device("cpu"))
    chief.resume()
    threading.Thread(target=chief._pass, args=(Sums(), 0.0), daemon=True).start()
    time.sleep(0.5)
    seen = set()
    for _ in range(1000):
        seen.add(chief.place().ticks)
        time.sleep(0.001)
    return seen


def test_a_chief_without_workers_does_not_get_on(tmp_path: Path) -> None:
    job = job_of(tmp_path / "job", two_classes(tmp_path / "t"), strategy="gossip", ranks=2)
    (seen,) = run_ranks(1, waiting_chief, job)
    assert len(seen) == 1, "or the watch would never name it"


def test_a_stopped_rank_does_not_set_the_pace(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    """It is stopped for good, and the others end long before anybody would give it up."""
    signalled(2, signal.SIGSTOP, epoch=1)
    began = time.monotonic()
    made = train(strategy="backup_workers", **LONG | {"timeout_s": 240})
    assert accounted(made) and time.monotonic() - began < 100, "half the limit without a sign of life"


def two_classes(folder: Path) -> Snapshot:
    """1,000 samples of two classes that overlap, wide enough for a learning rate of 0.1 to reach the optimum soon."""
    contract, generator = contract_of(DENSE), np.random.default_rng(0)
    label = generator.integers(0, 2, 1000)
    values = 3.0 * (generator.normal(size=(1000, 4)) + (label[:, None] - 0.5) * np.array([1.0, 0.5, 0.0, -1.0]))
    rows = {
        "row_id": pa.array(generator.integers(-(2**63), 2**63, 1000)),
        "dense": pa.array(list(values.astype(np.float32)), pa.list_(pa.float32())),
        "label": pa.array(label),
    }
    append_shard(folder, rows, contract)
    return Snapshot.open(folder)


def test_full_batch_descent_reaches_the_optimum_of_the_synchronous_run(
    forked_ranks: None, train: Callable[..., Made], tmp_path: Path
) -> None:
    """1,000 samples, two classes, a learning rate of 0.1; each worker has half of them, and nobody waits."""
    table = two_classes(tmp_path / "samples")
    settings = SETTINGS | {"batch_size": 1000, "epochs": 90, "lr": 0.1, "optimizer": "SGD", "lanes": 8}
    snapshots = {"train": table, "validation": table}
    losses = {}
    for strategy, ranks in (("data_parallel", 2), ("parameter_server", 3)):
        made = train(snapshots=snapshots, **settings | {"ranks": ranks, "strategy": strategy})
        assert accounted(made, table)
        losses[strategy] = made.result["epochs"][-1]["metrics"]["validation_loss"]
    print(losses)
    assert losses["parameter_server"] == pytest.approx(losses["data_parallel"], abs=1e-3)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_schedule_follows_the_global_batches(forked_ranks: None, train: Callable[..., Made], servers: int) -> None:
    """Of a length that the config gives, however many workers' updates a batch is."""
    table, batch, epochs = 120, 16, 2
    schedule = {"name": "OneCycleLR", "total_steps": -(-table // batch) * epochs}
    strategy = {"name": "parameter_server", "servers": servers}
    made = train(strategy=strategy, schedule=schedule, **SETTINGS | {"ranks": 5, "epochs": epochs})
    assert accounted(made) and made.result["epochs"][-1]["exchange"]["updates"] > -(-table // batch)


@pytest.mark.parametrize("strategy", ["parameter_server", "backup_workers", "gossip"])
def test_any_network_is_learned_from_what_is_sent(
    forked_ranks: None, train: Callable[..., Made], strategy: str
) -> None:
    """With a weight that is not contiguous, a layer that not every gradient reaches, and a buffer of large integers."""
    made = train("tests.networks:Uneven", strategy=strategy, **SETTINGS | {"ranks": 4})
    assert accounted(made) and not made.result["restarts"]
    (folder,) = runs_path("tiny").glob("train/*")
    assert int(Saved(checkpoints(folder)[-1]).tensor("model.salt")) == 2654435761
