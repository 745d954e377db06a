"""The section of what raw rows and the raw table must satisfy."""

import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipelines.config.base import Name, Section, as_list, known_name

NUMBERS = ("int", "bigint", "float", "double")
TIMES = ("date", "timestamp")
VALUES = ("int", "bigint", "string", "boolean", "date")
COMPARED = (*VALUES, "timestamp")
OnViolation = Literal["reject", "count", "fail"]
Columns = Annotated[list[Name], BeforeValidator(as_list), Field(min_length=1)]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"wanted a regular expression, seen {pattern!r}: {error}") from None
    return pattern


class Range(Section):
    """Numbers, dates or timestamps between two bounds, both within."""

    columns: Columns = Field(description="One or several.")
    min: int | float | date | datetime | None = Field(default=None, description="Refused below.")
    max: int | float | date | datetime | None = Field(default=None, description="Refused above.")

    @model_validator(mode="after")
    def _bounds(self) -> "Range":
        if self.min is None and self.max is None:
            raise ValueError("wanted min, max or both, seen neither")
        return self


class ValueSet(Section):
    """One of some values."""

    columns: Columns = Field(description="One or several.")
    values: Annotated[list[bool | int | str | date], Field(min_length=1)] = Field(description="All that are allowed.")


class Regex(Section):
    """Text that a regular expression describes from its first to its last character."""

    columns: Columns = Field(description="One or several.")
    pattern: Annotated[str, AfterValidator(_compiles)] = Field(description="A regular expression, as Java reads it.")


class Reference(Section):
    """Values that a column of another table holds."""

    columns: Columns = Field(description="One or several.")
    table: str = Field(description="The other table: a folder, a file or a glob.")
    format: Literal["delta", "parquet", "csv"] = Field(default="delta", description="Its format; csv with a header.")
    key: Name = Field(description="Its column.")


class Freshness(Section):
    """The newest value is recent."""

    column: Name = Field(description="A date or a timestamp.")
    max_hours: Annotated[float, Field(gt=0)] = Field(description="Its greatest age; a date begins at 0:00 UTC.")

    def allows(self, newest: float | None, *, now: float) -> bool:
        """Whether the newest value is recent enough; both in seconds since 1970."""
        return newest is not None and now - newest <= self.max_hours * 3600


class RowCount(Section):
    """As many rows as the version before, within two ratios."""

    min_ratio: Annotated[float, Field(ge=0)] | None = Field(default=None, description="Refused below.")
    max_ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Refused above.")

    @model_validator(mode="after")
    def _bounds(self) -> "RowCount":
        if self.min_ratio is None and self.max_ratio is None:
            raise ValueError("wanted min_ratio, max_ratio or both, seen neither")
        return self


class Check(Section):
    """A constraint, named by the one key that is set beside `on_violation`.

    Constraints of a row let a missing value pass, but for `not_null`.
    """

    not_null: Columns | None = Field(default=None, description="No missing values.")
    range: Range | None = Field(default=None, description="Between two bounds.")
    set: ValueSet | None = Field(default=None, description="One of some values.")
    regex: Regex | None = Field(default=None, description="Text of a form.")
    reference: Reference | None = Field(default=None, description="Values that another table holds.")
    unique: Columns | None = Field(default=None, description="No two rows of the table alike in these columns.")
    freshness: Freshness | None = Field(default=None, description="The newest value is recent.")
    row_count: RowCount | None = Field(default=None, description="As many rows as before.")
    on_violation: OnViolation | None = Field(
        default=None,
        description="What a violation does: `reject` puts the row into the reject table, `count` keeps it, `fail` fails "
        "the stage, and the last version stays. Default: `reject` for a row's constraint, `fail` for one of the whole "
        "table (unique, freshness, row_count), which cannot reject.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Check":
        kinds = [name for name in CHECKED if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"wanted one of {', '.join(CHECKED)}, seen {', '.join(kinds) or 'none'}")
        if kinds[0] in OF_THE_TABLE and self.on_violation == "reject":
            raise ValueError(f"on_violation: {kinds[0]} is a property of the table: wanted count or fail, seen reject")
        return self

    @property
    def kind(self) -> str:
        """The key that is set."""
        return next(name for name in CHECKED if getattr(self, name) is not None)

    @property
    def consequence(self) -> OnViolation:
        """What a violation does."""
        return self.on_violation or ("fail" if self.kind in OF_THE_TABLE else "reject")

    @property
    def columns(self) -> list[str]:
        """The columns that it is about."""
        options = getattr(self, self.kind)
        if isinstance(options, RowCount):
            return []
        if isinstance(options, Freshness):
            return [options.column]
        return list(options) if isinstance(options, list) else list(options.columns)

    @property
    def names(self) -> list[str]:
        """The name of each constraint: one a column, but one over all columns for `unique`."""
        if self.kind in ("unique", "row_count"):
            return [".".join([self.kind, *self.columns])]
        return [f"{self.kind}.{column}" for column in self.columns]


OF_THE_TABLE = ("unique", "freshness", "row_count")
CHECKED = ("not_null", "range", "set", "regex", "reference", *OF_THE_TABLE)
_TYPES: dict[str, tuple[str, ...]] = {
    "range": (*NUMBERS, *TIMES),
    "set": VALUES,
    "regex": ("string",),
    "reference": VALUES,
    "unique": COMPARED,
    "freshness": TIMES,
}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bigint": (int,),
    "string": (str,),
    "boolean": (bool,),
    "date": (date,),
    "timestamp": (date, datetime),
}


def check_columns(checks: list[Check], columns: Mapping[str, str]) -> None:
    """Refuse a constraint on a column that is not there, or whose type or values do not fit it.

    Raises:
        ValueError: With the place of the constraint in `checks`.
    """
    seen: dict[str, int] = {}
    for place, check in enumerate(checks):
        where = f"checks.{place}.{check.kind}"
        for column in check.columns:
            known_name(f"{where}: a column of the schema", column, list(columns))
            wanted = _TYPES.get(check.kind)
            if wanted and columns[column] not in wanted:
                raise ValueError(
                    f"{where}: column {column!r}: wanted type {' or '.join(wanted)}, seen {columns[column]}"
                )
            _check_values(f"{where}: column {column!r}", check, columns[column])
        for name in check.names:
            if name in seen:
                raise ValueError(f"{where}: wanted each constraint once, seen {name} in checks.{seen[name]} as well")
            seen[name] = place


def _check_values(where: str, check: Check, dtype: str) -> None:
    values: list[Any] = list(check.set.values) if check.set else []
    if check.range:
        values = [bound for bound in (check.range.min, check.range.max) if bound is not None]
    wanted = (int, float) if dtype in NUMBERS and check.range else _PYTHON_TYPES.get(dtype, ())
    for value in values:
        if not isinstance(value, wanted) or isinstance(value, bool) != (dtype == "boolean"):
            raise ValueError(f"{where}: wanted values of type {dtype}, seen {value!r}")
    if check.range and len(values) == 2 and sorted(values, key=str if dtype in TIMES else None)[0] != values[0]:
        raise ValueError(f"{where}: wanted min at most max, seen {values[0]} and {values[1]}")
