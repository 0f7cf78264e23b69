"""Deletes rows by a list of values, without reading any other row.

``DELETE ... WHERE column IN (...)`` is not enough: MariaDB scans a small table for it, whatever index is forced,
and then waits for the locks of other callers. From a derived table of the values to the rows there is one way
only. SQLAlchemy Core has no DELETE with a join, so the statement is text; the driver binds the values.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

# Values in one statement.
_CHUNK = 1_000


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
    conditions = "".join(f" AND t.{other} = %s" for other in others)
    deleted = 0
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        wanted = " UNION ALL ".join(["SELECT %s AS wanted"] * len(chunk))
        # All that is not bound are names of the schema, from the modules of this package.
        statement = (
            f"DELETE t FROM ({wanted}) AS w STRAIGHT_JOIN {table} AS t FORCE INDEX ({index}) "
            f"ON t.{column} = w.wanted{conditions}"
        )
        deleted += connection.exec_driver_sql(statement, (*chunk, *others.values())).rowcount
    return deleted
