"""Which errors of the database a run waits out, and which end it at once."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from asyncmy.constants import CR, ER
from asyncmy.errors import OperationalError

from clerk_sync.database.errors import DatabaseUnavailable, is_transient


def unavailable(cause: BaseException | None) -> DatabaseUnavailable:
    error = DatabaseUnavailable("away")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "number",
    [
        *(ER.CON_COUNT_ERROR, ER.SERVER_SHUTDOWN, ER.DISK_FULL, ER.LOCK_WAIT_TIMEOUT),
        *(ER.LOCK_DEADLOCK, ER.OPTION_PREVENTS_STATEMENT, ER.UNKNOWN_ERROR, 1836, 1927),
        *(CR.CR_CONN_HOST_ERROR, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST),
    ],
)
def test_what_passes_is_waited_for(number: int) -> None:
    error = OperationalError(number, "in the driver's words")
    assert is_transient(unavailable(error))
    assert is_transient(unavailable(sa.exc.DBAPIError("SELECT 1", (), error)))


@pytest.mark.parametrize(
    "number",
    [
        *(ER.ACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR, ER.HOST_NOT_PRIVILEGED, 1698, 3159),
        *(ER.BAD_DB_ERROR, ER.NO_SUCH_TABLE, ER.PARSE_ERROR, ER.DUP_ENTRY, 3118, 99_999),
        CR.CR_AUTH_PLUGIN_CANNOT_LOAD,
    ],
)
def test_what_stays_as_it_is_ends_a_run_at_once(number: int) -> None:
    error = OperationalError(number, "in the driver's words")
    assert not is_transient(unavailable(error))
    assert not is_transient(unavailable(sa.exc.DBAPIError("SELECT 1", (), error)))


def test_a_certificate_that_is_not_accepted_stays_so() -> None:
    text = "Can't connect: [SSL: CERTIFICATE_VERIFY_FAILED]"
    assert not is_transient(unavailable(OperationalError(CR.CR_CONN_HOST_ERROR, text)))


def test_no_answer_is_waited_for() -> None:
    assert is_transient(unavailable(TimeoutError()))
    assert is_transient(unavailable(None))
