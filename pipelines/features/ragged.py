"""Lists of values a row: text to tokens, tokens to ids, ids to padded arrays. Arrow and numpy, the same on both engines."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.steps import Bag, Sequence, Tokens
from pipelines.errors import DataError
from pipelines.features.fitted import Floats

Ids: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """The values of all rows' lists one behind the other, and the row of each, rising."""

    values: pa.Array
    row: Ids
    num_rows: int

    def lists(self) -> pa.ListArray:
        """As an Arrow column."""
        ends = np.searchsorted(self.row, np.arange(self.num_rows + 1))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), self.values)


def ragged(lists: pa.Array) -> Ragged:
    """The elements of a column of lists; a missing list is empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return Ragged(lists.flatten(), np.repeat(np.arange(len(lists)), lengths), len(lists))


def tokenized(texts: pa.Array, tokens: Tokens) -> Ragged:
    """The tokens of each text, without empty ones; behind them those of several neighbours, the shortest first."""
    texts = pc.utf8_lower(texts) if tokens.lower else texts
    if tokens.unit == "characters":
        words, between = _characters(texts), ""
    else:
        parts, between = ragged(pc.split_pattern_regex(texts, tokens.split)), " "
        words = _where(parts, pc.not_equal(parts.values, ""))
    found, rows = [words.values], [words.row]
    for num in range(2, tokens.ngrams + 1):
        starts = max(len(words.row) - num + 1, 0)
        grams = pc.binary_join_element_wise(*[words.values.slice(i, starts) for i in range(num)], between)
        within = words.row[:starts] == words.row[num - 1 :]
        found.append(grams.filter(pa.array(within)))
        rows.append(words.row[:starts][within])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return Ragged(pa.concat_arrays(found).take(pa.array(order)), row[order], words.num_rows)


def _characters(texts: pa.Array) -> Ragged:
    """The characters of each text, which share its bytes: one begins at each byte that continues none (RFC 3629)."""
    texts = pc.fill_null(texts, "")
    _, bounds, values = texts.buffers()
    ends = np.frombuffer(bounds, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(values or b"", np.uint8)[: ends[-1]]
    starts = ends[0] + np.flatnonzero((data[ends[0] :] & 0xC0) != 0x80)
    bounds = pa.array(np.append(starts, ends[-1]), pa.int32()).buffers()[1]
    characters = pa.StringArray.from_buffers(len(starts), bounds, values)
    return Ragged(characters, np.searchsorted(ends[1:], starts, side="right"), len(texts))


def _where(lists: Ragged, mask: pa.Array) -> Ragged:
    return Ragged(lists.values.filter(mask), lists.row[mask.to_numpy(zero_copy_only=False)], lists.num_rows)


def in_sequence(lists: Ragged, ids: Ids, form: Sequence) -> Ids:
    """Ids in their order, cut or padded with zeros. Shape (rows, length)."""
    starts, lengths = _bounds(lists)
    place = np.arange(len(ids)) - starts[lists.row]
    if form.keep == "last":
        place = place - np.maximum(lengths - form.length, 0)[lists.row]
    kept = (place >= 0) & (place < form.length)
    found = np.zeros((lists.num_rows, form.length), dtype=np.int64)
    found[lists.row[kept], place[kept]] = ids[kept]
    return found


def in_bag(
    lists: Ragged, ids: Ids, form: Bag, weights: Floats | None, idf: Floats
) -> tuple[Ids, npt.NDArray[np.float32]]:
    """Each id of a row once, in rising order, with its weight; padded with zeros. Both of shape (rows, length).

    Args:
        lists: Where the ids stand.
        ids: Of each value.
        form: The length and the weighting.
        weights: Of each value, where they are given.
        idf: Of each id, where it counts.
    """
    if not form.other:
        known = ids > 0
        lists = _where(lists, pa.array(known))
        ids, weights = ids[known], None if weights is None else weights[known]
    order = np.lexsort((ids, lists.row))
    row, ids = lists.row[order], ids[order]
    added = np.ones(len(ids)) if weights is None else weights[order]
    first = np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) | (ids[1:] != ids[:-1])]) if len(ids) else np.empty(0, int)
    weight = np.add.reduceat(added, first) if len(ids) else np.empty(0)
    row, ids = row[first], ids[first]
    if form.weights is None:
        match form.weighting:
            case "binary":
                weight = np.ones(len(ids))
            case "mean":
                weight = weight / _bounds(lists)[1][row]
            case "tf_idf":
                weight = weight * idf[ids]
    heaviest = np.lexsort((ids, -weight, row))
    place = np.arange(len(row)) - np.searchsorted(row, row)  # in its row, since rows stay together in that order
    kept = np.sort(heaviest[place < form.length])
    row, ids, weight = row[kept], ids[kept], weight[kept]
    if form.unit:
        length = np.sqrt(np.bincount(row, weight * weight, lists.num_rows))[row]
        weight = np.divide(weight, length, out=np.zeros_like(weight), where=length > 0)
    place = np.arange(len(row)) - np.searchsorted(row, row)
    found = np.zeros((lists.num_rows, form.length), np.int64), np.zeros((lists.num_rows, form.length), np.float32)
    found[0][row, place], found[1][row, place] = ids, weight
    return found


def _bounds(lists: Ragged) -> tuple[Ids, Ids]:
    """Where each row's values begin, and how many they are."""
    starts = np.searchsorted(lists.row, np.arange(lists.num_rows + 1))
    return starts[:-1], np.diff(starts)


def parallel_weights(lists: Ragged, column: pa.Array, *, where: str) -> Floats:
    """The weight of each value.

    Raises:
        DataError: A row has another number of weights than values.
    """
    weights = ragged(column)
    if not np.array_equal(weights.row, lists.row):
        raise DataError(f"{where}: wanted a weight for each value of its list, seen rows with more or fewer")
    found: Floats = weights.values.to_numpy(zero_copy_only=False).astype(np.float64)
    return found
