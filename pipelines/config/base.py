"""What the sections of a config share."""

import difflib
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def known_name(what: str, name: str, known: tuple[str, ...] | list[str]) -> str:
    """`name` if it is one of `known`, else a ValueError with the nearest one."""
    if name not in known:
        raise ValueError(f"wanted {what}, one of {', '.join(sorted(known))}, seen {name!r}{nearest(name, known)}")
    return name


def as_list(value: Any) -> Any:
    """A single string as a list of one."""
    return [value] if isinstance(value, str) else value


Strings: TypeAlias = Annotated[list[str], BeforeValidator(as_list)]


class Section(BaseModel):
    """A part of a config: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
