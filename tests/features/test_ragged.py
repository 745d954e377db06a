"""Texts to tokens and lists to padded ids, against the same in plain Python."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.steps import Bag, Sequence, Tokens
from pipelines.errors import DataError
from pipelines.features.ragged import in_bag, in_sequence, parallel_weights, ragged, tokenized

LISTS = st.lists(st.one_of(st.none(), st.lists(st.integers(0, 6), max_size=9)), max_size=12)


def test_tokens() -> None:
    texts = pa.array(["Ünï  Codé-日本, a.b!", None, "", "...", "one"])
    assert tokenized(texts, Tokens()).lists().to_pylist() == [["ünï", "codé", "日本", "a", "b"], [], [], [], ["one"]]
    pairs = tokenized(pa.array(["a B c", "d", "e f"]), Tokens(ngrams=3, lower=False)).lists().to_pylist()
    assert pairs == [["a", "B", "c", "a B", "B c", "a B c"], ["d"], ["e", "f", "e f"]]
    assert tokenized(pa.array(["1,2 3"]), Tokens(split=",")).lists().to_pylist() == [["1", "2 3"]]
    assert tokenized(texts.slice(3), Tokens(ngrams=2)).lists().to_pylist() == [[], ["one"]]


@given(texts=st.lists(st.none() | st.text(max_size=9), max_size=9), start=st.integers(0, 3), ngrams=st.integers(1, 3))
def test_characters(texts: list[str | None], start: int, ngrams: int) -> None:
    found = tokenized(pa.array(texts, pa.string()).slice(start), Tokens(unit="characters", lower=False, ngrams=ngrams))
    for text, seen in zip(texts[start:], found.lists().to_pylist(), strict=True):
        text = text or ""
        assert seen == [text[i : i + num] for num in range(1, ngrams + 1) for i in range(len(text) - num + 1)]


@given(lists=LISTS, length=st.integers(1, 5), keep=st.sampled_from(["first", "last"]))
def test_sequences(lists: list[list[int] | None], length: int, keep: Any) -> None:
    found = ragged(pa.array(lists, pa.list_(pa.int64())))
    got = in_sequence(found, found.values.to_numpy() + 1, Sequence(length=length, keep=keep))
    for row, given_row in zip(got.tolist(), lists, strict=True):
        ids = [i + 1 for i in given_row or []]
        kept = ids[:length] if keep == "first" else ids[-length:]
        assert row == kept + [0] * (length - len(kept))


@given(lists=LISTS, length=st.integers(1, 5), weighting=st.sampled_from(["count", "binary", "mean", "tf_idf"]))
def test_bags(lists: list[list[int] | None], length: int, weighting: Any) -> None:
    idf = np.array([0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 7.0])
    found = ragged(pa.array(lists, pa.list_(pa.int64())))
    ids, weights = in_bag(found, found.values.to_numpy(), Bag(length=length, weighting=weighting), None, idf)
    for row, given_row in enumerate(lists):
        counts = Counter(given_row or [])
        by_one = {"binary": dict.fromkeys(counts, 1.0), "mean": {i: n / counts.total() for i, n in counts.items()}}
        wanted = by_one.get(weighting, {i: n * (idf[i] if weighting == "tf_idf" else 1.0) for i, n in counts.items()})
        heaviest = sorted(wanted, key=lambda i: (-wanted[i], i))[:length]
        pad = [0] * (length - len(heaviest))
        assert ids[row].tolist() == sorted(heaviest) + pad
        assert weights[row].tolist() == [*(float(np.float32(wanted[i])) for i in sorted(heaviest)), *map(float, pad)]


def test_a_bag_of_known_values_of_one_length() -> None:
    lists = ragged(pa.array([[0, 3, 0, 1, 3], [0], None, [2]], pa.list_(pa.int64())))
    ids, weights = in_bag(lists, lists.values.to_numpy(), Bag(length=2, other=False, unit=True), None, np.empty(0))
    assert ids.tolist() == [[1, 3], [0, 0], [0, 0], [2, 0]]
    np.testing.assert_allclose(weights, [[1 / 5**0.5, 2 / 5**0.5], [0, 0], [0, 0], [1, 0]], rtol=1e-6)
    mean = in_bag(lists, lists.values.to_numpy(), Bag(length=2, other=False, weighting="mean"), None, np.empty(0))
    np.testing.assert_allclose(mean[1], [[1 / 3, 2 / 3], [0, 0], [0, 0], [1, 0]], rtol=1e-6)


def test_weights_of_its_own() -> None:
    lists = ragged(pa.array([[3, 1, 3], None, [2]], pa.list_(pa.int64())))
    column = pa.array([[0.5, 2.0, 1.0], None, [-1.0]], pa.list_(pa.float32()))
    form = Bag(length=2, weights="w")
    bag = in_bag(lists, lists.values.to_numpy(), form, parallel_weights(lists, column, where="w"), np.empty(0))
    assert bag[0].tolist() == [[1, 3], [0, 0], [2, 0]] and bag[1].tolist() == [[2.0, 1.5], [0.0, 0.0], [-1.0, 0.0]]
    short = pa.array([[0.5, 2.0], None, [-1.0]], pa.list_(pa.float32()))
    with pytest.raises(DataError, match="features: column 'w': wanted a weight for each value of its list"):
        parallel_weights(lists, short, where="features: column 'w'")
