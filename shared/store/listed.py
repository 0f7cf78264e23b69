"""Deletes rows by a list of values, without a look at any other row.

``DELETE ... WHERE column IN (...)`` is not enough: MariaDB scans a small table for it, whatever index it is told to
use, and then waits for the locks of other callers. From a derived table of the values to the rows there is one way
only. SQLAlchemy Core has no DELETE with a join, so the statement is text; the driver binds the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sqlalchemy import Connection, TextClause, text


def delete_listed(
    connection: Connection,
    table: str,
    index: str,
    column: str,
    values: Sequence[bytes | int],
    **others: str,
) -> int:
    """Deletes the rows whose ``column`` is one of the values, and whose other columns are as given; how many.

    ``index`` begins with the other columns, or holds each value of ``column`` once.
    """
    if not values:
        return 0
    statement = _statement(table, index, column, len(values), tuple(others))
    wanted = {f"v{n}": value for n, value in enumerate(values)}
    return connection.execute(statement, wanted | others).rowcount


@lru_cache(maxsize=2048)
def _statement(table: str, index: str, column: str, count: int, others: tuple[str, ...]) -> TextClause:
    """All arguments are names of the schema, from the modules of this package."""
    conditions = "".join(f" AND t.{other} = :{other}" for other in others)
    wanted = " UNION ALL ".join(f"SELECT :v{n} AS wanted" for n in range(count))
    return text(
        f"DELETE t FROM ({wanted}) AS w STRAIGHT_JOIN {table} AS t FORCE INDEX ({index}) "
        f"ON t.{column} = w.wanted{conditions}"
    )
