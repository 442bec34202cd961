"""What the drivers' errors mean: try again, never again, or look at the schema."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import sqlalchemy as sa
from asyncmy.errors import MySQLError

from clerk_sync.outcomes import Reason

_T = TypeVar("_T")


class DatabaseUnavailable(Exception):
    """The database cannot take this now, and nothing was kept; the same again may work."""


class Contention(DatabaseUnavailable):
    """Another transaction was in the way: retry at once."""


class LockWaitTimeout(DatabaseUnavailable):
    """A row is held by somebody else's transaction, for longer than events may wait."""


class SchemaChanged(DatabaseUnavailable):
    """A table or column is not there (any more)."""


class RejectedByDatabase(Exception):
    """The database refuses this data; `reason` is for the quarantine.

    `reason` None marks an error that we do not know: it may be the data, and may be not.
    `depends` says that other rows are why, so that another event may lift it: a parent that is
    not there yet, a unique value that is not free yet.
    """

    def __init__(self, reason: Reason | None, message: str, *, depends: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.depends = depends


# https://dev.mysql.com/doc/mysql-errors/9.4/en/server-error-reference.html
_REFUSALS: Final[dict[int, Reason]] = {
    1048: Reason.NOT_NULL,  # ER_BAD_NULL_ERROR
    1364: Reason.NOT_NULL,  # ER_NO_DEFAULT_FOR_FIELD
    1062: Reason.CONFLICT,  # ER_DUP_ENTRY
    1586: Reason.CONFLICT,  # ER_DUP_ENTRY_WITH_KEY_NAME
    1406: Reason.TOO_LONG,  # ER_DATA_TOO_LONG
    1153: Reason.TOO_LONG,  # ER_NET_PACKET_TOO_LARGE
    1264: Reason.OUT_OF_RANGE,  # ER_WARN_DATA_OUT_OF_RANGE
    1690: Reason.OUT_OF_RANGE,  # ER_DATA_OUT_OF_RANGE
    1441: Reason.OUT_OF_RANGE,  # ER_DATETIME_FUNCTION_OVERFLOW
    1265: Reason.WRONG_TYPE,  # WARN_DATA_TRUNCATED
    1292: Reason.WRONG_TYPE,  # ER_TRUNCATED_WRONG_VALUE
    1366: Reason.WRONG_TYPE,  # ER_TRUNCATED_WRONG_VALUE_FOR_FIELD
    1367: Reason.WRONG_TYPE,  # ER_ILLEGAL_VALUE_FOR_TYPE
    1411: Reason.WRONG_TYPE,  # ER_WRONG_VALUE_FOR_TYPE
    3140: Reason.WRONG_TYPE,  # ER_INVALID_JSON_TEXT
    3988: Reason.WRONG_TYPE,  # ER_IMPOSSIBLE_STRING_CONVERSION
    3854: Reason.WRONG_TYPE,  # ER_CANNOT_CONVERT_STRING, of a name to adopt by
    1267: Reason.WRONG_TYPE,  # MariaDB's for the same: ER_CANT_AGGREGATE_2COLLATIONS
    1451: Reason.REFUSED,  # ER_ROW_IS_REFERENCED_2
    1452: Reason.REFUSED,  # ER_NO_REFERENCED_ROW_2
    1217: Reason.REFUSED,  # ER_ROW_IS_REFERENCED
    1216: Reason.REFUSED,  # ER_NO_REFERENCED_ROW
    3819: Reason.REFUSED,  # ER_CHECK_CONSTRAINT_VIOLATED
    3105: Reason.REFUSED,  # ER_NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN
    1906: Reason.REFUSED,  # MariaDB's ER_WARNING_NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN
    4025: Reason.REFUSED,  # MariaDB's ER_CONSTRAINT_FAILED
    1644: Reason.REFUSED,  # ER_SIGNAL_EXCEPTION, a trigger's own words
}
# An AUTO_INCREMENT column that is used up: MariaDB's words for what is 1062 on MySQL.
_NUMBERS_USED_UP: Final = frozenset({167, 1467})
_DEPENDS: Final = frozenset({1062, 1586, 1451, 1452, 1216, 1217})
_CONTENTION: Final = frozenset({1213, 3101})
_LOCK_WAIT: Final = frozenset({1205, 3572})
_SCHEMA: Final = frozenset({1054, 1146, 1136, 1049})
# Errors that say nothing about the data: access, capacity, shutdown, read-only, disk.
_UNAVAILABLE: Final = frozenset(
    {
        1021,
        1026,
        1030,
        1036,
        1792,
        1040,
        1041,
        1044,
        1045,
        1053,
        1077,
        1094,
        1129,
        1130,
        1142,
        1143,
        1152,
        1159,
        1160,
    }
    | {1161, 1184, 1203, 1226, 1227, 1290, 1317, 1836, 1927, 3024, 3159, 4031, 1969, 1114}
)
_WORDS: Final[dict[int, str]] = {
    167: ": the AUTO_INCREMENT column has no number left, it needs a larger type",
    1021: ": the disk is full",
    1030: ": the storage engine failed, as when the disk is full",
    1036: ": the table is read-only",
    1040: ": too many connections",
    1045: ": access denied, the username or the password is wrong",
    1054: ": a column is not there",
    1114: ": the table is full",
    1142: ": the user may not do this: it needs SELECT, INSERT, UPDATE, DELETE",
    1146: ": a table is not there",
    1203: ": the user has too many connections",
    1205: ": a row is locked by another transaction",
    1213: ": deadlock",
    1226: ": the user has too many connections, or is limited otherwise",
    1290: ": the server is read-only",
    1467: ": the AUTO_INCREMENT column has no number left, it needs a larger type",
    1792: ": the transaction is read-only",
    1969: ": the server's max_statement_time ended the statement",
    2003: ": cannot connect",
    2006: ": the connection is gone",
    2013: ": the connection was lost",
    3024: ": the server's max_execution_time ended the statement",
}
# Vitess reports most troubles as 1105 and tells them apart by text
# (https://github.com/vitessio/vitess/issues/8000).
_VITESS_TRANSIENT: Final = re.compile(
    r"code = (Aborted|Unavailable|ResourceExhausted|FailedPrecondition|DeadlineExceeded)"
    r"|exceeded timeout|wrong tablet type|transaction pool|connection limit exceeded"
)


_NO_TLS: Final = "the server offers no TLS; if that is meant, ?tls=disable or DATABASE_TLS=disable"
_WANTS_TLS: Final = (
    "the server takes nobody without TLS: leave ?tls=disable or DATABASE_TLS=disable out, or on "
    "loopback say ?tls=verify or DATABASE_TLS=verify; if its CA is your own, name it in "
    "?tls_ca=/path/ca.pem or DATABASE_TLS_CA"
)
_CREDENTIALS: Final = (
    "the username or the password is wrong, or the user may not come from here, or not without "
    "TLS: ?tls=verify or DATABASE_TLS=verify"
)
_NAME: Final = (
    "the host has to be one that the certificate names; where none is, as in certificates that "
    "MySQL makes for itself, ?tls=verify-ca or DATABASE_TLS=verify-ca verifies the CA alone"
)
_PLUGIN: Final = (
    "let the account log in by caching_sha2_password (MySQL) or mysql_native_password (MariaDB)"
)
_RIGHTS: Final = (
    "`serve` needs the rights SELECT, INSERT, UPDATE, DELETE, and `migrate` CREATE, ALTER, INDEX "
    "as well; `clerk-sync migrate --print` prints the SQL for somebody who has them"
)
_DATABASE: Final = "is the database's name right, and has its user any right on it?"
_PRIMARY: Final = "it takes no writes: the address has to lead to the primary, not to a replica"
_CONNECTIONS: Final = (
    "each process needs CLERK_SYNC_WRITERS + CLERK_SYNC_POOL_SIZE connections, and 8 more while "
    "it reconciles: allow more, or lower them, or run fewer replicas"
)
# What to do about what the driver says, by number, and by what is in its text.
_ADVICE: Final[dict[int, str]] = {
    1040: _CONNECTIONS,
    1044: _DATABASE,
    1045: _CREDENTIALS,
    1049: _DATABASE,
    1130: _CREDENTIALS,
    1142: _RIGHTS,
    1143: _RIGHTS,
    1203: _CONNECTIONS,
    1226: _CONNECTIONS,
    1227: _RIGHTS,
    1290: _PRIMARY,
    1698: _CREDENTIALS,
    1792: _PRIMARY,
    1836: _PRIMARY,
    2059: _PLUGIN,
    3159: _WANTS_TLS,
}
_ADVICE_BY_TEXT: Final[dict[str, str]] = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "does not support SSL": _NO_TLS,
    "insecure transport": _WANTS_TLS,  # TiDB's words for 3159
    "mismatch, certificate": _NAME,
    "certificate is not valid for": _NAME,
    "has expired": "the server needs a new certificate, if the clock of this machine is right",
    "not yet valid": "is the clock of this machine right?",
    "PROTOCOL_VERSION": "the server speaks no TLS of 1.2 or later: it has to be updated",
    "UNSUPPORTED_PROTOCOL": "the server speaks no TLS of 1.2 or later: it has to be updated",
    "ed25519": _PLUGIN,
    "CERTIFICATE_VERIFY_FAILED": "if its CA is your own, name it in ?tls_ca=/path/ca.pem or "
    "DATABASE_TLS_CA; if TLS is not meant, ?tls=disable or DATABASE_TLS=disable",
    "refused": "is the server up, and are host and port right?",
    "Name or service not known": "is the host right?",
    "did not let us in": "is the server well, and does a firewall or network policy let this out?",
}


def _told(error: Exception) -> str:
    """An error of SQLAlchemy's, for people: the driver's own words, and what to do."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    said = f"{type(cause).__name__}: {cause}"
    number = cause.args[0] if isinstance(cause, MySQLError) and cause.args else None
    advice = _ADVICE.get(number) if isinstance(number, int) else None
    for words, meant in _ADVICE_BY_TEXT.items():
        advice = advice or (meant if words in said else None)
    return f"{said}: {advice}" if advice else said


@contextmanager
def translate_engine_errors() -> Iterator[None]:
    """Within, what fails in SQLAlchemy's engine is DatabaseUnavailable, in words for people.

    It is Contention or LockWait where that is why.
    """
    try:
        yield
    # The driver's own checks end in a RuntimeError, a connection that is cut in an EOFError.
    except (sa.exc.SQLAlchemyError, OSError, EOFError, RuntimeError) as error:
        raise _unavailability(error)(_told(error)) from error


def _unavailability(error: Exception) -> type[DatabaseUnavailable]:
    known: Exception | None = None
    match getattr(error, "orig", None):
        case MySQLError() as cause:
            known = _mysql_error(cause)
        case sqlite3.Error() as cause:
            known = _sqlite_error(cause)
    return type(known) if isinstance(known, Contention | LockWaitTimeout) else DatabaseUnavailable


async def translated(work: Awaitable[_T], seconds: float | None) -> _T:
    """Await the driver, with its errors in this module's words."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except MySQLError as error:
        raise _mysql_error(error) from error
    except sqlite3.Error as error:
        raise _sqlite_error(error) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise RejectedByDatabase(Reason.OUT_OF_RANGE, "value does not fit the driver") from error
    except TimeoutError as error:
        raise DatabaseUnavailable("the database did not answer in time") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise DatabaseUnavailable(f"no connection: {type(error).__name__}") from error


def _mysql_error(error: MySQLError) -> Exception:
    """By number. Only the number goes into the message: the text quotes people's data."""
    number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"MySQL error {number}{_WORDS.get(number, '')}"
    if number == 2003:  # noqa: PLR2004 -- CR_CONN_HOST_ERROR: nothing was said yet, by anybody
        return DatabaseUnavailable(str(error.args[1]))
    if number in _REFUSALS:
        return RejectedByDatabase(_REFUSALS[number], text, depends=number in _DEPENDS)
    if number in _NUMBERS_USED_UP:
        return RejectedByDatabase(Reason.CONFLICT, text, depends=True)
    if number in _CONTENTION:
        return Contention(text)
    if number in _LOCK_WAIT:
        return LockWaitTimeout(text)
    if number in _SCHEMA:
        return SchemaChanged(text)
    if number == 1105:  # noqa: PLR2004 -- ER_UNKNOWN_ERROR
        transient = _VITESS_TRANSIENT.search(str(error))
        return Contention(text) if transient else RejectedByDatabase(None, text)
    if number < 1000 or 2000 <= number < 3000 or number in _UNAVAILABLE:  # noqa: PLR2004
        return DatabaseUnavailable(text)  # the client library's own numbers, and the list above
    # Data exception, integrity constraint, and what a trigger of the app's signals.
    if str(error.sqlstate)[:2] in ("22", "23", "45"):
        return RejectedByDatabase(Reason.REFUSED, text)
    return RejectedByDatabase(None, text)


def _sqlite_error(error: sqlite3.Error) -> Exception:
    name = getattr(error, "sqlite_errorname", "")
    text = f"SQLite error {name or type(error).__name__}"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Contention(text)
    if name == "SQLITE_CONSTRAINT_NOTNULL":
        return RejectedByDatabase(Reason.NOT_NULL, text)
    if name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"):
        return RejectedByDatabase(Reason.CONFLICT, text, depends=True)
    if name.startswith("SQLITE_CONSTRAINT"):
        foreign = name == "SQLITE_CONSTRAINT_FOREIGNKEY"
        return RejectedByDatabase(Reason.REFUSED, text, depends=foreign)
    if name == "SQLITE_TOOBIG":
        return RejectedByDatabase(Reason.TOO_LONG, text)
    if name == "SQLITE_MISMATCH" or isinstance(error, sqlite3.InterfaceError):
        return RejectedByDatabase(Reason.WRONG_TYPE, text)
    # SQLITE_ERROR is a statement that does not compile: here, a table or column that went.
    return SchemaChanged(text) if name == "SQLITE_ERROR" else DatabaseUnavailable(text)


# Access is denied, or only TLS is accepted: every attempt ends like this until somebody acts.
_DENIED: Final = frozenset({1044, 1045, 1129, 1130, 1142, 1143, 1227, 3159})
# The client library's own: no connection, or one that was lost.
_DISCONNECTED: Final = frozenset({2002, 2003, 2006, 2013, 2055})
_TRANSIENT: Final = (
    (_UNAVAILABLE - _DENIED) | _CONTENTION | _LOCK_WAIT | _DISCONNECTED | {1105}  # Vitess' all
)


def is_transient(error: DatabaseUnavailable) -> bool:
    """Whether waiting may help: a failover, a full disk, too many connections, a lock.

    A wrong password, or a certificate that is not accepted, stays as it is.
    """
    cause: BaseException | None = error
    while cause is not None:
        driver = getattr(cause, "orig", None) or cause
        if isinstance(driver, MySQLError) and driver.args:
            return driver.args[0] in _TRANSIENT and "CERTIFICATE_VERIFY_FAILED" not in str(driver)
        cause = cause.__cause__
    return True
