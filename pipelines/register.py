"""Register: give the candidate that the gate passed a version and the alias `champion`; or move the alias back."""

import json

from pipelines import __version__, tracking
from pipelines.errors import LakeError, Refused
from pipelines.features.fitted import BUNDLE_FILE
from pipelines.gate import Verdict
from pipelines.lake import Snapshot
from pipelines.leaderboard import table as leaderboard_table
from pipelines.stage import Given, Made
from pipelines.tracking import ModelRef

ALIAS = "champion"
_TAG_CHARACTERS = 90_000  # MLflow takes 100,000


def build(given: Given) -> Made:
    """Register the evaluation's candidate as champion.

    A candidate that has a version already gets no second one, and an alias that was moved away from it (a
    rollback) is left where it is.

    Raises:
        Refused: The gate refused the candidate; nothing is registered.
    """
    workload, evaluation = given.config.workload, given.inputs["evaluate"]
    verdict = Verdict.model_validate(evaluation.result["verdict"])
    if not verdict.passed:
        raise Refused(f"the gate refused {verdict.candidate}: {verdict.reasons()}; nothing was registered")
    ref = ModelRef.model_validate(evaluation.result["model"])
    known = next((v for v in tracking.versions(workload) if v.ref.uri == ref.uri), None)
    now = tracking.champion(workload, alias=ALIAS)
    if known is not None and now is not None:
        line = f"{ref.name} is version {known.version}, the champion"
        if now.version != known.version:
            line = (
                f"version {now.version} stays champion: {ref.name} is version {known.version}, and the alias was moved"
            )
        return _made(given, now.version, now.ref, line)
    if known is not None:
        tracking.move_alias(workload, known.version, alias=ALIAS)
        return _made(given, known.version, ref, f"version {known.version} is champion again")
    version = tracking.register(
        workload,
        ref,
        evaluation.run_id,
        alias=ALIAS,
        evaluation=evaluation.digest,
        tags=_tags(given, ref, verdict),
        note=f"{ref.name}, passed by the gate\n```\n{leaderboard_table(evaluation.result)}\n```",
    )
    return _made(given, version, ref, f"{ref.name} is now version {version}, the champion")


def _made(given: Given, version: int, ref: ModelRef, line: str) -> Made:
    result = {"version": version, "alias": ALIAS, "model": ref.name, "uri": ref.uri}
    return Made(rows=given.inputs["evaluate"].result["rows"]["test"], result=result, lines=[line])


def _tags(given: Given, ref: ModelRef, verdict: Verdict) -> dict[str, str]:
    """What a version carries: data, code, transform and verdict."""
    features = given.inputs["features"].result
    snapshot = Snapshot.model_validate(features["snapshots"]["train"])
    fitted = json.dumps(features["fitted"], separators=(",", ":"))
    if len(fitted) > _TAG_CHARACTERS:
        fitted = json.dumps({"digest": ref.features, "file": BUNDLE_FILE})  # which lies beside the model
    return {
        "headrace.delta_path": snapshot.table,
        "headrace.delta_version": str(snapshot.version),
        "headrace.file_digest": snapshot.digest,
        "headrace.row_digest": snapshot.row_digest,
        "headrace.code_version": __version__,
        "headrace.features": fitted,
        "headrace.verdict": verdict.model_dump_json(),
    }


def rollback(workload: str, *, to: int | None = None) -> tuple[int, int]:
    """Move the champion alias back. Returns the versions before and now.

    Args:
        workload: Whose registered model.
        to: The version; None for the one before the champion.

    Raises:
        LakeError: There is no champion, or no such version.
    """
    now = tracking.champion(workload, alias=ALIAS)
    if now is None:
        raise LakeError(f"rollback: {workload} has no champion; run `make run W={workload}` first")
    known = sorted(version.version for version in tracking.versions(workload))
    earlier = [version for version in known if version < now.version]
    target = to if to is not None else (earlier[-1] if earlier else None)
    if target is None or target not in known:
        wanted = "an earlier version" if to is None else f"version {to}"
        raise LakeError(f"rollback: wanted {wanted} of {workload}, seen versions {', '.join(map(str, known))}")
    tracking.move_alias(workload, target, alias=ALIAS)
    return now.version, target
