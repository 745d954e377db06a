"""Rows from a Snapshot to the ranks: each exactly once an epoch, in the same order at any number of ranks."""
