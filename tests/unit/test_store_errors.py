"""How errors of the driver and of SQLAlchemy become ours: what passes, what an operator fixes, and our own faults."""

from __future__ import annotations

import pymysql
import pytest
from sqlalchemy import exc

from skipbus.shared.errors import StoreMisconfigured, StoreRefused, StoreUnavailable
from skipbus.shared.store.engine import driver_errors, translated


@pytest.mark.parametrize("code", [1021, 1114], ids=["disk full", "table full"])
def test_a_full_server_is_unavailable_and_not_the_fault_of_a_statement(code: int) -> None:
    assert isinstance(translated(pymysql.err.OperationalError(code, "full")), StoreUnavailable)


@pytest.mark.parametrize("code", [1142, 1146], ids=["no grant", "no table"])
def test_what_no_other_values_would_change_is_a_misconfigured_store(code: int) -> None:
    assert isinstance(translated(pymysql.err.OperationalError(code, "denied")), StoreMisconfigured)


def test_values_that_the_store_does_not_take_are_no_misconfiguration() -> None:
    error = translated(pymysql.err.DataError(1406, "Data too long for column"))
    assert isinstance(error, StoreRefused)
    assert not isinstance(error, StoreMisconfigured)


@pytest.mark.parametrize("error", [exc.TimeoutError("no free connection"), exc.PendingRollbackError("broken")])
def test_a_connection_that_cannot_be_had_is_an_unavailable_store(error: Exception) -> None:
    with pytest.raises(StoreUnavailable), driver_errors():
        raise error


def test_a_fault_in_a_statement_does_not_look_like_a_store_that_is_away() -> None:
    with pytest.raises(exc.SQLAlchemyError), driver_errors():
        raise exc.CompileError("no such column")
