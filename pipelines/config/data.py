"""The sections that say what the raw data is."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipelines.config import catalog
from pipelines.config.base import DottedPath, Name, Positive, Section, Share, Strings, known_name, nearest
from pipelines.config.checks import Check, check_columns

COLUMN_TYPES = ("int", "bigint", "float", "double", "string", "boolean", "date", "timestamp", "binary")
_COLUMN_TYPE = re.compile(
    r"^(?:int|bigint|float|double|string|boolean|date|timestamp|binary"
    r"|array<(?:int|bigint|float|double|string)>|sparse\([1-9]\d*\))$"
)
_PLACE = re.compile(r"\{(\w+)\}")
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


def _as_mapping(value: Any) -> Any:
    """Names as a mapping of each to itself."""
    names = [value] if isinstance(value, str) else value
    return {name: name for name in names} if isinstance(names, list) else names


class Prepare(Section):
    """A function that makes the raw files, with parameters of its own; a bare `module:name` stands for none."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, str | bool | int | float]

    function: DottedPath = Field(
        description="`module:name`. It writes the raw files into the folder that is its first argument; one that takes "
        "`spark` is given the session."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        """The function's parameters as written."""
        return dict(self.model_extra or {})

    def fill(self, path: str) -> str:
        """`path` with the parameters in their places: other parameters make other files.

        Raises:
            ValueError: A place of no parameter, or a parameter without a place.
        """
        places = _PLACE.findall(path)
        for name in places:
            known_name("a parameter of source.prepare", name, list(self.params))
        for name in self.params:
            if name not in places:
                raise ValueError(
                    f"wanted '{{{name}}}' in {path!r}, so that files made with another {name} are not taken for these"
                )
        return _PLACE.sub(lambda place: str(self.params[place.group(1)]), path)


class Table(Section):
    """Files of one format, and what a row of them looks like."""

    format: Literal["csv", "libsvm", "idx", "parquet", "delta", "text"] = Field(
        description="The raw format; text: a line is a row, or a block of characters is."
    )
    prepare: Prepare | None = Field(default=None, description="Makes the raw files where they are missing.")
    paths: Strings | dict[Name, Strings] = Field(
        description="Files, folders or globs; as a mapping, one entry a split (then `split.given` may name them). "
        "For `idx` the image files: the label file stands beside each, with `labels-idx1` for `images-idx3`. "
        "`{name}` stands for a parameter of `prepare`; then each of them stands in each path."
    )
    columns: Annotated[dict[Name, str], BeforeValidator(parse_schema)] = Field(
        alias="schema",
        description="Each column and its type, as `name type, ...` or a mapping; never inferred. Types: int, bigint, "
        "float, double, string, boolean, date, timestamp, binary, array<int|bigint|float|double|string>, and sparse(N), a "
        "vector of N places of which few are set.",
    )
    options: dict[str, str | bool | int | float] = Field(
        default={},
        description="Options of the format: for csv those of Spark's reader, for delta its `version`, for text `block_chars`: "
        "a row is so many characters of the file, new lines among them, and the first of the next row.",
    )

    @field_validator("paths")
    @classmethod
    def _filled(cls, paths: list[str] | dict[str, list[str]], info: ValidationInfo) -> Any:
        prepare: Prepare | None = info.data.get("prepare")
        if prepare is None or not prepare.params:
            return paths
        if isinstance(paths, list):
            return [prepare.fill(path) for path in paths]
        return {split: [prepare.fill(path) for path in group] for split, group in paths.items()}

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
    def _format(self) -> "Table":
        for option in self.options:
            known_name(f"an option of {self.format}", option, catalog.SOURCE_OPTIONS[self.format])
        block = self.options.get("block_chars")
        if block is not None and (type(block) is not int or block < 1):
            raise ValueError(f"options.block_chars: wanted a number of characters, at least 1, seen {block!r}")
        layouts = {"idx": ["binary", "int"], "libsvm": ["double", "sparse(N)"], "text": ["string"]}
        if self.format in layouts:
            seen = [re.sub(r"\(\d+\)", "(N)", dtype) for dtype in self.columns.values()]
            if seen != layouts[self.format]:
                raise ValueError(
                    f"schema: wanted columns of types {layouts[self.format]} for {self.format}, seen {seen}"
                )
        return self


class JoinTime(Section):
    """The columns whose times are compared, dates or timestamps in UTC; a date is its midnight."""

    left: Name = Field(description="Of the source.")
    right: Name = Field(description="Of the joined table.")


class Join(Section):
    """An as-of join: each row gets the latest row of another table before its own time, or nulls."""

    table: Table = Field(description="The other table: csv, parquet or delta.")
    by: Annotated[dict[Name, Name], BeforeValidator(_as_mapping, json_schema_input_type=Strings | dict[Name, Name])] = (
        Field(description="Columns that must be equal: names, or a mapping of the source's to the joined table's.")
    )
    time: JoinTime = Field(description="When a row was made, in each table.")
    strict: bool = Field(default=True, description="Rows of the same moment count as too late.")
    max_age_days: Positive | None = Field(default=None, description="Older rows count as missing.")
    prefix: Name | None = Field(default=None, description="Put before the names of the joined columns.")

    @model_validator(mode="after")
    def _fits(self) -> "Join":
        table = self.table
        if table.format not in ("csv", "parquet", "delta") or any(
            t.startswith("sparse") for t in table.columns.values()
        ):
            raise ValueError(f"table: wanted csv, parquet or delta without sparse columns, seen {table.format}")
        if isinstance(table.paths, dict):
            raise ValueError("table.paths: wanted files of all splits, seen a mapping")
        for column in self.by.values():
            known_name("by: a column of the joined schema", column, list(table.columns))
        known_name("time.right: a column of the joined schema", self.time.right, list(table.columns))
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The columns that rows gain, and their types: all but those of `by`."""
        return {self.named(name): t for name, t in self.table.columns.items() if name not in self.by.values()}

    def named(self, column: str) -> str:
        """The name that a column of the joined table takes."""
        return f"{self.prefix or ''}{column}"


class Source(Table):
    """Where the raw data is and what a row of it looks like."""

    key: list[Name] = Field(
        default=[],
        description="Columns that name a row. Empty: (path relative to the source, line or record number).",
    )
    max_rejected: Share = Field(
        default=0.0, description="The share of rows that may be rejected before the stage fails."
    )
    checks: list[Check] = Field(default=[], description="What rows and the table must satisfy; see docs/quality.md.")
    joins: list[Join] = Field(default=[], description="Tables whose latest row before each row's time is joined to it.")

    @model_validator(mode="after")
    def _key(self) -> "Source":
        for column in self.key:
            known_name("key: a column of the schema", column, list(self.columns))
        check_columns(self.checks, self.columns)
        return self

    @model_validator(mode="after")
    def _joined(self) -> "Source":
        columns = dict(self.columns)
        for place, join in enumerate(self.joins):
            where = f"joins.{place}"
            for left, right in {**join.by, join.time.left: join.time.right}.items():
                known_name(f"{where}: a column of the schema", left, list(self.columns))
                types = self.columns[left], join.table.columns[right]
                if left in join.by and types[0] != types[1]:
                    raise ValueError(f"{where}.by: wanted one type, seen {left} {types[0]} and {right} {types[1]}")
                if left == join.time.left and not {*types} <= {"date", "timestamp"}:
                    raise ValueError(
                        f"{where}.time: wanted dates or timestamps, seen {left} {types[0]}, {right} {types[1]}"
                    )
            if twice := [name for name in join.columns if name in columns or name in RESERVED_COLUMNS]:
                raise ValueError(f"{where}: column {twice[0]!r} is there already; give the join a prefix")
            columns |= join.columns
        return self

    @property
    def splits(self) -> list[str]:
        """The splits that `paths` names; empty where it names none."""
        return list(self.paths) if isinstance(self.paths, dict) else []

    @property
    def ingested(self) -> dict[str, str]:
        """The columns of an ingested row and their types: those of the schema, and those that are joined."""
        return dict(self.columns, **{name: dtype for join in self.joins for name, dtype in join.columns.items()})
