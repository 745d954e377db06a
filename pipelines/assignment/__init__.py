"""Which agent does which task: lanes to ranks, layers to pipeline stages, tensors to servers, files to scoring tasks.

`solve` is exact where it can be and says how far from the optimum it may be where it cannot; the greedy rules beside it
take no time from training. docs/assignment.md says which decides what.
"""

from pipelines.assignment.alike import balance_lanes, cut, partition
from pipelines.assignment.programme import Assignment, makespan, solve

__all__ = ["Assignment", "balance_lanes", "cut", "makespan", "partition", "solve"]
