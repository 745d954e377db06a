"""The generated files are current."""

from pipelines.config.reference import main


def test_schema_and_reference_are_current() -> None:
    assert main(["--check"]) == 0, "run `make docs`"
