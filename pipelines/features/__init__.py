"""The fitted transform: `fit` reduces the training split, `apply` maps rows, `build` writes the tables."""
