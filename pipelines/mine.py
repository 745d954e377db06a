"""Find in all rows what no model predicts: frequent patterns, near neighbours, communities.

Patterns and graphs are read from the ingested table, neighbours from the feature tables of all splits. Each finding is
a Delta table of its own, `mined/<name>`; only its first rows reach the driver, to be shown.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

from pyspark.errors import PySparkException
from pyspark.ml.clustering import PowerIterationClustering
from pyspark.ml.feature import BucketedRandomProjectionLSH, MinHashLSH
from pyspark.ml.fpm import FPGrowth, PrefixSpan
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from pipelines.assemble import VECTOR, assemble
from pipelines.config.mining import Communities, FrequentSequences, FrequentSets, NearSets, NearVectors
from pipelines.errors import DataError, one_line
from pipelines.lake import Snapshot, table_path
from pipelines.session import get_session, is_refusal, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import kept, read_table

SHOWN_ROWS = 20
Keep = Callable[[DataFrame], DataFrame]
Findings = dict[str, tuple[DataFrame, tuple[Column, ...]]]  # by name: the rows, and the order in which to show them


def build(given: Given) -> Made:
    """Run each algorithm of the config.

    Raises:
        DataError: The rows do not suit an algorithm.
    """
    config = given.config
    assert config.mine, "the config declares the stage"
    spark = get_session(config)
    snapshots = given.inputs["features"].result["snapshots"]
    tables = {split: Snapshot.model_validate(value) for split, value in snapshots.items()}
    raw = Snapshot.model_validate(given.inputs["ingest"].result["snapshot"])
    found, lines = {}, []
    for name, algorithm in config.mine.algorithms.items():
        if isinstance(algorithm, NearSets | NearVectors):
            rows = _of_input(spark, tables, name, algorithm)
        else:
            rows = read_table(spark, raw)
        with spark_progress(spark, f"mine: {name}"), _explained(name), ExitStack() as until_written:
            findings = ALGORITHMS[name](rows, algorithm, lambda each: until_written.enter_context(kept(each)))
            for what, (table, order) in findings.items():
                found[what], shown = _write(given, what, table, order)
                lines.append(f"{what}: {found[what]['rows']:,} rows in {found[what]['table']}")
                lines += [f"  {one_line(str(row), limit=120)}" for row in shown[:3]]
    given.run.params({f"{name}.{k}": v for name, a in config.mine.algorithms.items() for k, v in a.params.items()})
    given.run.metrics({f"mined/{what}": one["rows"] for what, one in found.items()})
    return Made(rows=raw.rows, result={"found": found}, outputs=[one["table"] for one in found.values()], lines=lines)


def _write(given: Given, what: str, table: DataFrame, order: tuple[Column, ...]) -> tuple[dict[str, Any], list[Any]]:
    """Write a finding in one commit and show its first rows in MLflow."""
    path, seen = table_path(given.config.workload, f"mined/{what}"), Observation()
    counted = table.observe(seen, F.count(F.lit(1)).alias("rows"))
    counted.write.format("delta").mode("overwrite").option("overwriteSchema", "true").save(str(path))
    written = table.sparkSession.read.format("delta").load(str(path))
    shown = [row.asDict(recursive=True) for row in written.orderBy(*order).limit(SHOWN_ROWS).collect()]
    given.run.json(f"{what}.json", shown)
    return {"table": str(path), "rows": seen.get["rows"]}, shown


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What MLlib says of rows that it does not take, in one line."""
    try:
        yield
    except PySparkException as error:
        if is_refusal(error):
            raise DataError(f"mine: {name}: MLlib refuses: {one_line(str(error), limit=300)}") from None
        raise


def _sets(rows: DataFrame, wanted: FrequentSets, keep: Keep) -> Findings:
    """`frequent_sets` (items, freq) and `rules` (antecedent, consequent, confidence, lift, support)."""
    if wanted.by:
        sets = (
            rows.dropna(subset=[wanted.items, wanted.by])
            .groupBy(wanted.by)
            .agg(F.collect_set(wanted.items).alias("items"))
        )
    else:
        sets = rows.select(F.array_distinct(F.array_compact(wanted.items)).alias("items"))
    sets = keep(sets.where(F.size("items") > 0).select("items"))
    model = FPGrowth(itemsCol="items", **wanted.params).fit(sets)
    frequent = keep(model.freqItemsets)  # the rules are made from them
    return {
        "frequent_sets": (frequent, (F.desc("freq"), F.desc(F.size("items")), F.col("items"))),
        "rules": (model.associationRules, (F.desc("lift"), F.desc("support"), F.col("antecedent"))),
    }


def _sequences(rows: DataFrame, wanted: FrequentSequences, keep: Keep) -> Findings:
    """`frequent_sequences` (sequence, freq); a sequence is a list of sets."""
    if wanted.by and wanted.order:
        moments = rows.dropna(subset=[wanted.items, wanted.by, wanted.order])
        moments = moments.groupBy(wanted.by, wanted.order).agg(F.collect_set(wanted.items).alias("items"))
        moment = F.struct(F.col(wanted.order).alias("order"), "items")
        sequences = moments.groupBy(wanted.by).agg(F.sort_array(F.collect_list(moment))["items"].alias("sequence"))
    else:
        sequences = rows.select(F.transform(F.array_compact(wanted.items), lambda x: F.array(x)).alias("sequence"))
    sequences = sequences.where(F.size("sequence") > 0).select("sequence")
    found = PrefixSpan(sequenceCol="sequence", **wanted.params).findFrequentSequentialPatterns(sequences)
    length = F.aggregate("sequence", F.lit(0), lambda total, one: total + F.size(one))
    return {"frequent_sequences": (found, (F.desc("freq"), F.desc(length), F.col("sequence")))}


def _near_sets(rows: DataFrame, wanted: NearSets, keep: Keep) -> Findings:
    """`near_sets`, see `_pairs`."""
    return {"near_sets": _pairs(MinHashLSH(inputCol=VECTOR, seed=0, **wanted.params), rows, wanted)}


def _near_vectors(rows: DataFrame, wanted: NearVectors, keep: Keep) -> Findings:
    """`near_vectors`, see `_pairs`."""
    return {"near_vectors": _pairs(BucketedRandomProjectionLSH(inputCol=VECTOR, seed=0, **wanted.params), rows, wanted)}


def _pairs(lsh: Any, rows: DataFrame, wanted: NearSets | NearVectors) -> tuple[DataFrame, tuple[Column, ...]]:
    """Each near pair once: (row_id_a, split_a, row_id_b, split_b, distance)."""
    near = lsh.fit(rows).approxSimilarityJoin(rows, rows, wanted.max_distance, distCol="distance")
    near = near.where("datasetA.row_id < datasetB.row_id")
    sides = [F.col(f"dataset{x}.{name}").alias(f"{name}_{x.lower()}") for x in "AB" for name in ("row_id", "split")]
    return near.select(*sides, "distance"), (F.col("distance"), F.col("row_id_a"), F.col("row_id_b"))


def _communities(rows: DataFrame, wanted: Communities, keep: Keep) -> Findings:
    """`communities` (id, cluster), a row a vertex."""
    weight = F.col(wanted.weight).cast("double") if wanted.weight else F.lit(1.0)
    ends = [F.col(name).cast("bigint").alias(end) for name, end in ((wanted.src, "src"), (wanted.dst, "dst"))]
    edges = rows.select(*ends, weight.alias("weight")).dropna()
    finder = PowerIterationClustering(weightCol="weight", **wanted.params)
    return {"communities": (finder.assignClusters(edges), (F.col("cluster"), F.col("id")))}


def _of_input(spark: SparkSession, tables: dict[str, Snapshot], name: str, wanted: NearSets | NearVectors) -> DataFrame:
    """Rows of all splits: `row_id`, `split`, and one input as a vector; sets without an id are near to none."""
    parts = []
    for split, snapshot in tables.items():
        assert snapshot.contract is not None, "a feature table carries its contract"
        rows = read_table(spark, snapshot)
        contract = snapshot.contract.of_inputs([wanted.input])
        if contract.inputs[0].kind == "sparse_ids":
            rows = rows.where(F.exists(f"{wanted.input}_weights", lambda weight: weight != 0))
        rows = assemble(rows, contract, estimator=name, keep=["row_id"])
        parts.append(rows.select("row_id", F.lit(split).alias("split"), VECTOR))
    return reduce(DataFrame.unionByName, parts)


ALGORITHMS: dict[str, Callable[[DataFrame, Any, Keep], Findings]] = {
    "FPGrowth": _sets,
    "PrefixSpan": _sequences,
    "MinHashLSH": _near_sets,
    "BucketedRandomProjectionLSH": _near_vectors,
    "PowerIterationClustering": _communities,
}
