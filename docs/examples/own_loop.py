"""A training loop of one's own over a Delta table, with nothing of Headrace but the loader; no JVM.

torchrun --nproc-per-node 2 docs/examples/own_loop.py TABLE [STATE.json]

TABLE is any Delta table with a column `x` of lists of numbers and a column `label` of 0 and 1. With STATE.json the
run goes on from there, at any number of ranks.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.stream import EpochReceipt, LaneLoader, Snapshot

dist.init_process_group("gloo")
snapshot = Snapshot.open(sys.argv[1])
loader = LaneLoader(snapshot, batch_size=256, seed=7, epochs=3)
state_path = Path(sys.argv[2]) if len(sys.argv) > 2 else None
if state_path and state_path.is_file():
    loader.load_state_dict(json.loads(state_path.read_text()))

torch.manual_seed(0)
(x,) = (column for column in loader.columns if column.name == "x")
network = DistributedDataParallel(nn.Linear(x.width, 1))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
while loader.epoch < 3:
    epoch, receipt = loader.epoch, EpochReceipt(snapshot)
    is_whole = loader.step == 0
    for batch in loader:
        logits = network(batch.tensors["x"].float()).squeeze(1)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, batch.tensors["label"].float(), reduction="none"
        )
        optimizer.zero_grad()
        # DistributedDataParallel divides by the ranks; rows of zeros, where a rank has none, do not count.
        (losses.sum() * (loader.world_size / batch.global_rows if batch.rows else 0.0)).backward()
        optimizer.step()
        receipt.add(batch)
    if is_whole:
        receipt.check(epoch=epoch)  # every row once, over all ranks, or an error
    if loader.rank == 0:
        print(f"epoch {epoch}: {len(loader)} steps, loss {losses.mean():.4f}, every row once", flush=True)
        if state_path:
            state_path.write_text(json.dumps(loader.state_dict()))
loader.close()
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # the interpreter's own exit aborts about once in 18 where Petastorm and DDP were in one process
