"""Registered models as MLflow serves them: `mlflow.pyfunc.load_model` and `mlflow models serve` take raw rows.

Each module here is the `loader_module` of one kind of model, whose files `pipelines.tracking` lays out.
"""
