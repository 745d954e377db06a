"""Rankings and their metrics are those of a plain loop; what is written for users adds up, and models serve raw rows."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipelines import tracking
from pipelines.config import load_config
from pipelines.errors import ConfigError
from pipelines.lake import table_path
from pipelines.ranking import Ranking, judged, ranking_metrics
from pipelines.recommend import ITEM, ITEM_ID, USER, USER_ID, Factors, best, histories, items_in, top_k
from pipelines.tracking import ModelRef
from tests.conftest import ROOT
from tests.stages import metrics_of, run

pytestmark = pytest.mark.usefixtures("forked_ranks")

USERS, ITEMS, K = 40, 25, 5


def vectors(spark: SparkSession, ids: range, generator: np.random.Generator) -> tuple[DataFrame, np.ndarray]:
    values = generator.integers(-3, 4, (len(ids), 2)).astype(np.float32)  # with ties
    rows = [(i, row.tolist()) for i, row in zip(ids, values, strict=True)]
    return spark.createDataFrame(rows, "_id long, vector array<float>"), values


def test_rankings_are_those_of_a_plain_loop(spark: SparkSession, tmp_path: Path) -> None:
    """Users and items out of vocabulary, users who have seen nearly all or nothing, and several items to be found."""
    generator = np.random.default_rng(0)
    users, of_users = vectors(spark, range(1, USERS + 1), generator)
    items, of_items = vectors(spark, range(1, ITEMS + 1), generator)
    rows, number = [], 0
    for user in range(USERS + 2):  # 0 and the last are not known to the model
        num = ITEMS - 2 if user == 3 else int(generator.integers(1, 9))
        taken = generator.choice(ITEMS + 1, num, replace=False)  # 0 is out of vocabulary
        for at, item in enumerate(taken.tolist()):
            split = "test" if at < 2 else "train"
            number += 1
            rows.append((number, split, f"u{user}", f"i{item}", min(user, USERS + 1) if user <= USERS else 0, item))
    schema = f"row_id long, _split string, {USER} string, {ITEM} string, {USER_ID} long, {ITEM_ID} long"
    chosen = spark.createDataFrame(rows, schema)
    asked = histories(chosen).withColumns({"held": items_in("test"), "seen": items_in("train")}).drop("history")
    with top_k(asked, Factors(users, items), k=K, scratch=tmp_path) as ranked:
        lists = {row[USER_ID]: (row["items"], row["scores"]) for row in ranked.persist().collect()}
        table = judged(ranked, k=K).toPandas().set_index("user")
        ranked.unpersist()
    assert lists[0] == ([], []) and len(lists) == USERS + 1 and len(table) == USERS + 2
    ndcg, recall = {}, {}
    for user in range(USERS + 2):
        known = 1 <= user <= USERS
        mine = [row for row in rows if row[2] == f"u{user}"]
        before = {row[5] for row in mine if row[1] == "train"}
        order: list[int] = []
        if known:
            own = of_users[user - 1] @ of_items.T
            scores = {i: float(own[i - 1]) for i in range(1, ITEMS + 1) if i not in before}
            order = sorted(scores, key=lambda i: (-scores[i], i))[:K]
            assert [scores[i] for i in order] == lists[user][1] == [scores[i] for i in lists[user][0]]
            assert not before & set(lists[user][0])
            order = lists[user][0]
        held = [row[5] for row in mine if row[1] == "test"]
        gain = sum(1 / np.log2(2 + order.index(i)) for i in held if i in order)
        ndcg[f"u{user}"] = gain / sum(1 / np.log2(2 + r) for r in range(min(K, len(held))))
        recall[f"u{user}"] = np.mean([i in order for i in held])
    pd.testing.assert_series_equal(table.ndcg.sort_index(), pd.Series(ndcg).sort_index(), check_names=False)
    pd.testing.assert_series_equal(table.recall.sort_index(), pd.Series(recall).sort_index(), check_names=False)
    rankings = spark.createDataFrame(table.reset_index().assign(candidate="m", split="test"))
    found = ranking_metrics(rankings, {"m": ITEMS})["m", "test"]
    assert found["ndcg"] == pytest.approx(np.mean(list(ndcg.values())))
    assert found["coverage"] == len({i for items, _ in lists.values() for i in items}) / ITEMS
    of_users = Ranking(rankings, "", {}).user_values(["m"], "recall")
    assert of_users is not None
    label, values = of_users
    assert len(label) == USERS + 2 and values["m"].mean() == pytest.approx(found["recall"])


def test_the_best_places() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(50, 30)).astype(np.float32)
    np.testing.assert_array_equal(best(scores, 7), np.argsort(-scores, axis=1)[:, :7])
    assert best(scores[:, :3], 7).shape == (50, 3)


RATINGS: dict[str, Any] = {
    "source.schema": "user string, item string, rating int, time bigint",
    "source.prepare": None,
    "source.options": {"sep": "\t"},
    "classic": [{"estimator": "ALS", "rank": 2, "maxIter": 3, "numUserBlocks": 1, "numItemBlocks": 1}],
    "train": {"ranks": 1, "batch_size": 64, "epochs": 2, "lr": 0.01, "launcher": "torchrun"},
    "gate.require": {},
    "recommend.top_k": 4,
}


def overrides(**others: Any) -> tuple[str, ...]:
    return tuple(f"{key}={'null' if value is None else value}" for key, value in {**RATINGS, **others}.items())


def write_ratings(folder: Path) -> str:
    """30 users and 12 items that they choose by turns; user u29 saw nearly all, and i99 only one user knows."""
    generator = np.random.default_rng(1)
    lines = []
    for user in range(30):
        num = 11 if user == 29 else 6
        for at, item in enumerate(generator.choice(12, num, replace=False).tolist()):
            rating = int(np.clip(3 + (user % 2 == item % 2) * 2 - generator.integers(0, 2), 1, 5))
            lines.append(f"u{user}\ti{item}\t{rating}\t{1000 + at}")
    lines.append("u0\ti99\t1\t1")
    folder.mkdir()
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    return str(folder / "*.data")


def test_a_chain_recommends_and_serves(spark: SparkSession, lake: Path) -> None:
    given = overrides(
        **{
            "source.paths": write_ratings(lake.parent / "raw"),
            "features.inputs.item.steps": [{"vocabulary": {"min_count": 2}}],
            "tune": {"spaces": {"ALS": {"regParam": [0.01, 5.0]}}},
        }
    )
    receipts = run("conf/ratings.yaml", overrides=given)
    (tuned,) = receipts["tune"].result["candidates"]
    values = {str(trial["params"]): trial["value"] for trial in tuned["trials"]}
    assert len(values) == 3 and tuned["value"] == min(values.values()), "rmse, since trials rank nothing"
    result = receipts["evaluate"].result
    assert set(metrics_of(receipts, "ALS")) == {"rmse", "mae", "r2", "ndcg", "recall", "coverage"}
    assert set(metrics_of(receipts, "two_tower")) == {"ndcg", "recall", "coverage"}
    assert [b["name"] for b in result["baselines"]] == ["popularity"] and result["metric"] == "ndcg"
    rows = spark.read.format("delta").load(str(table_path("ratings", "raw"))).toPandas()
    seen = rows.groupby("user")["item"].agg(set)
    for stage, name in (("classic", "ALS"), ("train", "two_tower")):
        found = receipts["classic"].result["models"][0] if stage == "classic" else receipts["train"].result["model"]
        tracking.register(
            "ratings",
            ModelRef.model_validate(found),
            receipts[stage].run_id,
            alias="champion",
            evaluation="",
            tags={},
            note="",
        )
        scored = run("conf/ratings.yaml", "score", overrides=given)["score"]
        assert scored.result["model"] == name
        table = spark.read.format("delta").load(scored.result["recommendations"]["table"]).toPandas()
        assert table.columns.tolist() == ["row_id", "user", "item", "rank", "score"]
        assert len(table) == scored.result["recommendations"]["rows"] == 29 * 4 + 1
        for user, mine in table.sort_values("rank").groupby("user"):
            assert mine["rank"].tolist() == list(range(1, len(mine) + 1)) and mine["score"].is_monotonic_decreasing
            assert not seen[user] & set(mine["item"]) and "i99" not in set(mine["item"])
        column = "prediction" if name == "ALS" else "score"
        wanted = rows.merge(spark.read.format("delta").load(scored.result["table"]).toPandas()[["row_id", column]])
        champion = mlflow.pyfunc.load_model("models:/ratings@champion")
        answer = champion.predict(rows[["user", "item"]])
        assert answer.columns.tolist() == [column]
        np.testing.assert_allclose(answer[column], wanted[column], rtol=1e-5)
        strange = champion.predict(pd.DataFrame({"user": ["nobody"], "item": ["i1"]}))[column][0]
        if name == "ALS":
            mean = receipts["features"].result["fitted"]["label"]["spec"]["mean"]
            assert strange == pytest.approx(mean), "what is not known is rated as all are in the mean"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("recommend=null", "recommend: wanted, because model: two_tower learns from users and items"),
        ("recommend.user=usr", "recommend.user: one of features.inputs, one of item, user, seen 'usr'"),
        ("recommend.item=user", "wanted two inputs, seen 'user' twice"),
        ("split={hash: {}, validation: {share: 0.1}}", "wanted split.last by 'user'"),
        ("split.last.by=item", "seen it by 'item'"),
        ("gate.metric=coverage", "says nothing of being right"),
        ("features.refit=false", "wanted true with split.last, whose rows move when others arrive"),
        ("gate.metric=auc", "one of coverage, mae, ndcg, r2, recall, rmse"),
        ("train.early_stopping={metric: rmse}", "wanted loss, all that two_tower has"),
        ("features.inputs.item.steps=[{hash: {buckets: 10}}]", "one column through 'vocabulary'"),
        ("features.label.kind=multiclass", "wanted a label of kind real, the rating, seen multiclass"),
        ("classic.0.coldStartStrategy=drop", "wanted a parameter of ALS"),
        ("tune={spaces: {train: {lr: {low: 0.001, high: 0.1}}}}", "two_tower gives no rating"),
        (
            "classic=[{estimator: ALS, implicitPrefs: true}]; tune={spaces: {ALS: {rank: [2, 4]}}}",
            "tune: ALS with implicitPrefs gives no rating",
        ),
    ],
)
def test_what_cannot_be_recommended_is_refused(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("conf/ratings.yaml", override.split("; "))
    assert part in str(caught.value)


def test_ratings_csv_as_documented(
    spark: SparkSession, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format of ml-latest, with the config of docs/ratings.md."""
    written = (ROOT / "docs/ratings.md").read_text().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "movielens.yaml"
    path.write_text(f"workload: movielens\nclassic: [{{estimator: ALS}}]\n{written}")
    lines = ["userId,movieId,rating,timestamp"]
    lines += [f"{u},{m},{(u + m) % 10 / 2 + 0.5},{964982703 + m}" for u in range(1, 9) for m in (1, 3, 110, 2**20 + u)]
    (tmp_path / "ml-latest-small").mkdir()
    (tmp_path / "ml-latest-small/ratings.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    receipts = run(path, "ingest", "features")
    snapshots = receipts["features"].result["snapshots"]
    assert {split: snapshot["rows"] for split, snapshot in snapshots.items()} == {
        "train": 16,
        "validation": 8,
        "test": 8,
    }
    assert snapshots["train"]["contract"]["recommended"] == {"user": "user", "item": "item", "item_counts": [0, 8, 8]}
