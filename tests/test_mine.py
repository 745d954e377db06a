"""What the mine stage finds in planted rows, counted again by hand."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.errors import ConfigError, DataError
from tests.stages import run

NUM_ROWS, NUM_USERS = 240, 24
SCHEMA = {
    "n": "bigint",
    "basket": "array<string>",
    "user": "int",
    "moment": "int",
    "page": "string",
    "src": "bigint",
    "dst": "bigint",
    "words": "array<string>",
    "x": "array<float>",
    "weight": "int",
}
MINE: dict[str, dict[str, Any]] = {
    "FPGrowth": {"items": "basket", "minSupport": 0.3, "minConfidence": 0.7},
    "PrefixSpan": {"items": "page", "by": "user", "order": "moment", "minSupport": 0.5, "maxPatternLength": 3},
    "MinHashLSH": {"input": "words", "max_distance": 0.3},
    "BucketedRandomProjectionLSH": {"input": "x", "max_distance": 0.05, "bucketLength": 0.2},
    "PowerIterationClustering": {"src": "src", "dst": "dst", "k": 2, "maxIter": 5},
}


def planted() -> dict[str, list[Any]]:
    """Bread goes with butter; a visit opens with home; every 40th row repeats the words and vector of the one before;
    two rings of 8 vertices, each joined in itself more than with the other."""
    generator = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA}
    edges = [(a + ring, b + ring) for ring in (0, 8) for a, b in combinations(range(8), 2)] + [(0, 8)]
    for n in range(NUM_ROWS):
        basket = {"bread", "butter"} if generator.random() < 0.5 else {str(generator.choice(["tea", "bread", "milk"]))}
        again = n % 40 == 39
        words = rows["words"][-1] if again else [f"w{i}" for i in generator.integers(0, 1000, 6)]
        moment = n // NUM_USERS
        page = "home" if moment == 0 else str(generator.choice(["list", "item", "cart"]))
        src, dst = edges[n] if n < len(edges) else (None, None)
        values = {
            "n": n,
            "basket": [*sorted(basket), *(["bread"] if "bread" in basket and n % 7 == 0 else [])],  # twice in a list
            "user": n % NUM_USERS,
            "moment": moment,
            "page": page,
            "src": src,
            "dst": dst,
            "words": words if n != 5 else [],
            "x": rows["x"][-1] if again else [float(x) for x in generator.normal(0, 1, 3)],
            "weight": 1,
        }
        for name, value in values.items():
            rows[name].append(value)
    return rows


@pytest.fixture
def write(tmp_path: Path, workload: Callable[..., Path]) -> Iterator[Callable[..., Path]]:
    """Write the workload over the planted rows, with other rows and a `mine` section of one's own."""

    def make(mine: dict[str, Any], rows: dict[str, list[Any]] | None = None) -> Path:
        types = {"int": pa.int32(), "bigint": pa.int64(), "string": pa.string(), "array<string>": pa.list_(pa.string())}
        types["array<float>"] = pa.list_(pa.float32())
        schema = pa.schema([(name, types[dtype]) for name, dtype in SCHEMA.items()])
        path = tmp_path / "planted.parquet"
        pq.write_table(pa.table(rows or planted(), schema=schema), path)
        inputs = {
            "words": {"columns": ["words"], "steps": ["vocabulary", {"bag": {"length": 6}}]},
            "x": {"columns": ["x"], "steps": [{"vector": {"width": 3}}]},
            "visit": {"columns": ["page", "user"], "steps": ["vocabulary"]},
        }
        return workload(
            source={"format": "parquet", "paths": str(path), "schema": SCHEMA, "key": ["n"]},
            features={"inputs": inputs},
            classic=None,
            mine=mine,
        )

    yield make


def holds(sequence: list[set[str]], pattern: list[list[str]]) -> bool:
    """Whether the pattern's sets lie in the sequence, in order."""
    at = 0
    for items in sequence:
        if at < len(pattern) and set(pattern[at]) <= items:
            at += 1
    return at == len(pattern)


def test_all_is_found(spark: SparkSession, lake: Path, write: Callable[..., Path]) -> None:
    receipts = run(write(MINE))
    assert list(receipts) == ["ingest", "features", "mine"], "nothing to evaluate, to register or to score"
    found = receipts["mine"].result["found"]
    tables = {name: spark.read.format("delta").load(one["table"]).collect() for name, one in found.items()}
    assert {name: len(rows) for name, rows in tables.items()} == {name: one["rows"] for name, one in found.items()}
    rows = planted()

    baskets = [set(basket) for basket in rows["basket"]]
    counts = Counter(frozenset(c) for b in baskets for size in (1, 2) for c in combinations(sorted(b), size))
    frequent = {items: num for items, num in counts.items() if num >= 0.3 * NUM_ROWS}
    assert {frozenset(row["items"]): row["freq"] for row in tables["frequent_sets"]} == frequent
    rule = next(r for r in tables["rules"] if r["antecedent"] == ["butter"])
    assert rule["consequent"] == ["bread"] and rule["confidence"] == 1.0 and rule["lift"] > 1

    order = np.argsort(rows["moment"], kind="stable")
    visits = [[{rows["page"][i]} for i in order if rows["user"][i] == user] for user in range(NUM_USERS)]
    patterns = {str(row["sequence"]): row for row in tables["frequent_sequences"]}
    assert patterns["[['home'], ['item']]"]["freq"] > NUM_USERS / 2
    for row in patterns.values():
        assert row["freq"] == sum(holds(visit, row["sequence"]) for visit in visits) >= NUM_USERS / 2
    assert not any(len(row["sequence"]) > 1 and row["sequence"][-1] == ["home"] for row in patterns.values())

    raw = spark.read.format("delta").load(str(lake / "tables/tiny/raw")).select("row_id", "n").collect()
    n_of = {row["row_id"]: row["n"] for row in raw}
    for name in ("near_sets", "near_vectors"):
        pairs = {tuple(sorted((n_of[r["row_id_a"]], n_of[r["row_id_b"]]))): r for r in tables[name]}
        assert {(n - 1, n) for n in range(39, NUM_ROWS, 40)} <= pairs.keys(), "what repeats is found"
        for (a, b), row in pairs.items():
            if name == "near_sets":
                one, other = set(rows["words"][a]), set(rows["words"][b])
                distance = 1 - len(one & other) / len(one | other)
            else:
                distance = float(np.linalg.norm(np.subtract(rows["x"][a], rows["x"][b])))
            assert row["distance"] == pytest.approx(distance, abs=1e-6)
            assert {row["split_a"], row["split_b"]} <= {"train", "test"}

    clusters = {row["id"]: row["cluster"] for row in tables["communities"]}
    assert len({clusters[i] for i in range(8)}) == 1 == len({clusters[i] for i in range(8, 16)})
    assert clusters[0] != clusters[8] and len(clusters) == 16


def test_items_of_several_rows_and_what_mllib_refuses(
    spark: SparkSession, lake: Path, write: Callable[..., Path]
) -> None:
    """Sets gathered by a column, rows of nobody left out; sets of ids; then edges of a negative weight, after which the
    tables of before stand."""
    rows = planted()
    rows["weight"] = [-1] * NUM_ROWS
    rows["user"] = [None if number % 3 == 0 else user for number, user in enumerate(rows["user"])]
    mine = {
        "FPGrowth": {"items": "page", "by": "user", "minSupport": 0.2},
        "MinHashLSH": {"input": "visit", "max_distance": 0.1},
        "PowerIterationClustering": {"src": "src", "dst": "dst", "weight": "weight"},
    }
    path = write(mine, rows)
    with pytest.raises(DataError, match="mine: PowerIterationClustering: MLlib refuses: .*-1"):
        run(path)
    visits = [{p for p, u in zip(rows["page"], rows["user"], strict=True) if u == n} for n in range(NUM_USERS)]
    counts = Counter(frozenset(c) for v in visits for size in range(1, 5) for c in combinations(sorted(v), size))
    kept = spark.read.format("delta").load(str(lake / "tables/tiny/mined/frequent_sets")).collect()
    wanted = {items: num for items, num in counts.items() if num >= 0.2 * sum(map(bool, visits))}
    assert {frozenset(row["items"]): row["freq"] for row in kept} == wanted and len(wanted) > 3
    near = spark.read.format("delta").load(str(lake / "tables/tiny/mined/near_sets"))
    alike = Counter(zip(rows["page"], rows["user"], strict=True)).values()
    assert near.count() == sum(num * (num - 1) // 2 for num in alike) > 0, "ids as well as lists of them"


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ({}, "mine: wanted one of FPGrowth, PrefixSpan"),
        ({"FPGrowht": {"items": "basket"}}, "mine.FPGrowht: unknown key; did you mean 'FPGrowth'"),
        (
            {"FPGrowth": {"items": "baskett"}},
            "mine.FPGrowth.items: a column of the schema, one of .* did you mean 'basket'",
        ),
        ({"FPGrowth": {"items": "page"}}, "mine.FPGrowth.items: wanted type array<string> .* seen 'page', string"),
        (
            {"FPGrowth": {"items": "basket", "by": "user"}},
            "items: wanted type string or int .* seen 'basket', array<string>",
        ),
        ({"FPGrowth": {"items": "basket", "minSupport": 0}}, "mine.FPGrowth.minSupport"),
        ({"PrefixSpan": {"items": "page", "by": "user"}}, "wanted 'by' and 'order' together"),
        ({"MinHashLSH": {"input": "x"}}, "wanted an input that is ids or sparse, seen 'x', dense"),
        ({"MinHashLSH": {"input": "word"}}, "mine.MinHashLSH.input: an input of the features"),
        (
            {"PowerIterationClustering": {"src": "src", "dst": "page"}},
            "dst: wanted type int or bigint, seen 'page', string",
        ),
    ],
)
def test_refused_before_anything_starts(write: Callable[..., Path], mine: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(mine))
