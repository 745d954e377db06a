"""The sections that say which rows train, validate and test."""

from datetime import date, datetime, timezone
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pipelines.config.base import Name, Natural, Positive, Section, Share, known_name


def _adding_up(shares: dict[str, float]) -> dict[str, float]:
    if abs(sum(shares.values()) - 1.0) > 1e-9:
        raise ValueError(f"wanted shares that add up to 1, seen {sum(shares.values()):g}")
    return shares


Shares = Annotated[dict[Name, Share], AfterValidator(_adding_up)]


class HashSplit(Section):
    """Splits by a hash of an entity, so that they stay stable when rows arrive."""

    by: list[Name] = Field(default=[], description="Columns of the entity. Empty: the row's key.")
    shares: Shares = Field(default={"train": 0.8, "test": 0.2}, description="The share of each split; together 1.")


class PositionSplit(Section):
    """Splits by the place of a row in its file, for rows whose order matters, as that of a text does."""

    shares: Shares = Field(
        default={"train": 0.9, "validation": 0.05, "test": 0.05},
        description="The share of each file that a split takes, from its first row to its last; together 1.",
    )


def _no_number(value: Any) -> Any:
    """Refuses what would be read as seconds since 1970."""
    if isinstance(value, int | float):
        raise ValueError(f"wanted a date or a time such as 2024-06-01, seen {value!r}")
    return value


Moment = Annotated[date | datetime, BeforeValidator(_no_number)]


def utc(moment: date | datetime) -> datetime:
    """A moment in UTC; a date is its midnight, and a time without a zone is UTC already."""
    if not isinstance(moment, datetime):
        return datetime(moment.year, moment.month, moment.day, tzinfo=timezone.utc)
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


class TimeSplit(Section):
    """Splits by time: what comes before the first boundary trains. Fixed moments, so that no row moves when rows arrive."""

    column: Name = Field(description="A date or timestamp column; in UTC.")
    boundaries: dict[Name, Moment] = Field(
        description="The moment from which on rows belong to a split, in rising order; rows before the first are `train`."
    )

    @field_validator("boundaries")
    @classmethod
    def _rising(cls, boundaries: dict[str, date | datetime]) -> dict[str, date | datetime]:
        starts = [utc(moment) for moment in boundaries.values()]
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"wanted moments that rise, seen {', '.join(map(str, boundaries.values()))}")
        if "train" in boundaries:
            raise ValueError("wanted no boundary for train: it is what comes before the first one")
        return boundaries

    @property
    def names(self) -> list[str]:
        """The splits, in the order of time."""
        return ["train", *self.boundaries]


class LastSplit(Section):
    """Leaves out the last rows of each entity, as of each user what was chosen last. They move when rows arrive."""

    by: Name = Field(description="The column of the entity. Rows without one train.")
    order: Name = Field(description="The column by which rows follow each other; ties by the row's key.")
    test: Positive = Field(default=1, description="How many rows of an entity test, the last ones.")
    validation: Natural = Field(default=1, description="How many in front of these validate.")

    @property
    def names(self) -> list[str]:
        """The splits."""
        return ["train", "test", *(["validation"] if self.validation else [])]


class Validation(Section):
    """A validation split cut from another split, by a hash of the key (or of the entity)."""

    source: Name = Field(default="train", alias="from", description="The split that it is cut from.")
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.1, description="The share that it takes.")


Outcome = Literal["fail", "warn", "off"]


class Leaks(Section):
    """What happens when a split lets a model see its answers."""

    entities: Outcome = Field(default="fail", description="An entity (`split.entity`) stands in two splits.")
    duplicates: Outcome = Field(
        default="warn", description="A row outside train equals one inside it in every feature and in the label."
    )
    label: Outcome = Field(
        default="warn",
        description="A single feature tells the label: AUC (binary; multilabel: of a class), balanced accuracy (multiclass) "
        "or rank correlation (real, count, survival) above 0.99.",
    )


class Split(Section):
    """Which rows train, validate and test."""

    given: list[Name] | None = Field(default=None, description="Take the splits from the names in `source.paths`.")
    by_hash: HashSplit | None = Field(default=None, alias="hash", description="Cut the splits by a hash.")
    by_time: TimeSplit | None = Field(default=None, alias="time", description="Cut the splits at moments in time.")
    by_last: LastSplit | None = Field(default=None, alias="last", description="Leave out the last rows of each entity.")
    by_position: PositionSplit | None = Field(
        default=None, alias="position", description="Cut each file, from its first row to its last."
    )
    validation: Validation | None = Field(default=None, description="Cut a validation split from another one.")
    entity: list[Name] = Field(
        default=[],
        description="With `given` or `time`: columns of what must not stand in two splits, such as a customer. "
        "With `hash` its `by` names them.",
    )
    leaks: Leaks = Field(default=Leaks(), description="What happens when a split leaks.")

    @model_validator(mode="after")
    def _one_way(self) -> "Split":
        ways = {
            "given": self.given,
            "hash": self.by_hash,
            "time": self.by_time,
            "last": self.by_last,
            "position": self.by_position,
        }
        if len(seen := [name for name, way in ways.items() if way]) > 1:
            raise ValueError(f"wanted one of {', '.join(ways)}, seen {' and '.join(seen)}")
        if self.entity and self.by_last:
            raise ValueError("entity: wanted none with 'last', by which each entity stands in every split")
        if self.entity and self.by_position:
            raise ValueError("entity: wanted none with 'position', which cuts each file wherever an entity stands")
        if self.entity and not (self.given or self.by_time):
            raise ValueError("entity: wanted it in hash.by, by which the rows are cut, seen beside it")
        missing = {"train", "test"} - set(self.names)
        if missing:
            raise ValueError(f"wanted splits named train and test, seen {', '.join(self.names)}")
        if self.validation and "validation" in self.base_names:
            raise ValueError("a validation split is given already; leave 'validation' out")
        if self.validation:
            known_name("validation.from: a split", self.validation.source, self.base_names)
        return self

    @property
    def base_names(self) -> list[str]:
        """The splits before a validation split is cut."""
        if self.by_time:
            return self.by_time.names
        if self.by_last:
            return self.by_last.names
        if self.by_position:
            return list(self.by_position.shares)
        return self.given or list((self.by_hash or HashSplit()).shares)

    @property
    def names(self) -> list[str]:
        """All splits."""
        return [*self.base_names, *(["validation"] if self.validation else [])]

    @property
    def hashed(self) -> list[str]:
        """Columns by whose hash rows are cut; empty for the row's key."""
        return self.by_hash.by if self.by_hash else self.entity
