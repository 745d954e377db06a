"""Evaluate: score all candidates on the same rows through the serving path, and let the gate judge the best.

The candidate is the best on the validation split; the test split only gates.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import plots, tracking
from pipelines.assemble import assemble
from pipelines.bootstrap import Difference, Resampled, resample
from pipelines.clusters import measure_clusters
from pipelines.config import Config
from pipelines.config.workload import LOWER_IS_BETTER
from pipelines.errors import DataError
from pipelines.features.apply import transform, with_label
from pipelines.features.fitted import FittedFeatures
from pipelines.features.split import with_split
from pipelines.gate import Verdict, judge
from pipelines.lake import LabelSpec, Snapshot, scratch_path, table_path
from pipelines.leaderboard import table as leaderboard_table
from pipelines.metrics import Measured, Metrics, by_slice, confusion, histograms, measure, row_values, sampled
from pipelines.predict import Loaded, loaded, measure_speed, predict
from pipelines.ranking import Ranking, rank_all
from pipelines.session import get_session, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import kept, read_table, write_table
from pipelines.tracking import ModelRef, Registered, Run

CHAMPION = "champion"
CONFIDENCE = 0.95  # of the intervals on the leaderboard
_SLICE = "slice_"
_HISTOGRAM_OF = {  # by kind of label: what the scores are compared with, and its two kinds of rows
    "binary": ("share of class 1", ("class 0", "class 1")),
    "multiclass": ("share right", ("predicted wrongly", "predicted rightly")),
    "multilabel": ("share with the class", ("without the class", "with the class")),
}


def build(given: Given) -> Made:
    """Score the candidates, and the champion beside them, on validation and test; measure; judge.

    Raises:
        DataError: A candidate's rows are not those of the Snapshots.
    """
    config = given.config
    spark = get_session(config)
    features = given.inputs["features"].result
    snapshots = {split: Snapshot.model_validate(value) for split, value in features["snapshots"].items()}
    spec = FittedFeatures.model_validate(features["fitted"]).label.spec
    refs = _candidates(given)
    champion = _comparable(config.workload, spec)
    scored, speeds, of_clusters, ranking = _score_all(spark, given, refs, champion, spec)
    others = ranking.metrics if ranking else of_clusters
    splits = [split for split in ("validation", "test") if split in snapshots]
    with spark_progress(spark, "evaluate: metrics"):
        measured = {
            key: replace(seen, metrics=seen.metrics | others.get(key, {}))
            for key, seen in measure(scored, spec).items()
        }
        _check_rows(measured, snapshots)
        chosen = _choose(refs, measured, config)
        test = scored.where(F.col("split") == "test")
        models = [ref.name for ref in refs] + ([CHAMPION] if champion else [])
        by_user = ranking and ranking.user_values(models, config.gate_metric)
        values = by_user or row_values(test, spec, models, config.gate_metric)
        drawn = resample(config.gate_metric, *values, seed=config.seed)
        difference = _difference(drawn, chosen, config)
        slices = by_slice(test.where(F.col("candidate") == chosen), spec, [_SLICE + c for c in config.gate.slices])
        verdict = judge(config.gate, chosen, measured[chosen, "test"].metrics, difference)
        candidates = [_entry(ref, measured, drawn, speeds[ref.name]) for ref in refs]
        _keep_metrics(given.run, measured, speeds)
        given.run.figure("leaderboard.png", plots.leaderboard(candidates, config.gate_metric, chosen))
        _plot(given.run, test, chosen, spec)
    against = None if champion is None else _against(champion, measured, difference)
    path = table_path(config.workload, "evaluated")
    result: dict[str, Any] = {
        "candidates": candidates,
        "baselines": ranking.baselines() if ranking else [],
        "champion": chosen,
        "verdict": verdict.model_dump(mode="json"),
        "against": against,
        "metric": config.gate_metric,
        "rows": {split: snapshots[split].rows for split in splits},
        "row_digest": snapshots["test"].row_digest,
        "slices": [{**s, "column": s["column"].removeprefix(_SLICE)} for s in slices],
        "model": next(ref for ref in refs if ref.name == chosen).model_dump(mode="json"),
        "table": str(path),
    }
    board = leaderboard_table(result)
    given.run.json("slices.json", result["slices"])
    given.run.json("verdict.json", result["verdict"])
    given.run.note(f"```\n{board}\n```")
    return Made(
        rows=sum(result["rows"].values()),
        result=result,
        outputs=[str(path), *([ranking.path] if ranking else [])],
        lines=[*board.splitlines(), _spoken(verdict)],
    )


def _candidates(given: Given) -> list[ModelRef]:
    classic = given.inputs["classic"].result["models"] if "classic" in given.inputs else []
    torch = [given.inputs["train"].result["model"]] if "train" in given.inputs else []
    return [ModelRef.model_validate(value) for value in [*classic, *torch]]


def _comparable(workload: str, spec: LabelSpec) -> Registered | None:
    """The champion, if there is one that predicts the same classes."""
    champion = tracking.champion(workload)
    if champion is None:
        return None
    with loaded(champion.ref, scratch_path(workload)) as model:
        other = model.bundle.contract.label
    return champion if (other.kind, other.classes) == (spec.kind, spec.classes) else None


def _score_all(
    spark: SparkSession, given: Given, refs: list[ModelRef], champion: Registered | None, spec: LabelSpec
) -> tuple[DataFrame, dict[str, float], dict[tuple[str, str], Metrics], Ranking | None]:
    """One table of every model's predictions on validation and test rows, written and read back; rows scored a second;
    metrics of clusterers by (candidate, split), which want the features; and what users are recommended, where the
    config has the section.
    """
    config = given.config
    raw = read_table(spark, Snapshot.model_validate(given.inputs["ingest"].result["snapshot"]))
    rows = with_split(raw, config).where(F.col("_split").isin("validation", "test"))
    fitted = FittedFeatures.model_validate(given.inputs["features"].result["fitted"])
    rows = with_label(rows, fitted.label)
    slices = {_SLICE + name: F.col(name).cast("string") for name in config.gate.slices}
    rows = rows.withColumns(slices) if slices else rows
    keep = ["row_id", "_split", "label", *slices]
    wanted = {ref.name: ref for ref in refs} | ({CHAMPION: champion.ref} if champion else {})
    path = table_path(config.workload, "evaluated")
    parts, features = [], dict[str, DataFrame]()  # by the digest of the transform, which candidates share
    models = dict[str, Loaded]()
    with ExitStack() as until_written:
        for name, ref in wanted.items():
            model = models[name] = until_written.enter_context(loaded(ref, scratch_path(config.workload)))
            its = model.bundle.fitted
            if its.digest not in features:
                features[its.digest] = until_written.enter_context(kept(transform(rows, its, keep=keep)))
            part = predict(features[its.digest], model, keep=keep).withColumnRenamed("_split", "split")
            parts.append(part.withColumn("candidate", F.lit(name)))
        snapshot = write_table(reduce(DataFrame.unionByName, parts), path, what="evaluate: score")
        num_rows = snapshot.rows // len(models)
        speeds = {
            name: measure_speed(features[model.bundle.fitted.digest], model, num_rows=num_rows)
            for name, model in models.items()
            if name != CHAMPION
        }
        of_clusters = {
            (name, split): metrics
            for name, model in models.items()
            if spec.kind == "none"
            for split, metrics in _measure_clusters(features[model.bundle.fitted.digest], model).items()
        }
        ranking = rank_all(with_split(raw, config), models, fitted, config) if config.recommend else None
    return read_table(spark, snapshot), speeds, of_clusters, ranking


def _measure_clusters(features: DataFrame, model: Loaded) -> dict[str, Metrics]:
    """Metrics of a clusterer by split."""
    measured = {}
    for (split,) in features.select("_split").distinct().collect():
        rows = features.where(F.col("_split") == split)
        rows = assemble(rows, model.bundle.contract, estimator=model.bundle.name, keep=[])
        measured[split] = measure_clusters(model.pipeline.stages[-1], rows)
    return measured


def _check_rows(measured: dict[tuple[str, str], Measured], snapshots: dict[str, Snapshot]) -> None:
    for (name, split), seen in measured.items():
        wanted = snapshots[split]
        if (seen.rows, seen.row_id_sum) != (wanted.rows, wanted.row_id_sum):
            raise DataError(
                f"evaluate: {name} on {split}: wanted the {wanted.rows:,} rows of the Snapshot (digest "
                f"{wanted.row_digest}), seen {seen.rows:,} ({seen.row_id_sum:016x}); run features again"
            )


def _choose(refs: list[ModelRef], measured: dict[tuple[str, str], Measured], config: Config) -> str:
    """The candidate that is best on validation; the only one where there is one."""
    if len(refs) == 1:
        return refs[0].name
    metric = config.gate_metric
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    values = {ref.name: measured[ref.name, "validation"].metrics.get(metric) for ref in refs}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        raise DataError(f"gate.metric: wanted {metric} of some candidate on validation, seen none")
    return max(known, key=lambda name: sign * known[name])


def _difference(drawn: Resampled, chosen: str, config: Config) -> Difference | None:
    """Against the champion; None where there is none, or one of the two lacks the metric."""
    if not {chosen, CHAMPION} <= drawn.values.keys():
        return None
    return drawn.difference(chosen, CHAMPION, confidence=config.gate.champion_confidence)


def _entry(
    ref: ModelRef, measured: dict[tuple[str, str], Measured], drawn: Resampled, rows_per_s: float
) -> dict[str, Any]:
    validation = measured.get((ref.name, "validation"))
    interval = drawn.interval(ref.name, confidence=CONFIDENCE) if ref.name in drawn.values else None
    return {
        "name": ref.name,
        "kind": ref.kind,
        "metrics": measured[ref.name, "test"].metrics,
        "interval": interval.model_dump(mode="json") if interval else None,
        "validation": validation.metrics if validation else {},
        "rows": measured[ref.name, "test"].rows,
        "fit_seconds": ref.fit_seconds,
        "size_bytes": ref.size_bytes,
        "rows_per_s": round(rows_per_s),
        "uri": ref.uri,
    }


def _against(
    champion: Registered, measured: dict[tuple[str, str], Measured], difference: Difference | None
) -> dict[str, object]:
    return {
        "version": champion.version,
        "name": champion.ref.name,
        "metrics": measured[CHAMPION, "test"].metrics,
        "difference": difference.model_dump(mode="json") if difference else None,
    }


def _spoken(verdict: Verdict) -> str:
    if verdict.passed:
        return f"the gate passed {verdict.candidate} ({len(verdict.checks)} checks)"
    return f"the gate refused {verdict.candidate}: {verdict.reasons()}"


def _keep_metrics(run: Run, measured: dict[tuple[str, str], Measured], speeds: dict[str, float]) -> None:
    for (name, split), seen in measured.items():
        run.metrics({f"{split}/{name}/{metric}": value for metric, value in seen.metrics.items()})
    run.metrics({f"scoring/{name}/rows_per_s": speed for name, speed in speeds.items()})


def _plot(run: Run, test: DataFrame, chosen: str, spec: LabelSpec) -> None:
    """Keep plots of the test split in the MLflow run."""
    if spec.kind == "none":  # the run of `classic` has those of its clusters
        return
    best = test.where(F.col("candidate") == chosen)
    if spec.kind == "next_token":
        (losses,) = sampled(best, ["score"])
        run.figure("losses.png", plots.losses(losses, chosen))
        return
    if spec.is_number:
        if spec.event:  # of rows whose time is known
            best = best.where(F.get("label", 1) == 1).withColumn("label", F.get("label", 0))
        label, prediction = sampled(best.where("prediction IS NOT NULL"), ["label", "prediction"])
        if len(label):
            run.figure("predicted.png", plots.predicted_against_true(label, prediction, chosen))
        return
    if spec.kind != "multilabel":
        run.figure("confusion.png", plots.confusion_matrix(confusion(best, spec), spec.classes, chosen))
    found = histograms(test.where(F.col("candidate") != CHAMPION), spec)
    share, names = _HISTOGRAM_OF[spec.kind]
    if found:
        run.figure("calibration.png", plots.calibration(found, share))
    if chosen not in found:  # it has neither probabilities nor margins
        return
    run.figure("scores.png", plots.score_distribution(found[chosen], names, chosen))
    if spec.kind == "binary":
        run.figure("roc.png", plots.roc(found))
        run.figure("ks.png", plots.kolmogorov_smirnov(found[chosen], chosen))
