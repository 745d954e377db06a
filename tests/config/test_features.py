"""Steps that do not fit each other, or their column, are refused before anything starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.errors import ConfigError

SOURCE = {
    "format": "parquet",
    "paths": "x.parquet",
    "schema": "a double, b double, color string, kind string, day date, y int, tags array<string>, v array<double>",
}
BINARY = {"column": "y", "kind": "binary", "positive": [1]}


@pytest.mark.parametrize(
    ("columns", "steps", "message"),
    [
        (["a"], ["standardise"], "unknown key; did you mean 'standardize'"),
        (["a"], ["standardize", "min_max"], "wanted one of standardize, robust_scale, min_max, seen"),
        (["a"], ["impute_mean", "impute_median"], "wanted one of impute_mean, impute_median"),
        (["a"], ["log1p", "impute_mean"], "an imputer comes first"),
        (["a"], ["log1p", {"bucketize": {"quantiles": 4}}], "'bucketize' takes values in the column's own units"),
        (["a"], [{"bucketize": {"splits": [2, 1]}}], "wanted rising numbers"),
        (["a"], [{"clip": {}}], "wanted 'low' or 'high', or else 'quantiles'"),
        (["a"], [{"clip": {"low": 1, "quantiles": [0, 1]}}], "wanted 'low' or 'high', or else 'quantiles'"),
        (["a"], [{"clip": {"low": 3, "high": 1}}], "wanted a lower bound below the upper one"),
        (["a"], [{"clip": {"quantiles": [0.9, 0.1]}}], "wanted a lower bound below the upper one"),
        (["a"], [{"clip": {"quantiles": [0.1, 1.1]}}], "less than or equal to 1"),
        (["a"], ["missing_indicator", "standardize"], "'missing_indicator' stands alone"),
        (["a"], ["vocabulary"], "wanted type int or bigint or boolean or string or date"),
        (["color"], ["standardize"], "seen string"),
        (["color"], ["vocabulary", {"hash": {"buckets": 3}}], "wanted one step that reads values"),
        (["color"], ["impute_mean", "vocabulary"], "with no step but 'cross' before it"),
        (["color", "kind"], ["cross"], "with no step but 'cross' before it"),
        (["color", "kind"], ["vocabulary", "cross"], "wanted one step that reads values, behind 'cross'"),
        (["color"], ["cross", "vocabulary"], "'cross' takes several columns"),
        (["a", "b"], [{"vector": {"width": 3}}], "'vector' takes one column, seen 2"),
        (["a"], [{"date": {"parts": ["month"]}}], "wanted type date or timestamp"),
        (["day"], [{"date": {"parts": ["moth"]}}], "seen 'moth'"),
        (["day"], [{"date": {"parts": ["year"], "cyclic": True}}], "'year' has no cycle"),
        (["day"], [{"date": {"parts": ["month"], "cyclic": True}}, "standardize"], "a cyclic 'date' stands alone"),
        (["day"], ["impute_mean", {"date": {"parts": ["month"]}}], "one of date, age, ratio comes first"),
        (["day"], [{"age": {"against": "dya"}}], "did you mean 'day'"),
        (["a"], ["impute_mean", {"ratio": {"by": "b"}}], "one of date, age, ratio comes first"),
        (["a"], [{"ratio": {"by": "color"}}], "wanted type int or bigint"),
        (["color"], [{"target": {"folds": 1}}], "greater than or equal to 2"),
        (["color"], ["tokens"], "then one of vocabulary, hash, then one of bag, sequence, and 'svd' only"),
        (["color"], ["tokens", "vocabulary"], "then one of bag, sequence"),
        (
            ["tags"],
            ["vocabulary", {"sequence": {"length": 3}}, {"svd": {"components": 2}}],
            "'svd' only behind a 'bag'",
        ),
        (["v"], [{"svd": {"components": 2}}], "'svd' only behind a 'bag'"),
        (["tags"], ["vocabulary", {"bag": {"length": 3}}, {"svd": {"components": 2}}], "max_size or buckets, times"),
        (
            ["tags"],
            [{"hash": {"buckets": 9}}, {"bag": {"length": 3}}, {"svd": {"components": 10}}],
            "at most 9 components",
        ),
        (["tags"], [{"hash": {"buckets": 9}}, {"bag": {"length": 3, "other": False}}], "'hash' knows no other values"),
        (["color"], ["vocabulary", {"bag": {"length": 3}}], "wanted type array<string> or array<int> or array<bigint>"),
        (["tags"], ["tokens", "vocabulary", {"bag": {"length": 3}}], "wanted type string"),
        (["tags"], ["vocabulary"], "wanted type int or bigint"),
        (["tags"], ["vocabulary", {"bag": {"length": 3, "weights": "tags"}}], "wanted a list of numbers"),
        (["tags"], ["vocabulary", {"bag": {"length": 3, "weights": "vv"}}], "did you mean 'v'"),
        (["tags"], ["vocabulary", {"bag": {"length": 3, "weights": "v", "weighting": "mean"}}], "one of 'weighting'"),
        (["color"], [{"tokens": {"split": "("}}, "vocabulary", {"bag": {"length": 3}}], "regular expression of RE2"),
        (["v"], [{"vector": {"width": 3}}, {"pca": {"components": 4}}], "wanted at most 3 components"),
        (["v"], [{"vector": {"width": 3}}, {"pca": {"components": 2}}, "standardize"], "then 'pca', seen"),
        (["a"], [{"pca": {"components": 2}}], "wanted 'vector'"),
        (["a"], [{"image": {"shape": [2, 2, 1], "encoded": True}}], "wanted 3 channels, or none for gray"),
    ],
)
def test_combinations_that_cannot_be(
    workload: Callable[..., Path], columns: list[str], steps: list[Any], message: str
) -> None:
    features = {"label": BINARY, "inputs": {"x": {"columns": columns, "steps": steps}}}
    with pytest.raises(ConfigError) as refused:
        load_config(workload("", source=SOURCE, features=features))
    assert "features.inputs.x" in str(refused.value) and message in str(refused.value), str(refused.value)


def test_sequences_are_for_networks(workload: Callable[..., Path]) -> None:
    steps = ["vocabulary", {"sequence": {"length": 3}}]
    features = {"label": BINARY, "inputs": {"x": {"columns": ["tags"], "steps": steps}}}
    classic = [{"estimator": "LogisticRegression"}]
    with pytest.raises(
        ConfigError,
        match="features.inputs.x.steps: a 'sequence' is for networks; LogisticRegression reads a 'bag', or other inputs",
    ):
        load_config(workload("", source=SOURCE, features=features, classic=classic))


def test_a_target_needs_a_mean(workload: Callable[..., Path]) -> None:
    label = {"column": "y", "kind": "multiclass"}
    features = {"label": label, "inputs": {"x": {"columns": ["color"], "steps": ["target"]}}}
    with pytest.raises(
        ConfigError, match="'target' takes a binary, real or count label, seen multiclass; use frequency"
    ):
        load_config(workload("", source=SOURCE, features=features))
