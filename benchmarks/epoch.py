"""An epoch of mnist_softmax on one rank, through Petastorm, against a bare PyTorch loop over tensors in memory.

    python -m benchmarks.epoch

Both take the same batches in the same order, an epoch in turn. The bare loop has all cores, its pixels as float32
already, and keeps no metrics and no receipt.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from benchmarks.report import FOLDER, Figure, at_most, report, use_lake

EPOCHS = 9
BOUND = 1.3


def main() -> int:
    """Returns the exit code."""
    use_lake("epoch")
    from pipelines.config import load_config
    from pipelines.run import run_stages
    from pipelines.session import stop_session

    config = load_config("conf/mnist_softmax.yaml", ["train.ranks=1", f"train.epochs={EPOCHS}"])
    receipts = run_stages(config, ["ingest", "features"])
    stop_session()

    import torch
    import torch.distributed as dist
    from torch import nn

    from pipelines.features.fitted import FittedFeatures
    from pipelines.lake import Snapshot
    from pipelines.stream.loader import LaneLoader, shards_of
    from pipelines.stream.plan import EpochPlan
    from pipelines.train.job import EpochResult, TrainJob
    from pipelines.train.loop import Trainer
    from pipelines.train.worker import default_threads

    result = receipts["features"].result
    snapshot = Snapshot.model_validate(result["snapshots"]["train"])
    assert config.model is not None and snapshot.contract is not None
    columns = snapshot.contract.columns
    train = config.train

    def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches, in memory: pixels in [-1, 1] of shape (B, 784), labels of shape (B,)."""
        rows = tuple(shard.rows for shard in shards_of(snapshot))
        plan = EpochPlan(rows, train.num_lanes, train.batch_size, train.window, config.seed, epoch)
        loader = LaneLoader(snapshot, plan, columns, range(train.num_lanes))
        found = [(b.tensors["image"].flatten(1).float() / 127.5 - 1.0, b.tensors["label"].clone()) for b in loader]
        loader.close()
        return found

    bare_network = nn.Linear(784, 10)
    bare_optimizer = torch.optim.SGD(bare_network.parameters(), lr=train.lr)

    def bare_epoch(data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        torch.set_num_threads(os.cpu_count() or 1)
        started = time.perf_counter()
        for x_BD, y_B in data:
            loss = nn.functional.cross_entropy(bare_network(x_BD), y_B)
            bare_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            bare_optimizer.step()
        seconds = time.perf_counter() - started
        torch.set_num_threads(default_threads(1))
        return seconds

    folder = FOLDER / "lakes" / "epoch" / "job"
    for path in folder.glob("epoch-*/*"):
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        workload=config.workload,
        digest="benchmark",
        folder=folder,
        model=config.model,
        train=train,
        seed=config.seed,
        snapshot=snapshot,
        validation=None,
        fitted=FittedFeatures.model_validate(result["fitted"]),
        tracking_uri="",
        run_id="",
        keep_checkpoints=1,
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ours, bare, waited = [], [], []

    def on_epoch(seen: EpochResult) -> None:
        ours.append(seen.rows / seen.rows_per_s)
        waited.append(seen.data_wait_share)
        bare.append(bare_epoch(batches(seen.epoch)))

    torch.set_num_threads(default_threads(1))
    Trainer(job, torch.device("cpu")).run(on_epoch)
    ours, bare, waited = ours[1:], bare[1:], waited[1:]  # the first of each warms up
    ratio = statistics.median(ours) / statistics.median(bare)
    return report(
        "epoch",
        [
            Figure("mnist_softmax.epoch.headrace", statistics.median(ours), "s"),
            Figure("mnist_softmax.epoch.bare_loop", statistics.median(bare), "s"),
            Figure("mnist_softmax.epoch.data_wait_share", statistics.median(waited), "share"),
            at_most("mnist_softmax.epoch.ratio", ratio, "x", BOUND),
        ],
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as a rank does
