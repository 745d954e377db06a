"""The section of recommendations: which inputs are users and items."""

from pydantic import Field

from pipelines.config.base import Name, Positive, Section, known_name
from pipelines.config.features import Features
from pipelines.config.split import LastSplit

RANKED = ("ndcg", "recall", "coverage")  # metrics of the items that users are recommended


class Recommend(Section):
    """Users are recommended items: what models learn from both, and how they are judged."""

    user: Name = Field(description="The input of users: one column through `vocabulary`.")
    item: Name = Field(description="The input of items, likewise.")
    top_k: Positive = Field(
        default=10, description="Items that a user is recommended; ndcg, recall and coverage are those at this place."
    )

    def check(self, features: Features, last: LastSplit | None) -> None:
        """Refuse what does not fit the other sections.

        Raises:
            ValueError: It says what.
        """
        for key, name in (("user", self.user), ("item", self.item)):
            known_name(f"recommend.{key}: one of features.inputs", name, list(features.inputs))
            group = features.inputs[name]
            steps = [step.name for step in group.steps]
            if steps != ["vocabulary"] or len(group.columns) != 1:
                raise ValueError(
                    f"recommend.{key}: wanted an input of one column through 'vocabulary', seen {name!r}: columns "
                    f"{group.columns}, steps {steps}"
                )
        if self.user == self.item:
            raise ValueError(f"recommend: wanted two inputs, seen {self.user!r} twice")
        if features.label_kind != "real":
            raise ValueError(f"recommend: wanted a label of kind real, the rating, seen {features.label_kind}")
        (user,) = features.inputs[self.user].columns
        if last is None or last.by != user:
            seen = f"it by {last.by!r}" if last else "none"
            raise ValueError(
                f"recommend: wanted split.last by {user!r}, so that users have items to be found; seen {seen}"
            )
