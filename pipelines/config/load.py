"""Read a workload's YAML file: variables, overrides, checks, and errors that name the place.

An override is `--set train.epochs=1`: a dotted key and a YAML value. A variable is `${NAME}` or
`${NAME:-default}`, from the environment or from the built-in ones below.
"""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config.base import nearest
from pipelines.config.workload import Config
from pipelines.errors import ConfigError, one_line

DEFAULT_LAKE = "data/lake"
DEFAULT_DATA = "../shared/data"
_WILD = set("*?[]{}\\")
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def lake_root() -> Path:
    """The folder of tables, receipts, models and MLflow's files: `HEADRACE_LAKE`, made absolute.

    Raises:
        ConfigError: Spark's readers would take it for a pattern.
    """
    lake = Path(os.environ.get("HEADRACE_LAKE") or DEFAULT_LAKE).absolute()
    if found := set(str(lake)) & _WILD:
        raise ConfigError(
            f"HEADRACE_LAKE: wanted a folder whose path is no pattern to Spark, seen {' '.join(sorted(found))} in {lake}; "
            "take one without"
        )
    return lake


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of the workload at `path`.

    Args:
        path: A YAML file.
        overrides: `key=value` pairs; keys are dotted (`classic.0.maxIter=20`), values are YAML.

    Raises:
        ConfigError: The file is missing, is not YAML, or a value is not what is wanted; the message
            names file, key, wanted and seen, one problem a line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [p.stem for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.stem, others) or (f"; there are: {', '.join(sorted(others))}" if others else "")
        raise ConfigError(f"{path}: wanted a config file, seen none{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = _UniqueKeys(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: wanted YAML: {one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: wanted a mapping of sections, seen {type(raw).__name__}")
    values = _expand(raw, where=str(path))
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem, path, root, overrides) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _variables() -> dict[str, str]:
    spark = importlib.util.find_spec("pyspark")
    home = str(Path(spark.origin).parent) if spark and spark.origin else ""
    built_in = {"HEADRACE_DATA": DEFAULT_DATA, "SPARK_HOME": home}
    # An empty variable counts as unset, as in the shell's ${NAME:-default}.
    return built_in | {k: v for k, v in os.environ.items() if v} | {"HEADRACE_LAKE": str(lake_root())}


def _expand(value: Any, *, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, where=f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where=where) for item in value]
    if not isinstance(value, str):
        return value
    known = _variables()

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name not in known and default is None:
            raise ConfigError(f"{where}: wanted the variable {name} to be set, seen it unset: export {name}=...")
        return known.get(name) or default or ""

    return _VARIABLE.sub(replace, value)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set: wanted key=value, seen {override!r}")
    try:
        value = _expand(yaml.safe_load(text), where=f"--set {key}")
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: wanted a YAML value, seen {text!r}") from None
    at: Any = values
    parts = key.split(".")
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        index: Any = int(part) if isinstance(at, list) and part.isdigit() else part
        if isinstance(at, list) and not (isinstance(index, int) and index < len(at)):
            raise ConfigError(f"--set {key}: wanted an index below {len(at)}, seen {part!r}")
        if following is None:
            at[index] = value
        else:
            if isinstance(at, dict) and not isinstance(at.get(index), dict | list):
                at[index] = {}
            at = at[index]


def _explain(problem: Mapping[str, Any], path: Path, root: Any, overrides: Sequence[str]) -> str:
    """One problem as `file:line: key: wanted ..., seen ...`."""
    place, sections = _placed([part for part in problem["loc"] if _is_key(part)])
    key = ".".join(str(part) for part in place)
    line = _line_of(root, place)
    where = f"{path}:{line}" if line else str(path)
    kind, message = problem["type"], problem["msg"]
    given = [override.partition("=")[0] for override in overrides]
    is_of_section = kind == "value_error"  # several of its keys may not fit each other
    if any(f"{key}.".startswith(f"{one}.") or (is_of_section and one.startswith(f"{key}.")) for one in given):
        where = f"{path} with --set"
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in sections[0].model_fields.items()]
        return f"{where}: {key}: unknown key{nearest(str(place[-1]), known)} (known: {', '.join(known)})"
    if kind == "missing":
        return f"{where}: {key}: wanted, seen nothing"
    if kind == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message.removeprefix('Value error, ')}"
    wanted = message.replace("Input should be", "wanted").replace("String should", "wanted a string that should")
    return f"{where}: {key}: {wanted}, seen {one_line(repr(problem['input']), limit=80)}"


def _is_key(part: Any) -> bool:
    """Whether a part of pydantic's location is a key of the file, not a branch of a union."""
    return isinstance(part, int) or not re.search(r"[\[\],()]|^(list|dict|str|bool|int|float)$", part)


def _line_of(node: Any, place: Sequence[Any]) -> int | None:
    """The line of the deepest key of `place` that the file holds."""
    line = None
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _placed(parts: Sequence[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """The keys among the parts of a location, without the names that only say which section of a union is meant; and
    the sections, of which one is there, whose key the last is.
    """
    place: list[Any] = []
    owners: list[type[BaseModel]] = [Config]
    found: list[type[BaseModel]] = [Config]
    for part in parts:
        named = [section for section in found if part in _names_of(section)]
        if named:
            found = named
            continue
        place.append(part)
        owners = found
        fields = [field for s in found for name, field in s.model_fields.items() if part in (field.alias, name)]
        found = [section for field in fields for section in sections_in(field.annotation)] or found
    return place, owners


def _names_of(section: type[BaseModel]) -> tuple[Any, ...]:
    """What tells the section from others, where it is one of several."""
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes named in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in getattr(annotation, "__args__", ()) for section in sections_in(argument)]
