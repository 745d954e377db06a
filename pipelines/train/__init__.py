"""Distributed training: `launch` starts the ranks, `worker` is one of them, `loop` is what it does."""
