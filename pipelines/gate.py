"""The gate: whether a candidate may become champion. Pure: metrics in, Verdict out."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from pipelines.bootstrap import Difference
from pipelines.config.workload import Gate


class Check(BaseModel):
    """One rule of the gate with the wanted and the seen value."""

    model_config = ConfigDict(frozen=True)

    rule: str
    wanted: str
    seen: str
    passed: bool


class Verdict(BaseModel):
    """Passed or refused, and by which checks."""

    model_config = ConfigDict(frozen=True)

    candidate: str
    passed: bool
    checks: list[Check]

    def reasons(self) -> str:
        """The failed checks in one line."""
        return "; ".join(f"{c.rule}: wanted {c.wanted}, seen {c.seen}" for c in self.checks if not c.passed)


def judge(gate: Gate, candidate: str, metrics: Mapping[str, float], difference: Difference | None) -> Verdict:
    """Judge a candidate's test metrics.

    Args:
        gate: The config's bounds.
        candidate: Its name.
        metrics: Its metrics on the test split.
        difference: Against the champion; None where there is none to compare with.
    """
    checks = []
    for metric, bounds in gate.require.items():
        seen = metrics.get(metric)
        if bounds.min is not None:
            passed = seen is not None and seen >= bounds.min
            checks.append(Check(rule=metric, wanted=f">= {bounds.min:g}", seen=_shown(seen), passed=passed))
        if bounds.max is not None:
            passed = seen is not None and seen <= bounds.max
            checks.append(Check(rule=metric, wanted=f"<= {bounds.max:g}", seen=_shown(seen), passed=passed))
    if difference is not None:
        seen_text = (
            f"{difference.mean:+.5f} ({difference.low:+.5f} to {difference.high:+.5f} at {difference.confidence:.0%})"
        )
        rule = f"{difference.metric} against the champion"
        checks.append(Check(rule=rule, wanted="not worse", seen=seen_text, passed=difference.high >= 0))
    return Verdict(candidate=candidate, passed=all(check.passed for check in checks), checks=checks)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.5f}"
