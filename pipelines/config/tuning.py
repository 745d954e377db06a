"""The section of the search for better parameters."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.config import catalog
from pipelines.config.base import Positive, Section, known_name
from pipelines.config.learning import HOW_NOT_WHAT, Estimator, Model, Train

S = TypeVar("S", bound=Section)
DEFAULT_TRIALS = 20


class Range(Section):
    """Numbers from `low` to `high`, both included: whole ones where both are written as whole numbers, else real ones."""

    low: int | float = Field(description="The lowest value.")
    high: int | float = Field(description="The highest value.")
    log: bool = Field(default=False, description="Search by orders of magnitude, as a learning rate wants.")
    step: Annotated[int | float, Field(gt=0)] | None = Field(default=None, description="Only every so many.")

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"wanted low below high, seen {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: wanted above 0 with log, seen {self.low}")
        if self.log and self.step:
            raise ValueError("wanted one of 'log' and 'step', seen both")
        if self.is_whole and isinstance(self.step, float):
            raise ValueError(f"step: wanted a whole number between whole numbers, seen {self.step}")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> list[Any] | None:
        """All of them, or None where they have no end."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return None
        return [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]


def _list_or_range(value: Any) -> Any:
    if not isinstance(value, list | dict | Range) or value == []:
        raise ValueError(f"wanted a list of values, or {{low: ..., high: ...}}, seen {value!r}")
    return [_number(item) for item in value] if isinstance(value, list) else value


def _number(item: Any) -> Any:
    """YAML 1.1 takes 1e-4, without a point, for text; where a parameter has no type, nobody else mends it."""
    return float(item) if isinstance(item, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", item) else item


Space: TypeAlias = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("dict")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "dict"),
    BeforeValidator(_list_or_range),
]


class Tune(Section):
    """The search for better parameters, in front of `classic` and `train`, which take what it finds.

    The config as written is always tried first, so that what is found is never worse by the metric.
    """

    search: Literal["tpe", "random", "grid"] = Field(
        default="tpe",
        description="tpe: Bayesian search by Tree-structured Parzen Estimators. grid: every combination, in order.",
    )
    trials: Positive | None = Field(
        default=None,
        description=f"Trials of each candidate, beside the config as written. Default: {DEFAULT_TRIALS}; a grid tries all "
        "of its points.",
    )
    folds: Annotated[int, Field(ge=2, le=20)] | None = Field(
        default=None,
        description="Cross-validate over so many parts of the training split, by a hash of `row_id`. Default: measure on "
        "the validation split.",
    )
    metric: str | None = Field(default=None, description="What is made better. Default: `gate.metric`.")
    parallel: Positive = Field(
        default=1, description="Trials at a time. With 1 the same seed gives the same trials in the same order."
    )
    timeout_s: Positive | None = Field(
        default=None, description="Seconds of a candidate's search after which no trial starts."
    )
    prune: bool = Field(
        default=True,
        description="End a trial whose best epoch (with `folds`, mean of folds) so far is worse than the median of the "
        "others at that point.",
    )
    spaces: dict[str, dict[str, Space]] = Field(
        min_length=1,
        description="What is searched, by section: an estimator of `classic`, `model`, `train`. Each parameter takes a "
        "list of values or a range; `train: {optimizer.weight_decay: ...}` is one inside another.",
    )

    @model_validator(mode="after")
    def _finite(self) -> "Tune":
        for section, space in self.spaces.items():
            if not space:
                raise ValueError(f"spaces.{section}: wanted a parameter, seen none")
        if self.search != "grid":
            return self
        for section, space in self.spaces.items():
            for name, values in space.items():
                if values_of(values) is None:
                    raise ValueError(
                        f"spaces.{section}.{name}: a grid wants a list, or a range with a step, seen a range without end"
                    )
        if self.trials is not None:
            sizes = ", ".join(f"{name} has {num_points(space):,}" for name, space in self.candidates().items())
            raise ValueError(f"trials: a grid tries all of its points ({sizes}); leave it out, or use search: random")
        return self

    def candidates(self) -> dict[str, dict[str, Space]]:
        """The space of each candidate; that of the network is `model` and `train` together, by dotted names."""
        network = {
            f"{section}.{name}": values
            for section in ("model", "train")
            for name, values in self.spaces.get(section, {}).items()
        }
        found = {name: dict(space) for name, space in self.spaces.items() if name not in ("model", "train")}
        return found | ({"model": network} if network else {})

    def num_trials(self, space: Mapping[str, Space]) -> int:
        """Trials of a candidate with that space, beside the config as written."""
        points = num_points(space)
        return points if points is not None and self.tries_all(space) else self.trials or DEFAULT_TRIALS

    def tries_all(self, space: Mapping[str, Space]) -> bool:
        """Whether every point of the space is tried: by a grid, and where there are no more of them than trials."""
        points = num_points(space)
        return points is not None and (self.search == "grid" or points <= (self.trials or DEFAULT_TRIALS))


def values_of(space: Space) -> list[Any] | None:
    """All values of a parameter, or None where they have no end."""
    return space.values if isinstance(space, Range) else space


def num_points(space: Mapping[str, Space]) -> int | None:
    """How many combinations there are, or None where they have no end."""
    sizes = [values_of(values) for values in space.values()]
    return math.prod(len(values) for values in sizes if values is not None) if None not in sizes else None


def check_spaces(tune: Tune, classic: Sequence[Estimator], model: Model | None, train: Train) -> None:
    """Refuse what the sections that are searched do not know.

    Raises:
        ValueError: An unknown section or parameter, or a value that its section refuses.
    """
    sections = [estimator.estimator for estimator in classic] + (["model", "train"] if model else [])
    for section, space in tune.spaces.items():
        known_name("tune.spaces: a section that the config has", section, sections)
        for name, values in space.items():
            where = f"tune.spaces.{section}"
            if section == "train":
                names = [field for field in Train.model_fields if field not in HOW_NOT_WHAT]
                known_name(f"{where}: a setting that changes what is learned", name.partition(".")[0], names)
                ends = [values.low, values.high] if isinstance(values, Range) else values
                for value in ends:
                    _check_value(train, name, value, where)
            elif section != "model":
                known_name(f"{where}: a parameter", name, catalog.ESTIMATORS[section])
            elif model and model.network in catalog.NETWORKS:
                known_name(f"{where}: a parameter of {model.network}", name, catalog.NETWORKS[model.network])


def _check_value(train: Train, name: str, value: Any, where: str) -> None:
    try:
        with_values(train, {name: value})
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ").replace("Input should be", "wanted")
        raise ValueError(f"{where}.{name}: {message}, seen {value!r}") from None


def with_values(section: S, values: Mapping[str, Any]) -> S:
    """The section with other values, by names that are dotted inside it.

    Raises:
        ValidationError: The section refuses one.
    """
    if not values:
        return section
    raw = section.model_dump(mode="json", by_alias=True)
    for name, value in values.items():
        at, (*parents, last) = raw, name.split(".")
        for parent in parents:
            at[parent] = at.get(parent) or {}
            at = at[parent]
        at[last] = value
    return type(section).model_validate(raw)
