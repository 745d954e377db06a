"""Write `conf/schema.json`, for editors, and `docs/config.md` from the config models.

python -m pipelines.config.reference [--check]
"""

import json
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipelines.config.load import sections_in
from pipelines.config.workload import Config

ROOT = Path(__file__).resolve().parents[2]


def schema() -> str:
    """The JSON schema of a workload's file."""
    value = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema(by_alias=True)}
    return json.dumps(value, indent=1) + "\n"


def reference() -> str:
    """Every section and key as Markdown."""
    parts = [
        "# Config reference",
        "",
        "Generated from the config models by `make docs`. A workload is one YAML file under `conf/`; "
        "`${NAME}` and `${NAME:-default}` take values from the environment (`HEADRACE_LAKE`, `HEADRACE_DATA` and "
        "`SPARK_HOME` have defaults), and `--set train.epochs=1` overrides a value.",
        "",
    ]
    waiting: list[tuple[str, type[BaseModel]]] = [("", Config)]
    while waiting:
        path, model = waiting.pop(0)
        parts += _section(path, model)
        for name, field in model.model_fields.items():
            key = field.alias or name
            inner = f"{path}.{key}" if path else key
            waiting += [(inner, section) for section in sections_in(field.annotation) if section.model_fields]
    return "\n".join(parts) + "\n"


def _section(path: str, model: type[BaseModel]) -> list[str]:
    lines = [f"## {f'`{path}`' if path else 'The file'}", "", (model.__doc__ or "").strip(), ""]
    lines += ["| key | type | default | what |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_default(field.get_default(call_default_factory=True))}`"
        what = (field.description or "").replace("|", "\\|")
        choices = (field.json_schema_extra or {}).get("enum") if isinstance(field.json_schema_extra, dict) else None
        if isinstance(choices, list):
            what += f" One of {', '.join(str(choice) for choice in choices)}."
        lines.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {default} | {what} |")
    return [*lines, ""]


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults"
    return json.dumps(value, default=str)


def _type(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(argument) for argument in arguments if argument is not type(None)))
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def main(arguments: list[str]) -> int:
    """Write the files, or with --check say which is not current."""
    stale = 0
    for path, content in ((ROOT / "conf/schema.json", schema()), (ROOT / "docs/config.md", reference())):
        if "--check" not in arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            print(f"{path.relative_to(ROOT)} is not current; run `make docs`")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
