"""Batch inference on Spark: raw rows through the fitted features and the model that carries the alias."""

from contextlib import ExitStack

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from pipelines import tracking
from pipelines.config import Config
from pipelines.errors import LakeError
from pipelines.features.apply import transform
from pipelines.features.fitted import FittedCategory, FittedFeatures
from pipelines.features.split import with_split
from pipelines.ingest import parse
from pipelines.joins import join_as_of
from pipelines.lake import Snapshot, scratch_path, table_path
from pipelines.predict import Loaded, factors, loaded, predict, readable
from pipelines.recommend import choices, kept_factors, recommendations
from pipelines.session import get_session
from pipelines.stage import Given, Made
from pipelines.tables import kept, read_dealt, read_table, write_table
from pipelines.tracking import Registered


def build(given: Given) -> Made:
    """Score rows with the model under the alias, into the workload's `predictions` table.

    The table is overwritten in one commit, so a second run leaves one run's rows.

    Raises:
        LakeError: No model carries the alias, or the rows out are not the rows in.
    """
    config = given.config
    champion = tracking.champion(config.workload, alias=config.score.alias)
    if champion is None:
        raise LakeError(
            f"score: wanted a model of {config.workload} with alias {config.score.alias!r}, seen none; run "
            f"`make register W={config.workload}` first"
        )
    spark = get_session(config)
    rows, num_rows = _rows_to_score(spark, given)
    with loaded(champion.ref, scratch_path(config.workload)) as model:
        seen = Observation()
        keep = ["row_id", *[name for name in (*config.source.key, "_file", "_line") if name in rows.columns]]
        features = transform(rows, model.bundle.fitted, keep=keep)
        features = features.observe(seen, F.count(F.lit(1)).alias("rows"), *_unseen(model.bundle.fitted))
        scored = readable(predict(features, model, keep=keep), model.bundle, keep)
        table = scored.withColumn("model_version", F.lit(champion.version))
        snapshot = write_table(table, table_path(config.workload, "predictions"), what="score")
        recommended = _recommend(spark, given, model) if config.recommend and model.bundle.has_factors else None
    wanted = seen.get["rows"] if num_rows is None else num_rows
    if not snapshot.rows == seen.get["rows"] == wanted:
        raise LakeError(f"score: {wanted:,} rows went in, {snapshot.rows:,} came out")
    given.run.metrics({"rows_scored": snapshot.rows})
    made = _made(snapshot, champion, {k: v for k, v in seen.get.items() if k != "rows" and v})
    if recommended:
        made.result["recommendations"] = {"table": recommended.table, "rows": recommended.rows}
        made.outputs.extend(str(path) for path in recommended.paths())
        made.lines.append(f"{recommended.rows:,} recommendations in {recommended.table}")
    return made


def _recommend(spark: SparkSession, given: Given, model: Loaded) -> Snapshot:
    """Write what each user of the ingested rows is recommended.

    Raises:
        LakeError: Not all that users are recommended was written.
    """
    config, seen = given.config, Observation()
    assert config.recommend is not None, "asked for only with the section"
    raw = read_table(spark, Snapshot.model_validate(given.inputs["ingest"].result["snapshot"]))
    scratch, k = scratch_path(config.workload), config.recommend.top_k
    with ExitStack() as until_written:
        enter = until_written.enter_context
        chosen = enter(kept(choices(with_split(raw, config), model.bundle.fitted)))
        vectors = enter(kept_factors(factors(chosen, model)))
        rows = enter(recommendations(chosen, vectors, k=k, scratch=scratch, observed=seen))
        snapshot = write_table(rows, table_path(config.workload, "recommendations"), what="score: recommend")
    if snapshot.rows != seen.get["items"]:
        raise LakeError(
            f"score: wanted the {seen.get['items']:,} recommendations of {seen.get['users']:,} users written, seen "
            f"{snapshot.rows:,}"
        )
    given.run.metrics({"users_recommended": seen.get["users"], "recommendations": snapshot.rows})
    return snapshot


def _rows_to_score(spark: SparkSession, given: Given) -> tuple[DataFrame, int | None]:
    """The raw rows, and how many there are where that is known."""
    config: Config = given.config
    if config.score.paths:
        source = config.source.model_copy(update={"paths": config.score.paths})
        parsed = parse(spark, source)
        rejected = parsed.where(F.col("_reason").isNotNull())
        if examples := rejected.limit(1).collect():
            first = examples[0]
            raise LakeError(f"score.paths: {first['_file']} line {first['_line']}: {first['_reason']}; mend the row")
        return join_as_of(parsed.drop("_raw", "_reason"), source), None
    raw = Snapshot.model_validate(given.inputs["ingest"].result["snapshot"])
    rows = read_dealt(spark, raw)
    if config.score.split == "all":
        return rows, raw.rows
    snapshots = given.inputs["features"].result["snapshots"]
    chosen = with_split(rows, config).where(F.col("_split") == config.score.split)
    return chosen, snapshots[config.score.split]["rows"]


def _unseen(fitted: FittedFeatures) -> list[SparkColumn]:
    """For each vocabulary column, how many rows hold a value outside its vocabulary."""
    return [
        F.count_if(F.col(group.name)[place] == 0).alias(f"unseen:{column.name}")
        for group in fitted.inputs
        for place, column in enumerate(group.columns)
        if isinstance(column, FittedCategory) and column.buckets is None
    ]


def _made(snapshot: Snapshot, champion: Registered, unseen: dict[str, int]) -> Made:
    lines = [f"{snapshot.rows:,} rows scored by {champion.ref.name}, version {champion.version}, into {snapshot.table}"]
    if unseen:
        shown = ", ".join(f"{name.removeprefix('unseen:')} ({num:,} rows)" for name, num in unseen.items())
        lines.append(f"values outside the vocabulary, scored as id 0: {shown}")
    return Made(
        rows=snapshot.rows,
        result={
            "table": snapshot.table,
            "delta_version": snapshot.version,
            "model_version": champion.version,
            "model": champion.ref.name,
            "unseen": {name.removeprefix("unseen:"): num for name, num in unseen.items()},
        },
        outputs=[str(path) for path in snapshot.paths()],
        lines=lines,
    )
