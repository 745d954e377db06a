"""What the features stage says of the tables that it wrote: how well they are shuffled, and whether the split leaks."""

import re
from collections.abc import Mapping, Sequence

from pipelines.features.leaks import find_leaks
from pipelines.features.sample import take_sample
from pipelines.features.shuffle import shuffle_quality
from pipelines.lake import LabelSpec, Snapshot
from pipelines.session import get_session, spark_progress
from pipelines.stage import Given, Made


def inspect_tables(
    given: Given, snapshots: Mapping[str, Snapshot], label: LabelSpec, *, warnings: Sequence[str] = ()
) -> Made:
    """Look at the feature table of each split; figures go to MLflow, warnings to its tag `headrace.warnings` as well.

    Args:
        given: What the stage works from.
        snapshots: The feature table of each split.
        label: What it means.
        warnings: Those that the stage has already.

    Returns:
        What the stage's own result and lines take in.

    Raises:
        DataError: The split leaks, and `split.leaks` says that this fails.
    """
    samples = {split: take_sample(snapshot) for split, snapshot in snapshots.items()}
    shuffled = {split: shuffle_quality(sample) for split, sample in samples.items()}
    spark = get_session(given.config)
    with spark_progress(spark, "features: leaks"):
        leaks = find_leaks(spark, snapshots, samples["train"], label, given.config)
    clumped = [f"warning: {split} is not well shuffled: {q}" for split, q in shuffled.items() if not q.is_shuffled]
    warnings = [*warnings, *clumped, *leaks.warnings]
    for split, quality in shuffled.items():
        figures = {"label_run_length": quality.label_run_length, "neighbour_correlation": quality.neighbour_correlation}
        given.run.metrics({f"shuffle/{split}/{name}": value for name, value in figures.items() if value is not None})
    given.run.metrics({f"leaks/duplicates/{split}": num for split, num in leaks.duplicates.items()})
    named = {re.sub(r"[^\w. :/-]", "_", name)[:200]: value for name, value in leaks.telling.items()}
    given.run.metrics({f"leaks/feature/{name}": value for name, value in named.items()})
    if warnings:
        given.run.tags({"headrace.warnings": "\n".join(warnings)})
    return Made(
        rows=sum(quality.rows for quality in shuffled.values()),
        result={
            "shuffle": {split: quality.model_dump(mode="json") for split, quality in shuffled.items()},
            "leaks": {"duplicates": dict(leaks.duplicates), "features": dict(leaks.telling)},
        },
        lines=[f"shuffle of train: {shuffled['train']}", *warnings],
    )
