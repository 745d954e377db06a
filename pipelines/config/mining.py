"""The section of what is found in the rows without a model: frequent patterns, near neighbours, communities.

Keys and parameters carry MLlib's own names.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipelines.config.base import Name, Positive, Section, known_name

Support = Annotated[float, Field(gt=0.0, le=1.0)]


class Algorithm(Section):
    """What an algorithm reads, and its parameters, which have MLlib's names as aliases."""

    @property
    def params(self) -> dict[str, Any]:
        """MLlib's parameters by its names."""
        fields = type(self).model_fields.items()
        return {field.alias: getattr(self, name) for name, field in fields if field.alias}


class FrequentSets(Algorithm):
    """Sets of items that occur together, and rules between them (Han et al., Mining frequent patterns without candidate
    generation, 2000)."""

    items: Name = Field(description="A list column with the items of a row; with `by`, a column of one item a row.")
    by: Name | None = Field(default=None, description="The column whose equal values make a set, as an order's number.")
    min_support: Support = Field(default=0.3, alias="minSupport", description="The least share of sets that hold them.")
    min_confidence: Support = Field(
        default=0.8,
        alias="minConfidence",
        description="The least share of sets with a rule's left side that hold its right.",
    )


class FrequentSequences(Algorithm):
    """Sequences that occur in order, though not side by side (Pei et al., PrefixSpan, 2001)."""

    items: Name = Field(description="A list column in its order; with `by`, a column of one item a row.")
    by: Name | None = Field(default=None, description="The column whose equal values make a sequence, as a user.")
    order: Name | None = Field(
        default=None,
        description="With `by`: the column that orders it. Items of one moment are a set without an order.",
    )
    min_support: Support = Field(
        default=0.1, alias="minSupport", description="The least share of sequences that hold a pattern."
    )
    max_pattern_length: Positive = Field(
        default=10, alias="maxPatternLength", description="The most items of a pattern."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "FrequentSequences":
        if (self.by is None) != (self.order is None):
            raise ValueError(f"wanted 'by' and 'order' together, seen by {self.by!r}, order {self.order!r}")
        return self


class NearSets(Algorithm):
    """Pairs of rows whose sets of ids nearly agree, by MinHash (Broder, On the resemblance and containment of documents,
    1997). Pairs are found with a chance that grows with `numHashTables`."""

    input: Name = Field(description="An input of `features.inputs` that is ids or sparse, as a 'bag'.")
    max_distance: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.2, description="The Jaccard distance below which a pair is near."
    )
    num_hash_tables: Positive = Field(
        default=5, alias="numHashTables", description="Hashes; more find more and cost more."
    )


class NearVectors(Algorithm):
    """Pairs of rows whose vectors are near, by random projections (Datar et al., Locality-sensitive hashing scheme based
    on p-stable distributions, 2004)."""

    input: Name = Field(description="An input of `features.inputs` that is numbers: dense, sparse or an image.")
    max_distance: Annotated[float, Field(gt=0.0)] = Field(
        description="The Euclidean distance below which a pair is near."
    )
    bucket_length: Annotated[float, Field(gt=0.0)] = Field(
        alias="bucketLength", description="Width of a hash's buckets; a few times `max_distance`."
    )
    num_hash_tables: Positive = Field(
        default=5, alias="numHashTables", description="Hashes; more find more and cost more."
    )


class Communities(Algorithm):
    """Clusters of a graph's vertices (Lin and Cohen, Power iteration clustering, 2010)."""

    src: Name = Field(description="The column with the one vertex of an edge, whole numbers.")
    dst: Name = Field(description="The column with the other. An edge has no direction, and stands once.")
    weight: Name | None = Field(
        default=None, description="The column with the edges' similarity, at least 0. Default: 1."
    )
    k: Annotated[int, Field(ge=2)] = Field(default=2, alias="k", description="How many clusters.")
    max_iter: Annotated[int, Field(ge=1, le=30)] = Field(
        default=20, alias="maxIter", description="Iterations. MLlib's tasks grow with each, until the JVM's stack ends."
    )


class Mine(Section):
    """What is found in all ingested rows, each into a Delta table of its own."""

    frequent_sets: FrequentSets | None = Field(default=None, alias="FPGrowth", description="Sets of items and rules.")
    frequent_sequences: FrequentSequences | None = Field(
        default=None, alias="PrefixSpan", description="Sequences of items."
    )
    near_sets: NearSets | None = Field(default=None, alias="MinHashLSH", description="Near duplicates by their ids.")
    near_vectors: NearVectors | None = Field(
        default=None, alias="BucketedRandomProjectionLSH", description="Near duplicates by their numbers."
    )
    communities: Communities | None = Field(
        default=None, alias="PowerIterationClustering", description="Clusters of a graph."
    )

    @model_validator(mode="after")
    def _any(self) -> "Mine":
        if not self.algorithms:
            raise ValueError(f"wanted one of {', '.join(f.alias or '' for f in Mine.model_fields.values())}, seen none")
        return self

    @property
    def algorithms(self) -> dict[str, Algorithm]:
        """Those that are wanted, by MLlib's name."""
        found = {field.alias or name: getattr(self, name) for name, field in Mine.model_fields.items()}
        return {name: algorithm for name, algorithm in found.items() if algorithm is not None}


def check_mine(mine: Mine, columns: Mapping[str, str], kinds: Mapping[str, str]) -> None:
    """Refuse columns and inputs that an algorithm cannot read.

    Args:
        mine: The section.
        columns: Types of the ingested columns by name.
        kinds: What each input of the features becomes.

    Raises:
        ValueError: One is not there, or of another type.
    """
    items = ("string", "int", "bigint")
    lists = tuple(f"array<{dtype}>" for dtype in items)
    for name, algorithm in mine.algorithms.items():
        match algorithm:
            case FrequentSets() | FrequentSequences():
                wanted = {"items": items if algorithm.by else lists, "by": (), "order": ()}
            case Communities():
                wanted = dict.fromkeys(("src", "dst"), ("int", "bigint")) | {"weight": (*items[1:], "float", "double")}
            case NearSets() | NearVectors():
                known_name(f"mine.{name}.input: an input of the features", algorithm.input, list(kinds))
                taken = ("ids", "sparse") if isinstance(algorithm, NearSets) else ("dense", "image", "sparse")
                if kinds[algorithm.input] not in taken:
                    raise ValueError(
                        f"mine.{name}.input: wanted an input that is {' or '.join(taken)}, seen {algorithm.input!r}, "
                        f"{kinds[algorithm.input]}"
                    )
                continue
        for key, types in wanted.items():
            if (column := getattr(algorithm, key, None)) is None:
                continue
            known_name(f"mine.{name}.{key}: a column of the schema", column, list(columns))
            if types and columns[column] not in types:
                raise ValueError(
                    f"mine.{name}.{key}: wanted type {' or '.join(types)}, seen {column!r}, {columns[column]}"
                )
