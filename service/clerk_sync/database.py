"""Where the database is, how to reach it, and what its errors mean.

A Connection runs a script: several statements in one round trip where the server can. It
knows nothing of what they say.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import sqlite3
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import asyncmy
import sqlalchemy as sa
from asyncmy.errors import MySQLError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from clerk_sync.answers import Reason

CONNECT_SECONDS: Final = 4

_T = TypeVar("_T")


class InvalidDatabase(ValueError):  # noqa: N818
    """A database address that cannot be used. The message never repeats a password."""


class Unavailable(Exception):  # noqa: N818
    """The database cannot take this now, and nothing was kept; the same again may work."""


class Contention(Unavailable):
    """Another transaction was in the way: retry at once."""


class SchemaChanged(Unavailable):
    """A table or column is not there (any more)."""


class Refused(Exception):  # noqa: N818
    """The database refuses this data and always will; `reason` is for the quarantine.

    `reason` None marks an error that we do not know: it may be the data, and may be not.
    """

    def __init__(self, reason: Reason | None, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is. `path` is SQLite's file, the rest MySQL's; `tls` None is plain."""

    path: str | None = None
    host: str = ""
    port: int = 3306
    name: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """The address without its secrets, for people."""
        if self.path is not None:
            return f"sqlite {self.path}"
        return f"mysql {self.host}:{self.port}/{self.name}"


Locate = Callable[[], Target]
"""Gives the target anew for every connection: its password may come from a rotated file."""


def target_of(url: str) -> Target:
    """Read `DATABASE_URL`. Raises InvalidDatabase."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidDatabase(
            "is not a URL: write mysql://USER:PASSWORD@HOST:3306/DATABASE, "
            "with @ : / ? # % in the password percent-encoded"
        ) from None
    scheme = parsed.drivername.partition("+")[0]
    if scheme == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise InvalidDatabase("names no file: write sqlite:///clerk-sync.db")
        return Target(path=parsed.database)
    if scheme not in ("mysql", "mariadb"):
        raise InvalidDatabase(f"has the scheme `{scheme}`: use mysql:// (MariaDB too) or sqlite://")
    if url.count("@") > 1:
        # What follows the first would be taken for an address, and shown to people.
        raise InvalidDatabase("has an @ too many: write the one in the password as %40")
    options = {name: str(value) for name, value in parsed.query.items()}
    # What PlanetScale's dashboard appends for Prisma and for Node drivers: verified TLS.
    if options.pop("sslaccept", "strict") != "strict":
        raise InvalidDatabase("asks for unverified TLS by `sslaccept`: use ?tls=verify or disable")
    if re.sub(r"\s", "", options.pop("ssl", '{"rejectUnauthorized":true}')) not in (
        '{"rejectUnauthorized":true}',
        "true",
    ):
        raise InvalidDatabase("has an `ssl` option: use ?tls=verify or ?tls=disable instead")
    tls = options.pop("tls", None)
    tls_ca = options.pop("tls_ca", None)
    if options:
        raise InvalidDatabase(f"has an unknown option `{min(options)}`: there is tls and tls_ca")
    return mysql_target(
        host=parsed.host or "",
        port=parsed.port or 3306,
        name=parsed.database or "",
        username=parsed.username or "",
        password=parsed.password or "",
        tls=tls,
        tls_ca=tls_ca,
    )


def mysql_target(
    *,
    host: str,
    port: int,
    name: str,
    username: str,
    password: str,
    tls: str | None = None,
    tls_ca: str | None = None,
) -> Target:
    """A MySQL target from its pieces. Raises InvalidDatabase."""
    pieces = {"host": host, "database name": name, "username": username}
    missing = [what for what, value in pieces.items() if not value]
    if missing:
        raise InvalidDatabase(f"names no {' and no '.join(missing)}")
    if not 1 <= port <= 65535:  # noqa: PLR2004 -- there are no others
        raise InvalidDatabase(f"has the port {port}: MySQL's is 3306")
    if tls not in (None, "verify", "disable"):
        raise InvalidDatabase("has an unknown `tls`: it is `verify` (default) or `disable`")
    context = None
    if tls == "verify" or (tls is None and (tls_ca or not _is_loopback(host))):
        try:
            context = ssl.create_default_context(cafile=tls_ca)
        except (OSError, ssl.SSLError):
            raise InvalidDatabase(f"names a `tls_ca` that is no PEM file: {tls_ca}") from None
    return Target(None, host, port, name, username, password, context)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class Statement:
    """Compiled SQL in the connection's own placeholder style.

    With `values`, the row template of an INSERT, any number of rows is one statement of the
    server's; without it, one statement runs per row of parameters.
    """

    head: str
    values: str = ""
    tail: str = ""


Rows = Sequence[Sequence[Any]]
Step = tuple[Statement, Rows]
NO_PARAMETERS: Final[Rows] = ((),)


@dataclass(frozen=True, slots=True)
class Result:
    """What one statement gave: rows affected, and rows read."""

    affected: int
    rows: Rows


class Connection(Protocol):
    """One session with one transaction at a time, opened by the first statement."""

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        """Run all statements in order; a result for each.

        Raises Refused or Contention, after which `rollback` makes it usable again, or another
        Unavailable, after which the connection is closed.
        """
        ...

    async def rollback(self) -> None:
        """Forget the open transaction. Raises Unavailable."""
        ...

    def close(self) -> None:
        """Drop the session; the server rolls back what was open."""
        ...


COMMIT: Final[Step] = (Statement("COMMIT"), NO_PARAMETERS)


async def connect(target: Target, *, seconds: float) -> Connection:
    """Open a connection whose every round trip ends within `seconds`. Raises Unavailable."""
    if target.path is not None:
        return await _SQLiteConnection.open(target.path, seconds)
    return await _MySQLConnection.open(target, seconds)


class _MySQLConnection:
    """asyncmy without its pool: closed, never reused, once anything but data went wrong."""

    def __init__(self, connection: Any, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds

    @classmethod
    async def open(cls, target: Target, seconds: float) -> _MySQLConnection:
        return cls(await _translated(open_mysql(target, seconds), CONNECT_SECONDS), seconds)

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        literal = self._connection.literal
        texts: list[str] = []
        for statement, rows in steps:
            if statement.values:
                values = ",".join([statement.values % tuple(map(literal, row)) for row in rows])
                texts.append(f"{statement.head}{values}{statement.tail}")
            else:
                texts.extend([statement.head % tuple(map(literal, row)) for row in rows])
        return await self._guarded(self._query(";".join(texts)))

    async def _query(self, text: str) -> list[Result]:
        cursor = self._connection.cursor()
        await cursor.execute(text)
        results = []
        while True:
            rows = await cursor.fetchall() if cursor.description else ()
            results.append(Result(cursor.rowcount, rows))
            if not await cursor.nextset():
                return results

    async def rollback(self) -> None:
        await self._guarded(self._connection.rollback())

    async def _guarded(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await _translated(work, self._seconds)
        except (Refused, Contention):
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()


async def open_mysql(target: Target, seconds: float = CONNECT_SECONDS) -> Any:
    """A plain asyncmy connection, strict about data, with `autocommit` off."""
    connection = await asyncmy.connect(
        host=target.host,
        port=target.port,
        user=target.username,
        password=target.password,
        database=target.name,
        ssl=target.tls,
        charset="utf8mb4",
        autocommit=False,
        connect_timeout=CONNECT_SECONDS,
    )
    # Vitess bounds a transaction by itself, is strict by itself, and would pin a server
    # connection for every setting made here.
    if "vitess" not in connection.get_server_info().lower():
        async with connection.cursor() as cursor:
            # Without strict mode a value that is too long is cut off, silently. READ
            # COMMITTED takes no gap locks, the usual deadlock of concurrent upserts. The lock
            # wait must end before the sender's patience does.
            await cursor.execute(
                "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;"
                "SET SESSION sql_mode='TRADITIONAL',"
                f"time_zone='+00:00',innodb_lock_wait_timeout={max(1, int(seconds) - 1)}"
            )
            while await cursor.nextset():
                pass
    return connection


class _SQLiteConnection:
    """The standard library's SQLite in a thread of its own, durable at every commit."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    @classmethod
    async def open(cls, path: str, seconds: float) -> _SQLiteConnection:
        thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")

        def opened() -> sqlite3.Connection:
            connection = sqlite3.connect(
                path, timeout=max(1, seconds - 1), isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            return connection

        loop = asyncio.get_running_loop()
        return cls(await _translated(loop.run_in_executor(thread, opened), None), thread)

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        def ran() -> list[Result]:
            results = []
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            for statement, rows in steps:
                sql = f"{statement.head}{statement.values}{statement.tail}"
                if statement.values:
                    cursor = self._connection.executemany(sql, rows)
                    results.append(Result(cursor.rowcount, ()))
                    continue
                for row in rows:
                    cursor = self._connection.execute(sql, row)
                    results.append(Result(cursor.rowcount, cursor.fetchall()))
            return results

        return await self._in_thread(ran)

    async def rollback(self) -> None:
        await self._in_thread(self._connection.rollback)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        loop = asyncio.get_running_loop()
        try:
            return await _translated(loop.run_in_executor(self._thread, work), None)
        except (Refused, Contention):
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with suppress(RuntimeError):  # it is closed already
            self._thread.submit(self._connection.close)
        self._thread.shutdown(wait=False)


def engine_of(locate: Locate, *, size: int) -> AsyncEngine:
    """SQLAlchemy's pooled engine, for everything that is not the hot path.

    Statements are never shown with their parameters: those are people's data.
    """
    target = locate()
    if target.path is not None:
        return create_async_engine(f"sqlite+aiosqlite:///{target.path}", hide_parameters=True)

    async def opened() -> Any:
        return await open_mysql(locate())

    return create_async_engine(
        "mysql+asyncmy://",
        async_creator=opened,
        hide_parameters=True,
        pool_size=size,
        max_overflow=0,
        pool_timeout=CONNECT_SECONDS,
        pool_pre_ping=True,
        # PlanetScale cuts connections after a day; an hour also lets a rotated password in.
        pool_recycle=3600,
    )


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
    4025: Reason.REFUSED,  # MariaDB's ER_CONSTRAINT_FAILED
    1644: Reason.REFUSED,  # ER_SIGNAL_EXCEPTION, a trigger's own words
}
_CONTENTION: Final = frozenset({1205, 1213, 3101, 3572})
_SCHEMA: Final = frozenset({1054, 1146, 1136, 1049})
# Errors that say nothing about the data: access, capacity, shutdown, read-only, disk.
_UNAVAILABLE: Final = frozenset(
    {1021, 1040, 1041, 1044, 1045, 1053, 1077, 1094, 1129, 1130, 1142, 1143, 1152, 1159, 1160}
    | {1161, 1184, 1203, 1226, 1227, 1290, 1317, 1836, 1927, 3024, 3159, 4031, 1969, 1114}
)
# Vitess reports most troubles as 1105 and tells them apart by text
# (https://github.com/vitessio/vitess/issues/8000).
_VITESS_TRANSIENT: Final = re.compile(
    r"code = (Aborted|Unavailable|ResourceExhausted|FailedPrecondition|DeadlineExceeded)"
    r"|exceeded timeout|wrong tablet type|transaction pool|connection limit exceeded"
)


async def _translated(work: Awaitable[_T], seconds: float | None) -> _T:
    """Await the driver, with its errors in this module's words."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except MySQLError as error:
        raise _mysql_error(error) from error
    except sqlite3.Error as error:
        raise _sqlite_error(error) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise Refused(Reason.OUT_OF_RANGE, "value does not fit the driver") from error
    except TimeoutError as error:
        raise Unavailable("the database did not answer in time") from error
    except (OSError, EOFError, RuntimeError) as error:
        raise Unavailable(f"no connection: {type(error).__name__}") from error


def _mysql_error(error: MySQLError) -> Exception:
    """By number. Only the number goes into the message: the text quotes people's data."""
    number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"MySQL error {number}"
    if number == 2003:  # noqa: PLR2004 -- CR_CONN_HOST_ERROR: nothing was said yet, by anybody
        return Unavailable(str(error.args[1]))
    if number in _REFUSALS:
        return Refused(_REFUSALS[number], text)
    if number in _CONTENTION:
        return Contention(text)
    if number in _SCHEMA:
        return SchemaChanged(text)
    if number == 1105:  # noqa: PLR2004 -- ER_UNKNOWN_ERROR
        transient = _VITESS_TRANSIENT.search(str(error))
        return Contention(text) if transient else Refused(None, text)
    if number < 1000 or 2000 <= number < 3000 or number in _UNAVAILABLE:  # noqa: PLR2004
        return Unavailable(text)  # the client library's own numbers, and the list above
    return Refused(None, text)


def _sqlite_error(error: sqlite3.Error) -> Exception:
    name = getattr(error, "sqlite_errorname", "")
    text = f"SQLite error {name or type(error).__name__}"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Contention(text)
    if name == "SQLITE_CONSTRAINT_NOTNULL":
        return Refused(Reason.NOT_NULL, text)
    if name in ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"):
        return Refused(Reason.CONFLICT, text)
    if name.startswith("SQLITE_CONSTRAINT"):
        return Refused(Reason.REFUSED, text)
    if name == "SQLITE_TOOBIG":
        return Refused(Reason.TOO_LONG, text)
    if name == "SQLITE_MISMATCH" or isinstance(error, sqlite3.InterfaceError):
        return Refused(Reason.WRONG_TYPE, text)
    # SQLITE_ERROR is a statement that does not compile: here, a table or column that went.
    return SchemaChanged(text) if name == "SQLITE_ERROR" else Unavailable(text)
