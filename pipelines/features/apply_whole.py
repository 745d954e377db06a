"""Apply the inputs that take one column as a whole: images, vectors, sparse vectors, lists and texts. Arrow and numpy."""

import io
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import csr_matrix

from pipelines.arrays import one_chunk, to_array, to_padded
from pipelines.config.steps import Sequence
from pipelines.errors import DataError
from pipelines.features.fitted import FittedImage, FittedList, FittedSparse, FittedVector, Whole
from pipelines.features.lookups import reader_of, text_of
from pipelines.features.ragged import in_bag, in_sequence, parallel_weights, ragged, tokenized
from pipelines.lake import Column

Rows: TypeAlias = pa.Table | pa.RecordBatch
Arrays = dict[str, npt.NDArray[Any]]


def column_of(rows: Rows, name: str) -> pa.Array:
    """A column as one array.

    Raises:
        DataError: There is none of that name.
    """
    if name not in rows.schema.names:
        raise DataError(f"features: wanted a column {name!r}, seen {', '.join(rows.schema.names)}")
    return one_chunk(rows.column(name))


def whole_reader(name: str, whole: Whole) -> Callable[[Rows], Arrays]:
    """What gives the arrays of the input of that name."""
    match whole:
        case FittedImage():
            return lambda rows: {name: _image(column_of(rows, whole.source), name, whole)}
        case FittedVector():
            return lambda rows: {name: _vector(column_of(rows, whole.source), name, whole)}
        case FittedSparse():
            return lambda rows: _sparse(column_of(rows, whole.source), name)
        case FittedList():
            return _list_reader(name, whole)


def _image(files: pa.Array, name: str, image: FittedImage) -> npt.NDArray[np.uint8]:
    column = Column(name=name, kind="image", dtype="uint8", shape=image.shape)
    if not image.encoded:
        return to_array(files, column, where="features")
    found = np.empty((len(files), *image.shape), dtype=np.uint8)
    for place, file in enumerate(files.to_pylist()):
        found[place] = _decoded(file, image)
    return found


def _decoded(file: bytes | None, image: FittedImage) -> npt.NDArray[np.uint8]:
    """Pixels of a PNG or JPEG file, gray or RGB, resized (bilinear)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(file or b""), formats=["PNG", "JPEG"]) as opened:
            decoded = opened.convert("RGB" if len(image.shape) == 3 else "L")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"features: column {image.source!r}: wanted a PNG or JPEG file: {error}") from None
    height, width = image.shape[:2]
    if decoded.size != (width, height):
        decoded = decoded.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(decoded)


def _vector(lists: pa.Array, name: str, vector: FittedVector) -> npt.NDArray[np.float32]:
    column = Column(name=name, kind="dense", dtype="float64", shape=(vector.width,))
    values = to_array(lists.cast(pa.list_(pa.float64())), column, where="features")
    if vector.factor:
        values = (values - np.array(vector.shift)) * np.array(vector.factor)
    if vector.components:
        values = values @ np.array(vector.components).T
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _sparse(vectors: pa.Array, name: str) -> Arrays:
    parts = {"ids": ("ids", "sparse_ids", "int64"), "weights": ("values", "sparse_weights", "float32")}
    found: Arrays = {}
    for part, (field, kind, dtype) in parts.items():
        column = Column.model_validate({"name": f"{name}_{part}", "kind": kind, "dtype": dtype})
        values = vectors.field(field).cast(pa.list_(pa.from_numpy_dtype(np.dtype(dtype))), safe=False)
        found[column.name] = to_padded(values, column, where="features")
    return found


def _list_reader(name: str, fitted: FittedList) -> Callable[[Rows], Arrays]:
    ids_of, idf, form = reader_of(fitted.category), np.array(fitted.idf), fitted.form
    components = np.array(fitted.components).T

    def read(rows: Rows) -> Arrays:
        column = column_of(rows, fitted.source)
        lists = tokenized(column, fitted.tokens) if fitted.tokens else ragged(column)
        ids = ids_of(text_of(lists.values, fitted.source))
        if isinstance(form, Sequence):
            return {name: in_sequence(lists, ids + 1, form)}
        weights = None
        if form.weights:
            where = f"features: column {form.weights!r}"
            weights = parallel_weights(lists, column_of(rows, form.weights), where=where)
        bag = in_bag(lists, ids, form, weights, idf)
        if fitted.components:
            return {name: _along(components, *bag)}
        return {f"{name}_ids": bag[0], f"{name}_weights": bag[1]}

    return read


def _along(
    components: npt.NDArray[np.float64], ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Bags along components of shape (ids, components); a row's sum is in the order of its ids, whatever the batch."""
    starts = np.arange(len(ids) + 1) * ids.shape[1]
    rows = csr_matrix((weights.ravel().astype(np.float64), ids.ravel(), starts), shape=(len(ids), len(components)))
    found: npt.NDArray[np.float32] = (rows @ components).astype(np.float32)
    return found
