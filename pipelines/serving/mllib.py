"""An MLlib model on raw rows, in the Spark session of the process or a local one that the first rows start.

The features are made on Arrow, as for a network: on Spark a small batch would pay for a broadcast join a vocabulary.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from pipelines import tracking
from pipelines.arrays import as_column
from pipelines.features.apply_arrow import ArrowFeatures
from pipelines.features.fitted import Bundle
from pipelines.features.raw_rows import to_table
from pipelines.predict import apply_classic, readable
from pipelines.session import local_session

if TYPE_CHECKING:
    from pyspark.ml import PipelineModel

_ROW = "row"


class MLlibModel:
    """A logged MLlib model.

    Args:
        path: A local copy of the model.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._bundle = path, Bundle.load(path)
        self._features = ArrowFeatures(self._bundle.fitted)

    @cached_property
    def _model(self) -> "PipelineModel":
        return tracking.load_classic(self._path)

    def predict(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Predictions for raw rows, in their order, with the columns of the score stage that the model fills.

        Raises:
            DataError: A column is missing, or a value does not fit.
        """
        with tracking.bad_request():
            arrays = self._features(to_table(rows, self._bundle.fitted.columns))
        columns = {name: as_column(array) for name, array in arrays.items()}
        table = pa.table(columns | {_ROW: pa.array(range(len(rows)), pa.int64())})
        features = local_session().createDataFrame(table)
        scored = apply_classic(features, self._model, self._bundle, keep=[_ROW])
        found = readable(scored, self._bundle, [_ROW]).toArrow().sort_by(_ROW).drop_columns([_ROW])
        nothing = [name for name in found.column_names if 0 < len(rows) == found[name].null_count]
        predictions: pd.DataFrame = found.drop_columns(nothing).to_pandas()
        return predictions


def _load_pyfunc(path: str) -> MLlibModel:
    return MLlibModel(Path(path))
