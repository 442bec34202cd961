"""The drivers' errors by their meaning: try again, never again, or check the schema.

Classified by number, as the texts quote people's data.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

import sqlalchemy as sa
from asyncmy.constants import CR, ER
from asyncmy.errors import MySQLError

from clerk_sync.outcomes import Reason

_T = TypeVar("_T")


class DatabaseUnavailable(Exception):
    """The database cannot do this now, and nothing was kept. Try again."""


class Contention(DatabaseUnavailable):
    """Another transaction was in the way. Retry at once."""


class LockWaitTimeout(DatabaseUnavailable):
    """Another transaction has held a row's lock for longer than events may wait."""


class SchemaChanged(DatabaseUnavailable):
    """A table or a column is missing."""


class RejectedByDatabase(Exception):
    """The database rejects this row. `reason` is the quarantine's.

    `reason` is None for an unknown error, which may be the row's fault or not. `depends` says that
    other rows are why, so that another event may unblock it: a parent that is missing, a unique
    value that is taken.
    """

    def __init__(self, reason: Reason | None, message: str, *, depends: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.depends = depends


class ErrorNumber(IntEnum):
    """Numbers of MySQL's and MariaDB's errors that asyncmy's `ER` lacks or names otherwise.

    https://dev.mysql.com/doc/mysql-errors/9.4/en/server-error-reference.html,
    https://mariadb.com/docs/server/reference/error-codes/mariadb-error-code-reference
    """

    AUTOINC_OUT_OF_RANGE = 167  # HA_ERR_AUTOINC_ERANGE, of MariaDB's storage engines
    AUTOINC_READ_FAILED = 1467
    DUP_ENTRY_WITH_KEY_NAME = 1586
    SIGNAL_EXCEPTION = 1644
    DATA_OUT_OF_RANGE = 1690
    ACCESS_DENIED_NO_PASSWORD = 1698
    CANT_EXECUTE_IN_READ_ONLY_TRANSACTION = 1792
    READ_ONLY_MODE = 1836
    WARNING_NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN = 1906  # MariaDB's
    CONNECTION_KILLED = 1927  # MariaDB's
    STATEMENT_TIMEOUT = 1969  # MariaDB's
    QUERY_TIMEOUT = 3024
    TRANSACTION_ROLLBACK_DURING_COMMIT = 3101
    NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN = 3105
    INVALID_JSON_TEXT = 3140
    SECURE_TRANSPORT_REQUIRED = 3159
    LOCK_NOWAIT = 3572
    CHECK_CONSTRAINT_VIOLATED = 3819
    CANNOT_CONVERT_STRING = 3854
    IMPOSSIBLE_STRING_CONVERSION = 3988
    CLIENT_INTERACTION_TIMEOUT = 4031


@dataclass(frozen=True, slots=True)
class _Meaning:
    """The meaning of an error number.

    `becomes` is the exception, or the reason of a RejectedByDatabase. `text` is added to the
    number wherever it is shown, `advice` only to what an operator reads at the start or from a
    command. `lasting` says that every attempt ends like this until somebody acts.
    """

    becomes: type[DatabaseUnavailable] | Reason
    text: str = ""
    depends: bool = False
    advice: str | None = None
    lasting: bool = False


_NO_TLS: Final = "the server offers no TLS; if that is meant, ?tls=disable or DATABASE_TLS=disable"
_WANTS_TLS: Final = (
    "the server accepts no connection without TLS: leave ?tls=disable or DATABASE_TLS=disable out, "
    "or on loopback say ?tls=verify or DATABASE_TLS=verify; if its CA is your own, name it in "
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
_PRIVILEGES: Final = (
    "`serve` needs the privileges SELECT, INSERT, UPDATE, DELETE, and `migrate` CREATE, ALTER, "
    "INDEX as well; `clerk-sync migrate --print` prints the SQL for an account that has them"
)
_DATABASE: Final = "is the database's name right, and has its user any privilege on it?"
_PRIMARY: Final = "it takes no writes: the address has to lead to the primary, not to a replica"
_CONNECTIONS: Final = (
    "each process needs CLERK_SYNC_WRITERS + CLERK_SYNC_POOL_SIZE connections, and 8 more while "
    "it reconciles: allow more, or lower them, or run fewer replicas"
)
_USED_UP: Final = "the AUTO_INCREMENT column has no number left, it needs a larger type"

# A number that is missing here is never taken for the data's fault, unless its SQLSTATE says so.
_MEANINGS: Final[dict[int, _Meaning]] = {
    # The row. Where other rows are why, another event may change that.
    ER.BAD_NULL_ERROR: _Meaning(Reason.NOT_NULL),
    ER.NO_DEFAULT_FOR_FIELD: _Meaning(Reason.NOT_NULL),
    ER.DUP_ENTRY: _Meaning(Reason.CONFLICT, depends=True),
    ErrorNumber.DUP_ENTRY_WITH_KEY_NAME: _Meaning(Reason.CONFLICT, depends=True),
    # MySQL reports a used-up AUTO_INCREMENT as DUP_ENTRY.
    ErrorNumber.AUTOINC_OUT_OF_RANGE: _Meaning(Reason.CONFLICT, _USED_UP, depends=True),
    ErrorNumber.AUTOINC_READ_FAILED: _Meaning(Reason.CONFLICT, _USED_UP, depends=True),
    ER.DATA_TOO_LONG: _Meaning(Reason.TOO_LONG),
    ER.NET_PACKET_TOO_LARGE: _Meaning(Reason.TOO_LONG),
    ER.WARN_DATA_OUT_OF_RANGE: _Meaning(Reason.OUT_OF_RANGE),
    ErrorNumber.DATA_OUT_OF_RANGE: _Meaning(Reason.OUT_OF_RANGE),
    ER.DATETIME_FUNCTION_OVERFLOW: _Meaning(Reason.OUT_OF_RANGE),
    ER.WARN_DATA_TRUNCATED: _Meaning(Reason.WRONG_TYPE),
    ER.TRUNCATED_WRONG_VALUE: _Meaning(Reason.WRONG_TYPE),
    ER.TRUNCATED_WRONG_VALUE_FOR_FIELD: _Meaning(Reason.WRONG_TYPE),
    ER.ILLEGAL_VALUE_FOR_TYPE: _Meaning(Reason.WRONG_TYPE),
    ER.WRONG_VALUE_FOR_TYPE: _Meaning(Reason.WRONG_TYPE),
    ErrorNumber.INVALID_JSON_TEXT: _Meaning(Reason.WRONG_TYPE),
    ErrorNumber.IMPOSSIBLE_STRING_CONVERSION: _Meaning(Reason.WRONG_TYPE),
    # A name to adopt by that the column's character set lacks: MySQL's number, MariaDB's.
    ErrorNumber.CANNOT_CONVERT_STRING: _Meaning(Reason.WRONG_TYPE),
    ER.CANT_AGGREGATE_2COLLATIONS: _Meaning(Reason.WRONG_TYPE),
    ER.ROW_IS_REFERENCED_2: _Meaning(Reason.REFUSED, depends=True),
    ER.NO_REFERENCED_ROW_2: _Meaning(Reason.REFUSED, depends=True),
    ER.ROW_IS_REFERENCED: _Meaning(Reason.REFUSED, depends=True),
    ER.NO_REFERENCED_ROW: _Meaning(Reason.REFUSED, depends=True),
    ErrorNumber.CHECK_CONSTRAINT_VIOLATED: _Meaning(Reason.REFUSED),
    ER.CONSTRAINT_FAILED: _Meaning(Reason.REFUSED),  # MariaDB's
    ErrorNumber.NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN: _Meaning(Reason.REFUSED),
    ErrorNumber.WARNING_NON_DEFAULT_VALUE_FOR_GENERATED_COLUMN: _Meaning(Reason.REFUSED),
    ErrorNumber.SIGNAL_EXCEPTION: _Meaning(Reason.REFUSED),  # a trigger's own words
    # Other transactions.
    ER.LOCK_DEADLOCK: _Meaning(Contention, "deadlock"),
    ErrorNumber.TRANSACTION_ROLLBACK_DURING_COMMIT: _Meaning(Contention),
    ER.LOCK_WAIT_TIMEOUT: _Meaning(LockWaitTimeout, "a row is locked by another transaction"),
    ErrorNumber.LOCK_NOWAIT: _Meaning(LockWaitTimeout),
    # The schema.
    ER.BAD_FIELD_ERROR: _Meaning(SchemaChanged, "a column is missing"),
    ER.NO_SUCH_TABLE: _Meaning(SchemaChanged, "a table is missing"),
    ER.WRONG_VALUE_COUNT_ON_ROW: _Meaning(SchemaChanged),
    ER.BAD_DB_ERROR: _Meaning(SchemaChanged, advice=_DATABASE),
    # Access.
    ER.DBACCESS_DENIED_ERROR: _Meaning(DatabaseUnavailable, advice=_DATABASE, lasting=True),
    ER.ACCESS_DENIED_ERROR: _Meaning(
        DatabaseUnavailable,
        "access denied, the username or the password is wrong",
        advice=_CREDENTIALS,
        lasting=True,
    ),
    ErrorNumber.ACCESS_DENIED_NO_PASSWORD: _Meaning(
        DatabaseUnavailable, advice=_CREDENTIALS, lasting=True
    ),
    ER.HOST_IS_BLOCKED: _Meaning(DatabaseUnavailable, lasting=True),
    ER.HOST_NOT_PRIVILEGED: _Meaning(DatabaseUnavailable, advice=_CREDENTIALS, lasting=True),
    ErrorNumber.SECURE_TRANSPORT_REQUIRED: _Meaning(
        DatabaseUnavailable, advice=_WANTS_TLS, lasting=True
    ),
    ER.TABLEACCESS_DENIED_ERROR: _Meaning(
        DatabaseUnavailable,
        "the user may not do this: it needs SELECT, INSERT, UPDATE, DELETE",
        advice=_PRIVILEGES,
        lasting=True,
    ),
    ER.COLUMNACCESS_DENIED_ERROR: _Meaning(DatabaseUnavailable, advice=_PRIVILEGES, lasting=True),
    ER.SPECIFIC_ACCESS_DENIED_ERROR: _Meaning(
        DatabaseUnavailable, advice=_PRIVILEGES, lasting=True
    ),
    # Capacity.
    ER.DISK_FULL: _Meaning(DatabaseUnavailable, "the disk is full"),
    ER.ERROR_ON_WRITE: _Meaning(DatabaseUnavailable),
    ER.GET_ERRNO: _Meaning(
        DatabaseUnavailable, "the storage engine failed, as when the disk is full"
    ),
    ER.RECORD_FILE_FULL: _Meaning(DatabaseUnavailable, "the table is full"),
    ER.OUT_OF_RESOURCES: _Meaning(DatabaseUnavailable),
    ER.CON_COUNT_ERROR: _Meaning(DatabaseUnavailable, "too many connections", advice=_CONNECTIONS),
    ER.TOO_MANY_USER_CONNECTIONS: _Meaning(
        DatabaseUnavailable, "the user has too many connections", advice=_CONNECTIONS
    ),
    ER.USER_LIMIT_REACHED: _Meaning(
        DatabaseUnavailable,
        "the user has too many connections, or is limited otherwise",
        advice=_CONNECTIONS,
    ),
    # Read-only, as after a failover.
    ER.OPEN_AS_READONLY: _Meaning(DatabaseUnavailable, "the table is read-only"),
    ER.OPTION_PREVENTS_STATEMENT: _Meaning(
        DatabaseUnavailable, "the server is read-only", advice=_PRIMARY
    ),
    ErrorNumber.CANT_EXECUTE_IN_READ_ONLY_TRANSACTION: _Meaning(
        DatabaseUnavailable, "the transaction is read-only", advice=_PRIMARY
    ),
    ErrorNumber.READ_ONLY_MODE: _Meaning(DatabaseUnavailable, advice=_PRIMARY),
    # The statement or the connection was ended.
    ER.SERVER_SHUTDOWN: _Meaning(DatabaseUnavailable),
    ER.NORMAL_SHUTDOWN: _Meaning(DatabaseUnavailable),
    ER.NO_SUCH_THREAD: _Meaning(DatabaseUnavailable),
    ER.ABORTING_CONNECTION: _Meaning(DatabaseUnavailable),
    ER.NEW_ABORTING_CONNECTION: _Meaning(DatabaseUnavailable),
    ER.NET_READ_INTERRUPTED: _Meaning(DatabaseUnavailable),
    ER.NET_ERROR_ON_WRITE: _Meaning(DatabaseUnavailable),
    ER.NET_WRITE_INTERRUPTED: _Meaning(DatabaseUnavailable),
    ER.QUERY_INTERRUPTED: _Meaning(DatabaseUnavailable),
    ErrorNumber.CONNECTION_KILLED: _Meaning(DatabaseUnavailable),
    ErrorNumber.CLIENT_INTERACTION_TIMEOUT: _Meaning(DatabaseUnavailable),
    ErrorNumber.STATEMENT_TIMEOUT: _Meaning(
        DatabaseUnavailable, "the server's max_statement_time ended the statement"
    ),
    ErrorNumber.QUERY_TIMEOUT: _Meaning(
        DatabaseUnavailable, "the server's max_execution_time ended the statement"
    ),
    CR.CR_CONN_HOST_ERROR: _Meaning(DatabaseUnavailable, "cannot connect"),
    CR.CR_SERVER_GONE_ERROR: _Meaning(DatabaseUnavailable, "the connection is gone"),
    CR.CR_SERVER_LOST: _Meaning(DatabaseUnavailable, "the connection was lost"),
    CR.CR_AUTH_PLUGIN_CANNOT_LOAD: _Meaning(DatabaseUnavailable, advice=_PLUGIN, lasting=True),
}
# The operating system's numbers, and those of the client library.
_CONNECTION_ERRORS: Final = (range(1000), range(CR.CR_ERROR_FIRST, 3000))
# SQLSTATE's classes of what is wrong with the row: data exception, integrity constraint, and what a
# trigger of the app's signals.
_ROW_CLASSES: Final = ("22", "23", "45")
# Vitess reports most troubles as UNKNOWN_ERROR, and only their text tells them apart
# (https://github.com/vitessio/vitess/issues/8000).
_VITESS_TRANSIENT: Final = re.compile(
    r"code = (Aborted|Unavailable|ResourceExhausted|FailedPrecondition|DeadlineExceeded)"
    r"|exceeded timeout|wrong tablet type|transaction pool|connection limit exceeded"
)

# What to do about errors that only their text tells apart.
_ADVICE_BY_TEXT: Final[dict[str, str]] = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "does not support SSL": _NO_TLS,
    "insecure transport": _WANTS_TLS,  # TiDB's words for SECURE_TRANSPORT_REQUIRED
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


def _explain(error: Exception) -> str:
    """Return an engine's error for an operator: the driver's own words, and what to do."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error
    words = f"{type(cause).__name__}: {cause}"
    meaning = _MEANINGS.get(_number(cause)) if isinstance(cause, MySQLError) else None
    advice = meaning.advice if meaning else None
    for sign, by_text in _ADVICE_BY_TEXT.items():
        advice = advice or (by_text if sign in words else None)
    return f"{words}: {advice}" if advice else words


@contextmanager
def translate_engine_errors() -> Iterator[None]:
    """Turn what fails in SQLAlchemy's engine within into DatabaseUnavailable, for an operator.

    Raises its subclasses Contention and LockWaitTimeout where those are why.
    """
    try:
        yield
    # The driver's own checks end in a RuntimeError, a connection that is cut in an EOFError.
    except (sa.exc.SQLAlchemyError, OSError, EOFError, RuntimeError) as error:
        raise _unavailability(error)(_explain(error)) from error


def _unavailability(error: Exception) -> type[DatabaseUnavailable]:
    known: Exception | None = None
    match getattr(error, "orig", None):
        case MySQLError() as cause:
            known = _mysql_error(cause)
        case sqlite3.Error() as cause:
            known = _sqlite_error(cause)
    return type(known) if isinstance(known, Contention | LockWaitTimeout) else DatabaseUnavailable


async def translated(work: Awaitable[_T], seconds: float | None) -> _T:
    """Await the driver for at most `seconds`, and raise its errors as those of this module."""
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


def _number(error: MySQLError) -> int:
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


def _mysql_error(error: MySQLError) -> Exception:
    """Classify by number. Only the number is shown, as the error's text quotes people's data."""
    number = _number(error)
    meaning = _MEANINGS.get(number)
    text = f"MySQL error {number}" + (f": {meaning.text}" if meaning and meaning.text else "")
    if number == CR.CR_CONN_HOST_ERROR:  # nothing was sent yet, so that its text quotes no data
        return DatabaseUnavailable(str(error.args[1]))
    if number == ER.UNKNOWN_ERROR:
        transient = _VITESS_TRANSIENT.search(str(error))
        return Contention(text) if transient else RejectedByDatabase(None, text)
    if meaning is not None:
        if isinstance(meaning.becomes, Reason):
            return RejectedByDatabase(meaning.becomes, text, depends=meaning.depends)
        return meaning.becomes(text)
    if any(number in numbers for numbers in _CONNECTION_ERRORS):
        return DatabaseUnavailable(text)
    known = str(error.sqlstate).startswith(_ROW_CLASSES)
    return RejectedByDatabase(Reason.REFUSED if known else None, text)


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
    # SQLITE_ERROR is a statement that does not compile: here, a table or column is missing.
    return SchemaChanged(text) if name == "SQLITE_ERROR" else DatabaseUnavailable(text)


# The client library's own: no connection, or one that was lost.
_DISCONNECTED: Final = frozenset(
    {
        CR.CR_CONNECTION_ERROR,
        CR.CR_CONN_HOST_ERROR,
        CR.CR_SERVER_GONE_ERROR,
        CR.CR_SERVER_LOST,
        CR.CR_SERVER_LOST_EXTENDED,
    }
)


def is_transient(error: DatabaseUnavailable) -> bool:
    """Whether waiting may help: a failover, a full disk, too many connections, a lock.

    A wrong password, or a certificate that is not accepted, stays as it is.
    """
    cause: BaseException | None = error
    while cause is not None:
        driver = getattr(cause, "orig", None) or cause
        if isinstance(driver, MySQLError):
            return _passes(_number(driver)) and "CERTIFICATE_VERIFY_FAILED" not in str(driver)
        cause = cause.__cause__
    return True


def _passes(number: int) -> bool:
    if number in _DISCONNECTED or number == ER.UNKNOWN_ERROR:  # all that Vitess reports
        return True
    meaning = _MEANINGS.get(number)
    if meaning is None or isinstance(meaning.becomes, Reason):
        return False
    return not meaning.lasting and not issubclass(meaning.becomes, SchemaChanged)
