"""Speed and memory against a peer or a bound in the same run: `make bench`, or one by `python -m benchmarks.epoch`."""
