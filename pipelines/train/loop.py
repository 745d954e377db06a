"""The one training loop: epochs over the lanes, each with a receipt."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.config.learning import Train
from pipelines.errors import ConfigError, TrainingError
from pipelines.lake import Contract, Snapshot
from pipelines.models.build import build_network, summed_loss
from pipelines.models.inputs import scaled
from pipelines.stream.loader import Batch, LaneLoader, shards_of
from pipelines.stream.plan import EpochPlan, assign_lanes
from pipelines.train import checkpoint
from pipelines.train.checkpoint import Position, State
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.strategies.data_parallel import row_weight, wrap
from pipelines.train.tally import Tally

PROGRESS_EVERY_S = 0.5


class Trainer:
    """Trains a job's network on this rank. `dist` is initialized.

    Args:
        job: What to do.
        device: Where this rank computes.
    """

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        assert job.snapshot.contract is not None, "a feature table carries its contract"
        self.job, self.device, self.train = job, device, job.train
        self.contract: Contract = job.snapshot.contract
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.lanes = assign_lanes(self.train.num_lanes, self.world)[self.rank]
        torch.manual_seed(job.seed)
        self.network = build_network(job.model, self.contract).to(device)
        self.parameters = list(self.network.parameters())
        self.parallel = wrap(self.network, device)
        self.optimizer = make_optimizer(self.train, self.network)
        steps = self._plan(job.snapshot, 0).steps
        self.schedule = make_schedule(self.train, self.optimizer, total_steps=steps * self.train.epochs)
        self.position = Position(
            snapshot=job.snapshot.digest,
            seed=job.seed,
            window=self.train.window,
            lanes=self.train.num_lanes,
            batch_size=self.train.batch_size,
        )
        self.epochs: list[EpochResult] = []
        self.best_epoch = 0
        self._upcoming: LaneLoader | None = None

    def resume(self) -> int:
        """Go on from the job's last checkpoint, if there is one. Returns the number of epochs done."""
        path = checkpoint.latest(self.job.folder)
        if path is not None:
            state = checkpoint.load(path, self.network, self.optimizer, self.schedule, self.position)
            self.epochs, self.best_epoch = list(state.epochs), state.best_epoch
        return len(self.epochs)

    def run(self, on_epoch: Callable[[EpochResult], None]) -> None:
        """Train the epochs that are left, with a checkpoint behind each; then take the best epoch's weights.

        Raises:
            TrainingError: An epoch's receipt does not agree with the Snapshot.
        """
        try:
            while len(self.epochs) < self.train.epochs and not self._should_stop():
                result = self._epoch(len(self.epochs))
                self.epochs.append(result)
                self.best_epoch = self._best()
                if self.rank == 0:
                    self._save()
                    on_epoch(result)
                dist.barrier()
        finally:
            if self._upcoming is not None:
                self._upcoming.close()
        if self.best_epoch != len(self.epochs) - 1:
            checkpoint.load_weights(self.job.folder / f"epoch-{self.best_epoch:04d}", self.network)

    def _epoch(self, epoch: int) -> EpochResult:
        # Seeded by epoch and rank, so that a run that goes on from a checkpoint draws what it would have drawn.
        torch.manual_seed((self.job.seed * 1_000_003 + epoch) * 1_009 + self.rank)
        started, waited = time.perf_counter(), 0.0
        tally = Tally.zero(self.contract.label, self.device)
        loader = self._upcoming or self._epoch_loader(epoch)
        self._upcoming = None
        progress = _ProgressFile(self.job.progress_path, epoch, loader.plan.steps) if self.rank == 0 else None
        self.parallel.train()
        try:
            batches = iter(loader)
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - asked
                if batch is None:
                    break
                self._step(batch, tally)
                if self._upcoming is None and loader.all_read and epoch + 1 < self.train.epochs:
                    self._upcoming = self._epoch_loader(epoch + 1)  # reads while this epoch trains
                if progress:
                    progress.show(batch.step, tally)
        finally:
            loader.close()
        rows, row_ids, loss, metrics = tally.reduced()
        seconds = time.perf_counter() - started
        self._check_receipt(epoch, rows, row_ids)
        wait_share = torch.tensor(waited / seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(wait_share, dist.ReduceOp.MAX)
        return EpochResult(
            epoch=epoch,
            rows=rows,
            row_id_sum=row_ids,
            loss=loss,
            metrics=metrics | self._validate(),
            rows_per_s=rows / seconds,
            data_wait_share=float(wait_share),
        )

    def _step(self, batch: Batch, tally: Tally) -> None:
        """One optimizer step; the batch's rows count once it is done."""
        tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.tensors.items()}
        if not batch.rows:
            self.network.eval()  # batch statistics of the row of zeros must not be kept
        outputs, loss = self._forward(self.parallel, tensors)
        for parameter in self.parameters:
            parameter.grad = None  # as Optimizer.zero_grad does, without its profiling
        weight = row_weight(rows=batch.rows, global_rows=batch.global_rows, ranks=self.world)
        loss.backward(torch.full_like(loss, weight))  # type: ignore[no-untyped-call]
        if self.train.clip_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.train.clip_grad_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if batch.rows:
            tally.add(tensors, outputs, loss)
        else:
            self.network.train()

    def _forward(self, network: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs of shape (B, K) and the sum of the rows' losses, shape ()."""
        amp = self.train.amp and self.device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if amp else nullcontext():
            outputs = network(*[scaled(column, tensors[column.name]) for column in self.contract.inputs])
        outputs = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        return outputs, summed_loss(outputs, tensors["label"], self.contract.label)

    def _check_receipt(self, epoch: int, rows: int, row_ids: int) -> None:
        wanted = self.job.snapshot
        if (rows, row_ids) != (wanted.rows, wanted.row_id_sum):
            raise TrainingError(
                f"epoch {epoch}: the receipt does not agree with the Snapshot of {wanted.table} version "
                f"{wanted.version}: wanted {wanted.rows:,} rows with row_id sum {wanted.row_id_sum:#018x}, seen {rows:,} "
                f"with {row_ids:#018x}"
            )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        snapshot = self.job.validation
        if snapshot is None:
            return {}
        tally = Tally.zero(self.contract.label, self.device)
        loader = self._loader(snapshot, self._plan(snapshot, 0, shuffle=False))
        self.network.eval()
        try:
            for batch in loader:
                if not batch.rows:
                    continue
                tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
                tally.add(tensors, *self._forward(self.network, tensors))
        finally:
            loader.close()
        rows, _, loss, metrics = tally.reduced()
        if rows != snapshot.rows:
            raise TrainingError(f"validation: wanted {snapshot.rows:,} rows of {snapshot.table}, seen {rows:,}")
        return {"validation_loss": loss} | {f"validation_{name}": value for name, value in metrics.items()}

    def _epoch_loader(self, epoch: int) -> LaneLoader:
        return self._loader(self.job.snapshot, self._plan(self.job.snapshot, epoch))

    def _plan(self, snapshot: Snapshot, epoch: int, *, shuffle: bool = True) -> EpochPlan:
        return EpochPlan(
            shard_rows=tuple(shard.rows for shard in shards_of(snapshot)),
            lanes=self.train.num_lanes,
            batch_size=self.train.batch_size,
            window=self.train.window,
            seed=self.job.seed,
            epoch=epoch,
            shuffle=shuffle,
        )

    def _loader(self, snapshot: Snapshot, plan: EpochPlan) -> LaneLoader:
        return LaneLoader(
            snapshot,
            plan,
            self.contract.columns,
            self.lanes,
            prefetch_mb=self.train.prefetch_mb,
            pin=self.device.type == "cuda",
        )

    def _watched(self, result: EpochResult) -> float:
        """The metric that early stopping watches, lower is better."""
        stopping = self.train.early_stopping
        metric = stopping.metric if stopping else "loss"
        value = result.metrics.get(f"validation_{metric}")
        if value is None:
            raise ConfigError(f"train.early_stopping.metric: a {self.contract.label.kind} label has no {metric!r}")
        return -value if metric == "accuracy" else value

    def _best(self) -> int:
        if self.train.early_stopping is None:
            return len(self.epochs) - 1
        return min(range(len(self.epochs)), key=lambda epoch: self._watched(self.epochs[epoch]))

    def _should_stop(self) -> bool:
        stopping = self.train.early_stopping
        return stopping is not None and len(self.epochs) - 1 - self.best_epoch >= stopping.patience

    def _save(self) -> None:
        state = State(
            position=self.position,
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            schedule=checkpoint.schedule_state(self.schedule),
            param_groups=checkpoint.param_groups(self.optimizer),
        )
        checkpoint.save(self.job.folder, self.network, self.optimizer, self.schedule, state)
        checkpoint.prune(self.job.folder, keep=self.job.keep_checkpoints, best_epoch=self.best_epoch)


def make_optimizer(train: Train, network: nn.Module) -> Optimizer:
    """The optimizer that the config names.

    Raises:
        ConfigError: torch refuses a parameter's value.
    """
    cls: Any = getattr(torch.optim, train.optimizer.name)
    try:
        optimizer: Optimizer = cls(network.parameters(), lr=train.lr, **train.optimizer.params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.optimizer: {train.optimizer.name}: {error}") from None
    return optimizer


def make_schedule(train: Train, optimizer: Optimizer, *, total_steps: int) -> LRScheduler | None:
    """The learning-rate schedule that the config names, over `total_steps`.

    Raises:
        ConfigError: torch refuses a parameter's value.
    """
    if train.schedule is None:
        return None
    length = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}
    length |= dict.fromkeys(("ConstantLR", "LinearLR", "PolynomialLR"), "total_iters")
    name, params = train.schedule.name, dict(train.schedule.params)
    if name in length:
        params.setdefault(length[name], total_steps)
    if name == "OneCycleLR":
        params.setdefault("max_lr", train.lr)
    cls: Any = getattr(torch.optim.lr_scheduler, name)
    try:
        schedule: LRScheduler = cls(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.schedule: {name}: {error}") from None
    return schedule


class _ProgressFile:
    """Tells the launcher where the epoch is, a few times a second."""

    def __init__(self, path: Path, epoch: int, steps: int) -> None:
        self._path, self._epoch, self._steps = path, epoch, steps
        self._last = 0.0

    def show(self, step: int, tally: Tally) -> None:
        """Write the step and the mean loss so far."""
        now = time.monotonic()
        if now - self._last < PROGRESS_EVERY_S:
            return
        self._last = now
        value = {"epoch": self._epoch, "step": step + 1, "steps": self._steps, "loss": tally.mean_loss()}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self._path)
