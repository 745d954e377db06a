"""Raw files that a workload makes for itself."""

import inspect
import shutil
from importlib import import_module
from pathlib import Path

from pipelines.config import Config
from pipelines.config.data import Prepare, Table
from pipelines.errors import ConfigError, DataError
from pipelines.progress import say
from pipelines.session import get_session
from pipelines.sources.files import all_there, root_of


def prepare(config: Config) -> None:
    """Have the `prepare` of the source, and of each table that is joined to it, make the raw files that are missing.

    It writes into a folder beside theirs, which takes that place when all is written: what an interrupted one left
    is never read, and goes when the next one starts.

    Raises:
        ConfigError: The function is not there, or does not take the parameters.
        DataError: Some of the files are missing, but their folder holds others.
    """
    for table in (config.source, *[join.table for join in config.source.joins]):
        if table.prepare and not all_there(table):
            _make(table.prepare, table, config)


def _make(wanted: Prepare, table: Table, config: Config) -> None:
    root = root_of(table)
    if root.is_dir() and any(root.iterdir()):
        raise DataError(
            f"source.paths: wanted all files in {root}, or none, so that {wanted.function} makes them; seen some; remove "
            "that folder, or name one of their own"
        )
    scratch = root.with_name(f".{root.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    say(f"          {wanted.function} makes {root}")
    _call(wanted, scratch, config)
    scratch.rename(root)


def _call(wanted: Prepare, folder: Path, config: Config) -> None:
    module, _, name = wanted.function.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"source.prepare: wanted a function at {wanted.function}, seen {error}") from None
    taken = inspect.signature(function)
    session = {"spark"} & taken.parameters.keys()
    try:
        taken.bind(folder, **dict.fromkeys(session), **wanted.params)
    except TypeError as error:
        known = [key for key in list(taken.parameters)[1:] if key != "spark"]
        raise ConfigError(f"source.prepare: {name} takes {', '.join(known) or 'no parameters'}: {error}") from None
    function(folder, **{name: get_session(config) for name in session}, **wanted.params)


def settle(written: Path, target: Path, *, suffix: str) -> None:
    """Move the files of Spark's folder `written` to `target`, under names that another run would give them too: rows are
    keyed by file and line.
    """
    target.mkdir(exist_ok=True)
    for number, file in enumerate(sorted(written.glob("part-*"))):
        file.rename(target / f"{number:05}{suffix}")
    shutil.rmtree(written)
