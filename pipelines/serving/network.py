"""A torch network on raw rows, without Spark: the fitted features on Arrow, then the exported program."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pipelines import tracking
from pipelines.features.apply_arrow import ArrowFeatures
from pipelines.features.fitted import Bundle
from pipelines.features.raw_rows import to_table
from pipelines.lake.contract import HAS_CLASS


class NetworkModel:
    """A logged network.

    Args:
        path: A local copy of the model.
    """

    def __init__(self, path: Path) -> None:
        self._bundle = Bundle.load(path)
        self._features = ArrowFeatures(self._bundle.fitted)
        self._network = tracking.load_torch(str(path))

    def predict(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Predictions for raw rows, in their order, with the columns of the score stage that the model fills.

        Raises:
            DataError: A column is missing, or a value does not fit.
        """
        with tracking.bad_request():
            arrays = self._features(to_table(rows, self._bundle.fitted.columns))
        with torch.inference_mode():
            outputs = self._network(*[torch.tensor(arrays[c.name]) for c in self._bundle.contract.inputs])
        return _readable(outputs.numpy().astype(np.float64), self._bundle)


def _readable(outputs: npt.NDArray[np.float64], bundle: Bundle) -> pd.DataFrame:
    label = bundle.contract.label
    if bundle.gives == "affinity":
        return pd.DataFrame({"score": outputs[:, 0]})
    if label.is_number:
        return pd.DataFrame({"prediction": outputs[:, 0]})
    scores = {"log_loss": outputs[:, 0]} if label.kind == "next_token" else {}
    outputs = outputs[:, 2:] if scores else outputs
    classes = np.array(label.classes, dtype=object)
    if label.kind == "multilabel":
        lists = [classes[row >= HAS_CLASS].tolist() for row in outputs]
        return pd.DataFrame({"prediction": lists, "probabilities": list(outputs)})
    if label.kind == "binary":
        scores = {"score": outputs[:, 1]}
    found = pd.DataFrame({"prediction": classes[outputs.argmax(axis=1)], "probability": outputs.max(axis=1), **scores})
    return found.assign(probabilities=list(outputs))


def _load_pyfunc(path: str) -> NetworkModel:
    return NetworkModel(Path(path))
