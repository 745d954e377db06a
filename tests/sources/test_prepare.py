"""Raw files that a workload makes for itself: whole or not at all, and others for other parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import Config, load_config
from pipelines.errors import ConfigError, DataError
from pipelines.sources.files import raw_files
from pipelines.sources.prepare import prepare

Workload = Callable[..., Path]


def write_rows(folder: Path, *, rows: int, end: int = 2) -> None:
    """`end` files of two; then whoever wanted two is interrupted."""
    for number in range(end):
        (folder / f"{number}.csv").write_text("1,2,red,0\n" * rows)
    if end < 2:
        raise KeyboardInterrupt


def write_plain(folder: Path) -> None:
    (folder / "0.csv").write_text("1,2,red,0\n")


def made(workload: Workload, prepare: object, files: str = "{rows}/*.csv") -> Config:
    path = workload()
    paths = str(path.parent / "made" / files)
    schema = "a double, b double, color string, y int"
    return load_config(workload(source={"format": "csv", "prepare": prepare, "paths": paths, "schema": schema}))


def test_each_parameter_has_files_of_its_own(workload: Workload) -> None:
    function = "tests.sources.test_prepare:write_rows"
    for rows in (3, 5, 3):
        config = made(workload, {"function": function, "rows": rows})
        prepare(config)
        files = raw_files(config.source)[""]
        assert [len(file.read_text().splitlines()) for file in files] == [rows, rows]
    plain = made(workload, "tests.sources.test_prepare:write_plain", "plain/*.csv")
    prepare(plain)
    assert len(raw_files(plain.source)[""]) == 1


def test_an_interrupted_one_leaves_nothing_that_counts(workload: Workload) -> None:
    function = {"function": "tests.sources.test_prepare:write_rows", "rows": 3}
    files = "{rows}-{end}/*.csv"
    with pytest.raises(KeyboardInterrupt):
        prepare(made(workload, {**function, "end": 1}, files))
    config = made(workload, {**function, "end": 1}, files)
    with pytest.raises(DataError, match="seen none"):
        raw_files(config.source)
    root = Path(config.source.paths[0]).parent  # type: ignore[index]
    left = root.with_name(f".{root.name}.partial")
    assert [file.name for file in left.iterdir()] == ["0.csv"], "what a kill would leave"
    whole = made(workload, {**function, "end": 2}, files)
    left.rename(left.with_name(".3-2.partial"))
    (left.with_name(".3-2.partial") / "9.csv").write_text("half a ro")
    prepare(whole)
    assert [file.name for file in raw_files(whole.source)[""]] == ["0.csv", "1.csv"]


def test_files_of_others_are_left_alone(workload: Workload) -> None:
    config = made(workload, "tests.sources.test_prepare:write_plain", "plain/0.csv")
    other = Path(config.source.paths[0]).parent / "mine.csv"  # type: ignore[index]
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(DataError, match="remove that folder, or name one of their own"):
        prepare(config)
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"function": "tests.sources.test_prepare:write_rows", "row": 3}, "write_rows takes rows, end: .*'row"),
        ({"function": "tests.sources.test_prepare:nothing", "row": 3}, "wanted a function at .*:nothing"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(workload: Workload, wanted: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(made(workload, wanted, "{row}/*.csv"))


@pytest.mark.parametrize(
    ("files", "message"),
    [("all/*.csv", r"source\.paths: wanted '\{rows\}' in"), ("{rows}{row}/*.csv", "seen 'row'; did you mean 'rows'")],
)
def test_a_path_names_each_parameter(workload: Workload, files: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(workload, {"function": "tests.sources.test_prepare:write_rows", "rows": 3}, files)
