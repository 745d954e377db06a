"""Headrace: from a Delta lake to distributed PyTorch, with every row accounted for."""

__version__ = "0.1.0"
