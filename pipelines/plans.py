"""The physical plans of what Spark ran, as its own status store keeps them."""

from typing import Any

from pyspark.sql import SparkSession


def last_query(spark: SparkSession) -> int:
    """The id of the latest query; -1 before the first."""
    queries = _queries(spark)
    return int(queries.apply(queries.size() - 1).executionId()) if queries.size() else -1


def plans_since(spark: SparkSession, query: int) -> str:
    """The plan of each query behind that one, as adaptive execution left it: Spark's `explain("formatted")`.

    Without the queries that Delta makes to read its log.
    """
    queries, parts = _queries(spark), []
    for run in (queries.apply(i) for i in range(queries.size())):
        if run.executionId() > query and not run.description().startswith("Delta: "):
            parts.append(f"==== {run.description()}\n{run.physicalPlanDescription().strip()}\n")
    return "\n".join(parts)


def _queries(spark: SparkSession) -> Any:
    return spark._jsparkSession.sharedState().statusStore().executionsList()
