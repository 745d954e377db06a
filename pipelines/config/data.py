"""The sections that say what the raw data is and which rows train, validate and test."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipelines.config import catalog
from pipelines.config.base import DottedPath, Name, Section, Share, Strings, known_name, nearest

COLUMN_TYPES = ("int", "bigint", "float", "double", "string", "boolean", "date", "timestamp", "binary")
_COLUMN_TYPE = re.compile(
    r"^(?:int|bigint|float|double|string|boolean|date|timestamp|binary"
    r"|array<(?:int|bigint|float|double|string)>|sparse\([1-9]\d*\))$"
)
NUMERIC = ("int", "bigint", "float", "double")
RESERVED_COLUMNS = ("row_id", "label")


def parse_schema(value: Any) -> Any:
    """`"age int, name string"` as `{"age": "int", "name": "string"}`; a mapping passes unchanged."""
    if not isinstance(value, str):
        return value
    columns: dict[str, str] = {}
    for part in (part.strip() for part in value.split(",")):
        if not part:
            continue
        name, _, dtype = part.partition(" ")
        if not dtype:
            raise ValueError(f"wanted 'name type, name type, ...', seen {part!r}")
        if name in columns:
            raise ValueError(f"wanted each column once, seen {name!r} twice")
        columns[name] = dtype.strip()
    return columns


def sparse_size(dtype: str) -> int:
    """N of `sparse(N)`."""
    return int(dtype.removeprefix("sparse(").removesuffix(")"))


class Source(Section):
    """Where the raw data is and what a row of it looks like."""

    format: Literal["csv", "libsvm", "idx", "parquet", "delta"] = Field(description="The raw format.")
    paths: Strings | dict[Name, Strings] = Field(
        description="Files, folders or globs; as a mapping, one entry a split (then `split.given` may name them). "
        "For `idx` the image files: the label file stands beside each, with `labels-idx1` for `images-idx3`."
    )
    columns: Annotated[dict[Name, str], BeforeValidator(parse_schema)] = Field(
        alias="schema",
        description="Each column and its type, as `name type, ...` or a mapping; never inferred. Types: int, bigint, "
        "float, double, string, boolean, date, timestamp, binary, array<int|bigint|float|double|string>, and sparse(N), a "
        "vector of N places of which few are set.",
    )
    options: dict[str, str | bool | int | float] = Field(
        default={}, description="Options of the format: for csv those of Spark's reader, for delta its `version`."
    )
    key: list[Name] = Field(
        default=[],
        description="Columns that name a row. Empty: (path relative to the source, line or record number).",
    )
    max_rejected: Share = Field(
        default=0.0, description="The share of rows that may be rejected before the stage fails."
    )
    prepare: DottedPath | None = Field(
        default=None, description="A function `module:name` that writes the raw files into the folder it is given."
    )

    @field_validator("columns")
    @classmethod
    def _types(cls, columns: dict[str, str]) -> dict[str, str]:
        for name, dtype in columns.items():
            if not _COLUMN_TYPE.match(dtype):
                raise ValueError(
                    f"column {name!r}: wanted one of {', '.join(COLUMN_TYPES)}, array<...>, sparse(N), seen {dtype!r}"
                    f"{nearest(dtype, COLUMN_TYPES)}"
                )
            if name in RESERVED_COLUMNS:
                raise ValueError(f"column {name!r}: this name is Headrace's own; give the column another one")
        if not columns:
            raise ValueError("wanted at least one column, seen none")
        return columns

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        for option in self.options:
            known_name(f"an option of {self.format}", option, catalog.SOURCE_OPTIONS[self.format])
        for column in self.key:
            known_name("key: a column of the schema", column, list(self.columns))
        layouts = {"idx": ["binary", "int"], "libsvm": ["double", "sparse(N)"]}
        if self.format in layouts:
            seen = [re.sub(r"\(\d+\)", "(N)", dtype) for dtype in self.columns.values()]
            if seen != layouts[self.format]:
                raise ValueError(
                    f"schema: wanted two columns of types {layouts[self.format]} for {self.format}, seen {seen}"
                )
        return self

    @property
    def splits(self) -> list[str]:
        """The splits that `paths` names; empty where it names none."""
        return list(self.paths) if isinstance(self.paths, dict) else []


class HashSplit(Section):
    """Splits by a hash of an entity, so that they stay stable when rows arrive."""

    by: list[Name] = Field(default=[], description="Columns of the entity. Empty: the row's key.")
    shares: dict[Name, Share] = Field(
        default={"train": 0.8, "test": 0.2}, description="The share of each split; together 1."
    )

    @field_validator("shares")
    @classmethod
    def _sum(cls, shares: dict[str, float]) -> dict[str, float]:
        if abs(sum(shares.values()) - 1.0) > 1e-9:
            raise ValueError(f"wanted shares that add up to 1, seen {sum(shares.values()):g}")
        return shares


class Validation(Section):
    """A validation split cut from another split, by a hash of the key (or of `split.hash.by`)."""

    source: Name = Field(default="train", alias="from", description="The split that it is cut from.")
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.1, description="The share that it takes.")


class Split(Section):
    """Which rows train, validate and test."""

    given: list[Name] | None = Field(default=None, description="Take the splits from the names in `source.paths`.")
    by_hash: HashSplit | None = Field(default=None, alias="hash", description="Cut the splits by a hash.")
    validation: Validation | None = Field(default=None, description="Cut a validation split from another one.")

    @model_validator(mode="after")
    def _one_way(self) -> "Split":
        if self.given and self.by_hash:
            raise ValueError("wanted one of 'given' and 'hash', seen both")
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
        return self.given or list((self.by_hash or HashSplit()).shares)

    @property
    def names(self) -> list[str]:
        """All splits."""
        return [*self.base_names, *(["validation"] if self.validation else [])]
