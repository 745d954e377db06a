"""What Spark did in a run, from its event log: stages, bytes read and shuffled, spills, collection of garbage, skew.

The log is a JSON object a line (https://spark.apache.org/docs/latest/monitoring.html); Spark's own history server
reads it as well.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import LakeError
from pipelines.lake import events_path

_READ = (
    "SparkListenerApplicationStart",
    "SparkListenerJobStart",
    "SparkListenerStageCompleted",
    "SparkListenerTaskEnd",
)
_KINDS = tuple(f'{{"Event":"{name}"' for name in _READ)
_SKEWED, _SPILLS, _COLLECTS, _LONG_S = 3.0, 1 << 20, 0.2, 1.0


class StageProfile(BaseModel):
    """A stage of Spark, its failed tasks among its tasks.

    Attributes:
        what: What its job is for, or the call that started it.
        wall_s: From its submission to its end.
        task_s: Seconds of all tasks together.
        spill_bytes: What did not fit in memory, as it lay there and as it was written to disk.
        gc_share: Of the tasks' time.
        skew: The longest task over the median task.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    what: str
    tasks: int
    failed_tasks: int
    wall_s: float
    task_s: float
    input_bytes: int
    shuffle_read_bytes: int
    shuffle_write_bytes: int
    output_bytes: int
    spill_bytes: tuple[int, int]
    gc_share: float
    skew: float
    longest_task_s: float

    @property
    def troubles(self) -> list[str]:
        """What is worth a look, each with what may help."""
        found = []
        if self.skew >= _SKEWED and self.longest_task_s >= _LONG_S:
            found.append(
                f"one task took {self.longest_task_s:.1f} s, {self.skew:.1f} times the median: a frequent key, or files "
                "of unlike sizes"
            )
        if self.spill_bytes[1] >= _SPILLS:
            found.append(
                f"spilled {_size(self.spill_bytes[1])} to disk: raise spark.driver.memory or executors' memory"
            )
        if self.gc_share >= _COLLECTS and self.task_s >= _LONG_S:
            found.append(f"{self.gc_share:.0%} of its time went to garbage collection: raise the memory")
        if self.failed_tasks:
            found.append(f"{self.failed_tasks} tasks failed and ran again")
        return found


class Profile(BaseModel):
    """The stages of an application, in the order in which they ended."""

    model_config = ConfigDict(frozen=True)

    log: str
    application: str
    stages: tuple[StageProfile, ...]


def latest_log(workload: str) -> Path:
    """The newest event log of the workload's stages.

    Raises:
        LakeError: There is none.
    """
    folder = events_path(workload)
    logs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    if not logs:
        raise LakeError(
            f"{folder}: wanted an event log of Spark, seen none; run a stage first: make features W={workload}"
        )
    return logs[-1]


def read_profile(log: Path) -> Profile:
    """The profile of an application, also of one that still runs or was killed.

    Raises:
        LakeError: The file is not an event log in plain JSON lines.
    """
    application, jobs, tasks, ended = "", dict[int, str](), dict[tuple[int, int], list[Mapping[str, Any]]](), []
    for event in _events(log):
        match event["Event"]:
            case "SparkListenerApplicationStart":
                application = event["App Name"]
            case "SparkListenerJobStart":
                what = event.get("Properties", {}).get("spark.job.description", "")
                jobs |= {stage: what for stage in event["Stage IDs"] if stage not in jobs}
            case "SparkListenerTaskEnd":
                tasks.setdefault((event["Stage ID"], event["Stage Attempt ID"]), []).append(event)
            case "SparkListenerStageCompleted":
                ended.append(event["Stage Info"])
    if not application:
        raise LakeError(f"{log}: wanted an event log of Spark in plain JSON lines, seen another file")
    stages = [
        _stage(info, jobs.get(info["Stage ID"], ""), tasks.get((info["Stage ID"], info["Stage Attempt ID"]), []))
        for info in ended
    ]
    return Profile(log=str(log), application=application, stages=tuple(stages))


def _events(log: Path) -> Iterable[dict[str, Any]]:
    """The events that count; a last line that is not whole yet is left out."""
    try:
        with log.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.startswith(_KINDS) and line.endswith("}\n"))
    except (OSError, ValueError) as error:
        raise LakeError(f"{log}: wanted an event log of Spark in plain JSON lines: {error}") from None


def _stage(info: Mapping[str, Any], what: str, tasks: list[Mapping[str, Any]]) -> StageProfile:
    metrics: list[Mapping[str, Any]] = [task["Task Metrics"] for task in tasks if task.get("Task Metrics")]
    seconds = [(task["Task Info"]["Finish Time"] - task["Task Info"]["Launch Time"]) / 1e3 for task in tasks] or [0.0]

    def total(*keys: str) -> int:
        return sum(int(_at(m, keys)) for m in metrics)

    return StageProfile(
        stage=info["Stage ID"],
        what=_purpose(what) or _call(info["Stage Name"]),
        tasks=len(tasks),
        failed_tasks=sum(task["Task Info"]["Failed"] for task in tasks),
        wall_s=(info.get("Completion Time", 0) - info.get("Submission Time", 0)) / 1e3,
        task_s=sum(seconds),
        input_bytes=total("Input Metrics", "Bytes Read"),
        shuffle_read_bytes=total("Shuffle Read Metrics", "Remote Bytes Read")
        + total("Shuffle Read Metrics", "Local Bytes Read"),
        shuffle_write_bytes=total("Shuffle Write Metrics", "Shuffle Bytes Written"),
        output_bytes=total("Output Metrics", "Bytes Written"),
        spill_bytes=(total("Memory Bytes Spilled"), total("Disk Bytes Spilled")),
        gc_share=total("JVM GC Time") / 1e3 / max(sum(seconds), 1e-3),
        skew=max(seconds) / max(median(seconds), 1e-3),
        longest_task_s=max(seconds),
    )


def _at(metrics: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        metrics = metrics.get(key, {})
    return metrics or 0


def _purpose(description: str) -> str:
    """A job's description; what Delta puts around it where it reads its log becomes a note."""
    bare = description
    while bare.startswith("Delta: "):
        bare = bare.removeprefix("Delta: ")
    if bare == description:
        return description
    return bare.partition(": Filtering files")[0].partition(": Compute snapshot")[0] + " (Delta's log)"


def _call(name: str) -> str:
    """`collect at /long/path/pipelines/metrics.py:75` without the path's beginning."""
    call, _, place = name.partition(" at ")
    return f"{call} at {place[place.find('pipelines/') :] if 'pipelines/' in place else place.rpartition('/')[2]}"


def as_text(profile: Profile) -> str:
    """A line a stage, the totals, and what is worth a look."""
    lines = [
        f"{profile.application}: {profile.log}",
        "",
        "stage  tasks  wall s  task s     input  shuffle in  shuffle out     spill   gc  skew  what",
    ]
    for s in profile.stages:
        lines.append(
            f"{s.stage:>5} {s.tasks:>6} {s.wall_s:>7.1f} {s.task_s:>7.1f} {_size(s.input_bytes):>9} "
            f"{_size(s.shuffle_read_bytes):>11} {_size(s.shuffle_write_bytes):>12} {_size(s.spill_bytes[1]):>9} "
            f"{s.gc_share:>4.0%} {s.skew:>5.1f}  {s.what}"
        )
    stages = profile.stages
    lines += [
        "",
        f"{len(stages)} stages, {sum(s.tasks for s in stages):,} tasks of {sum(s.task_s for s in stages):,.1f} s together; "
        f"{_size(sum(s.input_bytes for s in stages))} read, {_size(sum(s.shuffle_write_bytes for s in stages))} shuffled, "
        f"{_size(sum(s.spill_bytes[1] for s in stages))} spilled",
    ]
    if stages:
        longest = max(stages, key=lambda stage: stage.wall_s)
        lines.append(f"longest        stage {longest.stage}, {longest.what}: {longest.wall_s:.1f} s")
    lines += [f"look at        stage {s.stage}, {s.what}: {trouble}" for s in stages for trouble in s.troubles]
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
