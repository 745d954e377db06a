"""Training that survives its members: no collective joins the ranks, each part of the rows is leased, done and noted.

A chief (`chief.py`) keeps the book of rows (`ledger.py`), validates and leaves checkpoints. Workers (`worker.py`) take
leases and send what they learned, to a parameter server or to each other. Every process is a child of its rank
(`supervisor.py`), so that its end is not the end of the ranks.
"""
