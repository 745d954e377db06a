"""Every place of a model's vector has a name, in the vector's order."""

from pipelines.assemble import vector_size
from pipelines.config.steps import Bag
from pipelines.features.fitted import (
    Fill,
    FittedCategory,
    FittedFeatures,
    FittedInput,
    FittedLabel,
    FittedList,
    FittedNumber,
)
from pipelines.importances import place_names
from tests.tables import BINARY

COLOR = FittedCategory(column=("color", "size"), values=("red\x1fbig", None))
AGE = FittedNumber(column="age", splits=(18.0, 65.5))
FITTED = FittedFeatures(
    inputs=(
        FittedInput(name="dense", kind="dense", columns=(FittedNumber(column="age", steps=(Fill(value=0.0),)),)),
        FittedInput(name="ids", kind="ids", columns=(COLOR, AGE, FittedCategory(column="hashed", buckets=2))),
        FittedInput(
            name="words",
            kind="sparse",
            whole=FittedList(
                source="t", category=FittedCategory(column="t", values=("cat", "dog")), form=Bag(length=3)
            ),
        ),
    ),
    label=FittedLabel(spec=BINARY),
)


def names(estimator: str) -> list[str]:
    contract = FITTED.contract(sparse_widths={"words": 3})
    found = list(place_names(FITTED, contract, estimator=estimator))
    assert len(found) == vector_size(contract, estimator=estimator)
    return found


def test_linear_models() -> None:
    cross = ["ids.color x size: other", "ids.color x size: red x big", "ids.color x size: missing"]
    buckets = ["ids.age: [-inf, 18)", "ids.age: [18, 65.5)", "ids.age: [65.5, inf)", "ids.age: missing"]
    hashed = ["ids.hashed: id 0", "ids.hashed: id 1"]
    words = ["words: other", "words: cat", "words: dog"]
    assert names("LogisticRegression") == ["dense.age", *cross, *buckets, *hashed, *words]


def test_trees() -> None:
    assert names("GBTClassifier")[:4] == ["dense.age", "ids.color x size", "ids.age", "ids.hashed"]
