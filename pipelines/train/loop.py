"""The one training loop: epochs over the lanes, each with a receipt."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.config.workload import LOWER_IS_BETTER
from pipelines.errors import ConfigError, DataError, TrainingError
from pipelines.lake import ROW_ID, Snapshot
from pipelines.models.build import build_network
from pipelines.models.inputs import scaled
from pipelines.stream import Batch, EpochReceipt, LaneLoader
from pipelines.train import checkpoint, generators
from pipelines.train.balance import Balance
from pipelines.train.checkpoint import Saved, State
from pipelines.train.clock import StepClock
from pipelines.train.diagnosis import RankTimes, why_slow
from pipelines.train.heartbeat import Place
from pipelines.train.job import EpochResult, TrainJob, checkpoints
from pipelines.train.measures import Measures
from pipelines.train.objective import Objective
from pipelines.train.optimizer import make_optimizer, make_schedule
from pipelines.train.pace import Pace
from pipelines.train.strategies import Setting, make_strategy
from pipelines.train.tally import Sums, Tally
from pipelines.train.traffic import traffic

PROGRESS_EVERY_S = 0.5


class Trainer:
    """Trains a job's network on this rank. `dist` is initialized.

    Args:
        job: What to do.
        device: Where this rank computes.

    Attributes:
        base_mb: Memory of this rank before it read anything.
    """

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        self.job, self.device, self.train = job, device, job.train
        self.contract = job.contract
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(job.seed)
        network = build_network(job.model, self.contract).to(device)
        self.objective = Objective(network, self.contract, device, class_weights=job.class_weights, amp=self.train.amp)
        if self.objective.ranker and self.train.num_micro_batches > 1:
            raise ConfigError(
                f"train.micro_batches: wanted 1 with {job.model.network}, whose loss is of a lane's rows together; seen "
                f"{self.train.num_micro_batches}"
            )
        self.judged = None if self.objective.ranker else self.contract.label
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        self.clock = StepClock(device)
        setting = Setting(self.train, self.objective, device, self.clock, job.layer_times_path)
        self.strategy = make_strategy(network, setting)
        self.network = self.strategy.network
        self.optimizer = make_optimizer(self.train, self.strategy.parameters, is_plain=self.strategy.plain_optimizer)
        self.loader = self._loader(job.snapshot, epochs=self.train.epochs)
        total_steps = len(self.loader) * self.train.epochs
        self.schedule = make_schedule(self.train, self.optimizer, total_steps=total_steps)
        self.epochs: list[EpochResult] = []
        self.best_epoch = 0
        self.base_mb = 0.0
        self._resumed: State | None = None
        self._steps = 0  # of the epoch
        self._interrupted: tuple[Sums, float] | None = None  # what the epoch to go on with has so far, its seconds
        every = self.train.checkpoint
        self._checkpoints = Pace(every.every_s, device, every_steps=every.every_steps)
        is_balanced = self.train.balance == "auto" and self.world > 1 and self.train.lets_lanes_move
        self._balance = Balance(self.loader, self.clock, device) if is_balanced else None

    def resume(self) -> tuple[int, int]:
        """Go on from the job's last checkpoint, if there is one. Returns the epoch and the step to go on with.

        Raises:
            TrainingError: It cannot be read, or belongs to another snapshot, seed or order.
        """
        if found := checkpoints(self.job.folder):
            path = found[-1]
            saved = Saved(path)
            state = self._resumed = saved.state
            try:
                self.loader.load_state_dict(state.loader)
            except DataError as error:
                raise TrainingError(f"{path}: {error}; remove the folder to start anew") from None
            self.strategy.load(saved, self.optimizer)
            if self.schedule is not None:
                self.schedule.load_state_dict(state.schedule)
            self.epochs, self.best_epoch = list(state.epochs), state.best_epoch
            if self.loader.step:
                self._interrupted = (state.sums if self.rank == 0 else Sums(), state.seconds)
                if drawn_from := saved.generators(self.strategy.draws_as):
                    generators.put_back(drawn_from, self.device)
                else:
                    self._seed(step=self.loader.step)
        return self.loader.epoch, self.loader.step

    def place(self) -> Place:
        """Where this rank is."""
        clock, loader = self.clock, self.loader
        lanes = loader.assignment[loader.rank]
        return Place(
            phase=clock.phase,
            ticks=clock.ticks,
            epoch=clock.epoch,
            step=clock.step,
            lanes=f"{lanes[0]} to {lanes[-1]}",
            reading=loader.reading,
        )

    def run(self, on_epoch: Callable[[EpochResult], None]) -> None:
        """Train the epochs that are left.

        Raises:
            TrainingError: An epoch's receipt does not agree with the Snapshot.
        """
        with self.loader:
            self.strategy.settle()
            self.base_mb = psutil.Process().memory_info().rss / 1e6
            while len(self.epochs) < self.train.epochs and not self._should_stop():
                result = self._epoch()
                self.epochs.append(result)
                self.best_epoch = self._best()
                self._save(Sums(), 0.0)
                if self.rank == 0:
                    on_epoch(result)
                dist.barrier()

    def trained(self) -> nn.Module:
        """The whole network with the best epoch's weights, from its checkpoint, on the CPU."""
        network = build_network(self.job.model, self.contract)
        checkpoint.load_weights(self.job.folder / checkpoint.name_of(self.best_epoch + 1, 0), network)
        return network

    def _epoch(self) -> EpochResult:
        epoch = self.loader.epoch
        if self.loader.step == 0:
            self._seed()
        before, seconds_before = self._interrupted or (Sums(), 0.0)
        self._interrupted = None
        started = time.perf_counter() - seconds_before
        loader_seconds, traffic_before = dict(self.loader.times.seconds), traffic()
        self.network.train()
        self.clock.start(epoch, self.loader.step)
        sums = self._pass(before, started)
        seconds = time.perf_counter() - started
        EpochReceipt(self.job.snapshot).compare(sums.rows, sums.row_id_sum, epoch=epoch)
        loader_times = {k: v - loader_seconds[k] for k, v in self.loader.times.seconds.items()}
        ranks = self._rank_times(RankTimes.of(self.clock.seconds, loader_times, traffic().since(traffic_before)))
        metrics = sums.metrics(self.judged) | self._validate()
        if bad := [name for name, value in {"loss": sums.loss, **metrics}.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"epoch {epoch + 1}: wanted a finite {bad[0]}, seen none; lower train.lr, now {self.train.lr:g}, or set "
                "train.clip_grad_norm"
            )
        return EpochResult(
            epoch=epoch,
            rows=sums.rows,
            row_id_sum=sums.row_id_sum,
            loss=sums.mean_loss(),
            metrics=metrics,
            rows_per_s=sums.rows / seconds,
            data_wait_share=max(times.share("data") for times in ranks),
            ranks=ranks,
            verdict=self._verdict(ranks),
            exchange=self._exchange_figures(),
        )

    def _seed(self, *, step: int = 0) -> None:
        generators.seed_epoch(self.job.seed, epoch=self.loader.epoch, rank=self.strategy.draws_as, step=step)

    def _verdict(self, ranks: list[RankTimes]) -> str:
        return why_slow(
            ranks,
            columns=self._column_names(),
            read_threads=self.train.read_threads,
            window=self.train.window,
            may_balance=self.train.balance == "off" and self.train.lets_lanes_move,
        )

    def _exchange_figures(self) -> dict[str, float]:
        """See EpochResult."""
        return {}

    def _pass(self, before: Sums, started: float) -> Sums:
        """Train on what is left of the epoch; the sums over all ranks, with those from before.

        Args:
            before: Of the rows that were trained on when the epoch was interrupted.
            started: When the epoch began.
        """
        tally = Tally(self.job.snapshot, self.judged, self.device, before=before)
        is_told_here = self.strategy.counts and self.strategy.data_rank == 0
        progress = ProgressFile(self.job.progress_path, self.loader.epoch, len(self.loader)) if is_told_here else None
        self._checkpoints.start(self.loader.step, left=len(self.loader) - self.loader.step)
        if self._balance:
            self._balance.start(self.loader.step)
        epoch, is_due = self.loader.epoch, False
        steps = self._steps = len(self.loader)
        for batch in self.loader:
            self._step(batch, tally)
            if progress:
                progress.show(batch.step + 1, tally.mean_loss)
            is_due = self._checkpoints.is_due(batch.step + 1) or is_due
            if is_due and self.strategy.is_whole and batch.step + 1 < steps:
                is_due = False
                self._save(tally.reduced(), time.perf_counter() - started)
            if self._balance:
                self._balance.look(batch)
            self.clock.enter("data")
        if self.clock.step + 1 < steps:
            raise TrainingError(
                f"epoch {epoch}: rank {self.rank} ran dry: wanted {steps} steps, seen {self.clock.step + 1}; this is a fault "
                "of the loader"
            )
        self.clock.enter("other")
        return tally.reduced()

    def _column_names(self) -> str:
        lists = [column.name for column in self.contract.columns if column.shape and column.dtype != "uint8"]
        return f"list column{'s' if len(lists) > 1 else ''} {', '.join(lists)}" if lists else "columns"

    def _rank_times(self, mine: RankTimes) -> list[RankTimes]:
        """Those of all ranks; collective."""
        numbers = torch.tensor(mine.numbers(), dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(numbers) for _ in range(self.world)]
        dist.all_gather(gathered, numbers)
        return [mine.with_numbers(part.tolist()) for part in gathered]

    def _step(self, batch: Batch, tally: Tally) -> None:
        """One optimizer step; the batch's rows count once it is done."""
        self.clock.enter("copy")
        self.clock.step = batch.step
        tensors = self._on_device(batch)
        found = self.strategy.step(batch, tensors)
        self.clock.enter("optimizer")
        self.strategy.optimize(self.optimizer)
        if self.schedule is not None:
            self.schedule.step()
        self.strategy.after_step(is_last=batch.step + 1 == self._steps)
        self.clock.enter("other")
        if found and self.strategy.counts:
            tally.add(batch, tensors[self.contract.target], *found)

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.tensors.items() if name != ROW_ID
        }

    def _scaled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the reading thread does for a CPU; the forward pass then finds the pixels scaled."""
        return tensors | {c.name: scaled(c, tensors[c.name]) for c in self.contract.inputs if c.name in tensors}

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        snapshot = self.job.validation
        if snapshot is None:
            return {}
        measures = Measures(self.judged, self.device) if self.judged else None
        tally = Tally(snapshot, self.judged, self.device, measures=measures)
        self.strategy.agree()
        self.network.eval()
        with self._loader(snapshot, epochs=1, shuffle=False) as loader:
            for batch in loader:
                self.clock.enter("other")
                tensors = self._on_device(batch)
                if (found := self.strategy.evaluate(batch, tensors)) and self.strategy.counts:
                    tally.add(batch, tensors[self.contract.target], *found)
        sums = tally.reduced()
        tally.receipt.compare(sums.rows, sums.row_id_sum, epoch=0)
        values = {"loss": sums.mean_loss(), **sums.metrics(self.judged), **(measures.reduced() if measures else {})}
        return {f"validation_{name}": value for name, value in values.items()}

    def _loader(self, snapshot: Snapshot, *, epochs: int, shuffle: bool = True) -> LaneLoader:
        return LaneLoader(
            snapshot,
            self.train.batch_size,
            columns=self.strategy.reads,
            lanes=self.train.num_lanes,
            window=self.train.window,
            seed=self.job.seed,
            shuffle=shuffle,
            rank=self.strategy.data_rank,
            world_size=self.strategy.data_ranks,
            epochs=epochs,
            prefetch_mb=self.train.prefetch_mb,
            read_threads=self.train.read_threads,
            transform=self._scaled if self.device.type == "cpu" else None,  # a GPU scales what comes to it as bytes
            pin=self.device.type == "cuda",
            timeout_s=self.train.timeout_s,
        )

    def _watched(self, result: EpochResult) -> float:
        """The metric that early stopping watches, lower is better."""
        stopping = self.train.early_stopping
        metric = stopping.metric if stopping else "loss"
        value = result.metrics.get(f"validation_{metric}")
        if value is None:
            raise ConfigError(f"train.early_stopping.metric: wanted {metric} on the validation split, seen none")
        return value if metric in {"loss", *LOWER_IS_BETTER} else -value

    def _best(self) -> int:
        if self.train.early_stopping is None:
            return len(self.epochs) - 1
        return min(range(len(self.epochs)), key=lambda epoch: self._watched(self.epochs[epoch]))

    def _should_stop(self) -> bool:
        stopping = self.train.early_stopping
        return stopping is not None and len(self.epochs) - 1 - self.best_epoch >= stopping.patience

    def _ledger_state(self) -> dict[str, Any] | None:
        """The parts of the epoch that are left, where they are not done in order."""
        return None

    def _save(self, sums: Sums, seconds: float) -> None:
        """Leave a checkpoint from which training goes on with the loader's next step; collective."""
        self.strategy.agree()
        state = State(
            loader=self.loader.state_dict(),
            sums=sums,
            seconds=seconds,
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            schedule=checkpoint.schedule_state(self.schedule),
            param_groups=checkpoint.param_groups(self.optimizer),
            ledger=self._ledger_state(),
        )
        drawn_from = {f"rng.{name}": state for name, state in generators.states(self.device).items()}
        checkpoint.save(self.job.folder, state, self.strategy.saved(self.optimizer) | drawn_from)
        if self.rank == 0:
            checkpoint.prune(self.job.folder, keep=self.job.keep_checkpoints, best_epoch=self.best_epoch)


class ProgressFile:
    """Tells the launcher where the epoch is, a few times a second."""

    def __init__(self, path: Path, epoch: int, steps: int) -> None:
        self._path, self._epoch, self._steps = path, epoch, steps
        self._last = 0.0

    def show(self, steps: int, mean_loss: Callable[[], float]) -> None:
        """Write the steps that are done and the mean loss so far."""
        now = time.monotonic()
        if now - self._last < PROGRESS_EVERY_S and steps < self._steps:
            return
        self._last = now
        value = {"epoch": self._epoch, "step": steps, "steps": self._steps, "loss": mean_loss()}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self._path)
