"""Connections to the database, which run scripts and know nothing of what they say."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import aiosqlite
import asyncmy
from asyncmy.converters import escape_string
from asyncmy.errors import MySQLError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from clerk_sync.database.errors import (
    Contention,
    DatabaseUnavailable,
    LockWaitTimeout,
    RejectedByDatabase,
    SchemaChanged,
    translated,
)
from clerk_sync.database.url import Locate, Target
from clerk_sync.outcomes import Reason

CONNECT_SECONDS: Final = 4

# What the driver and our statements rely on: session variables, with the values that a server
# reports when they are right. It can impose others on every client, by its configuration, by SET
# GLOBAL or by init_connect. Left out is what ends in an error and is the operator's to limit, such
# as max_execution_time and wait_timeout.
_CHARSETS: Final[dict[str, Any]] = dict.fromkeys(
    ("character_set_client", "character_set_connection", "character_set_results"), "utf8mb4"
)
_SESSION: Final[dict[str, Any]] = {
    # A value that does not fit is refused, never truncated, and a 0 in an AUTO_INCREMENT column
    # stays 0. No mode changes the meaning of a backslash, a quote or an operator. Zero and invalid
    # dates are allowed: the app may have them as defaults, and ours are always real dates.
    "sql_mode": "NO_AUTO_VALUE_ON_ZERO,STRICT_TRANS_TABLES,STRICT_ALL_TABLES,ALLOW_INVALID_DATES,"
    "NO_ENGINE_SUBSTITUTION",
    "time_zone": "+00:00",
    "autocommit": 0,
    "completion_type": "NO_CHAIN",  # else COMMIT begins the next transaction, or hangs up
    "innodb_lock_wait_timeout": 1,  # it must end before the sender's patience does
    "foreign_key_checks": 1,
    "unique_checks": 1,
    "sql_auto_is_null": 0,  # else IS NULL finds the row that was inserted last
    "sql_safe_updates": 0,  # else a DELETE of owned rows without an index fails
    "sql_big_selects": 1,  # else a long SELECT fails
    "sql_select_limit": 2**64 - 1,  # else a SELECT leaves out rows
    "sql_quote_show_create": 1,  # SQLAlchemy reads SHOW CREATE TABLE
}
# Everything that is escaped, and characters that contain a backslash byte, or swallow one, where
# the server reads gbk, big5 or sjis.
_CANARY: Final = "\\'\"%;\0\n\r\x1a中'表ソ功é\xa5😀\\"
# Modes that change the meaning of statements, refused where none can be set.
_ALIEN_MODES: Final = frozenset(
    {"NO_BACKSLASH_ESCAPES", "ANSI_QUOTES", "PIPES_AS_CONCAT", "HIGH_NOT_PRECEDENCE"}
    | {"PAD_CHAR_TO_FULL_LENGTH", "NO_UNSIGNED_SUBTRACTION"}
)

_T = TypeVar("_T")


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

        Raises RejectedByDatabase, Contention, LockWaitTimeout or SchemaChanged, after which
        `rollback` makes it usable again, or another DatabaseUnavailable, after which the connection
        is closed.
        """
        ...

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        """Run all statements in order, past those that are refused; which these are, by place.

        Each step is one statement. One that is refused changes nothing, and the transaction
        stays open. Raises what `run` raises for everything else.
        """
        ...

    async def rollback(self) -> None:
        """Forget the open transaction. Raises DatabaseUnavailable."""
        ...

    def close(self) -> None:
        """Drop the session; the server rolls back what was open."""
        ...


COMMIT: Final[Step] = (Statement("COMMIT"), NO_PARAMETERS)
# Statements that are tried in one packet: behind one that is refused, the rest are sent again.
_TRIED_TOGETHER: Final = 16


async def connect(target: Target, *, seconds: float) -> Connection:
    """Open a connection whose every round trip ends within `seconds`.

    Raises DatabaseUnavailable.
    """
    if target.path is not None:
        return await _SQLiteConnection.open(target.path, seconds)
    return await _MySQLConnection.open(target, seconds)


class _MySQLConnection:
    """asyncmy without its pool: closed, never reused, once anything but data went wrong."""

    def __init__(self, connection: Any, seconds: float, largest_packet: int) -> None:
        self._connection = connection
        self._seconds = seconds
        self._largest_packet = largest_packet

    @classmethod
    async def open(cls, target: Target, seconds: float) -> _MySQLConnection:
        connection = await translated(open_mysql(target), None)
        return cls(connection, seconds, await translated(_largest_packet(connection), seconds))

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        results: list[Result] = []
        await self._guarded(self._query(self._packet(steps), results))
        return results

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
        place, together = 0, _TRIED_TOGETHER
        while place < len(steps):
            try:
                packet = self._packet(steps[place : place + together])
            except RejectedByDatabase as error:
                if together > 1:
                    together = 1  # which of them it is shows one by one
                    continue
                refused[place] = error
                place += 1
                continue
            results: list[Result] = []
            try:
                await self._guarded(self._query(packet, results))
            except (RejectedByDatabase, SchemaChanged) as error:
                refused[place + len(results)] = error
                place += 1
            place += len(results)
        return refused

    def _packet(self, steps: Sequence[Step]) -> bytes:
        """The steps as one packet. Raises RejectedByDatabase for a text that is not valid Unicode.

        And when the server would not take it: it would hang up, which looks like any lost
        connection. The driver would send some lone surrogates as raw bytes, as it does with the
        bytes of a binary value, and so store another text.
        """
        literal = self._connection.literal
        try:
            packet = _text(steps, literal).encode()
        except UnicodeEncodeError:
            try:
                packet = _text(steps, lambda value: _binary(value) or literal(value)).encode()
            except UnicodeEncodeError as error:
                raise RejectedByDatabase(
                    Reason.OUT_OF_RANGE, "a text with half of a character"
                ) from error
        if len(packet) >= self._largest_packet:
            raise RejectedByDatabase(
                Reason.TOO_LONG, f"more than max_allowed_packet={self._largest_packet}"
            )
        return packet

    async def _query(self, packet: bytes, results: list[Result]) -> None:
        """Fill in the results one by one: where a statement fails, those before it are there."""
        cursor = self._connection.cursor()
        await cursor.execute(packet)
        while True:
            rows = await cursor.fetchall() if cursor.description else ()
            results.append(Result(cursor.rowcount, rows))
            if not await cursor.nextset():
                return

    async def rollback(self) -> None:
        await self._guarded(self._connection.rollback())

    async def _guarded(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await translated(work, self._seconds)
        except (RejectedByDatabase, Contention, LockWaitTimeout, SchemaChanged):
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()


def _text(steps: Sequence[Step], literal: Callable[[Any], str]) -> str:
    texts: list[str] = []
    for statement, rows in steps:
        if statement.values:
            values = ",".join([statement.values % tuple(map(literal, row)) for row in rows])
            texts.append(f"{statement.head}{values}{statement.tail}")
        else:
            texts.extend([statement.head % tuple(map(literal, row)) for row in rows])
    return ";".join(texts)


def _binary(value: object) -> str | None:
    return f"_binary x'{value.hex()}'" if isinstance(value, bytes) else None


async def open_mysql(target: Target) -> Any:
    """A plain asyncmy connection whose session is as `_SESSION` says, whatever the server imposes.

    It is open within CONNECT_SECONDS, or raises TimeoutError; cancelled, it ends at once. Raises
    DatabaseUnavailable where the session cannot be made so.
    """
    opening = asyncio.create_task(_opened_in_time(target))
    done: set[asyncio.Task[Any]] = set()
    try:
        # Awaited directly it would not end with its caller: asyncmy connects under
        # asyncio.wait_for, which loses a cancellation that comes just as the socket connects, and
        # then waits for a server that may be frozen
        # (https://github.com/python/cpython/issues/86296, until Python 3.12).
        done, _ = await asyncio.wait({opening})
    finally:
        if not done:
            opening.add_done_callback(_dropped)
            opening.cancel()
    return opening.result()


async def _opened_in_time(target: Target) -> Any:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await _opened(target)
    except TimeoutError:
        raise TimeoutError(
            f"{target.server} did not let us in within {CONNECT_SECONDS} s"
        ) from None


async def _opened(target: Target) -> Any:
    connection = await asyncmy.connect(
        host=target.host,
        port=target.port,
        unix_socket=target.socket,
        user=target.username,
        password=target.password,
        database=target.name,
        ssl=target.tls,
        charset="utf8mb4",
        autocommit=None,  # `_prepare` sets it, with the rest
    )
    try:
        await _prepare(connection, target)
    except BaseException:
        connection.close()
        raise
    return connection


async def _prepare(connection: Any, target: Target) -> None:
    """Make the session as it has to be, and see that it is. Raises DatabaseUnavailable."""
    where = target.server
    version = connection.get_server_info().lower()
    # The driver's own goes by a status flag of the server: whether a backslash escapes. A trigger
    # that sets sql_mode leaves the flag set although the mode is restored.
    connection.escape_string = escape_string
    try:
        if "vitess" in version:
            # It bounds a transaction by itself, and would pin a server connection for every
            # other setting made here.
            await _execute(connection, "SET autocommit=0")
            faults = await _vitess_faults(connection)
        else:
            session = _session_of(version)
            values = ",".join(f"{name}={value!r}" for name, value in session.items())
            name = target.name.replace("`", "``")
            # The charset first, as the rest is read by it. An init_connect may have begun a
            # transaction, or gone to another database.
            settings = f"SET NAMES utf8mb4;SET SESSION {values};ROLLBACK;USE `{name}`"
            await _execute(connection, settings)
            faults = await _faults(connection, _CHARSETS | session)
    except MySQLError as error:
        raise DatabaseUnavailable(f"{where}: the session cannot be prepared: {error}") from error
    if faults:
        raise DatabaseUnavailable(f"{where}: unsafe session: {faults}")


def _session_of(version: str) -> dict[str, Any]:
    mariadb = re.search(r"(\d+)\.(\d+)\.\d+-mariadb", version)
    # MariaDB has MySQL's names since 11.1, where its own are deprecated.
    prefix = "tx" if mariadb and (int(mariadb[1]), int(mariadb[2])) < (11, 1) else "transaction"
    return {
        **_SESSION,
        # READ COMMITTED takes no gap locks, the usual deadlock of concurrent upserts.
        f"{prefix}_isolation": "READ-COMMITTED",
        f"{prefix}_read_only": 0,
        **({"check_constraint_checks": 1} if mariadb else {}),
    }


async def _execute(connection: Any, statements: str) -> None:
    async with connection.cursor() as cursor:
        await cursor.execute(statements)
        while await cursor.nextset():
            pass


async def _faults(connection: Any, session: dict[str, Any]) -> str:
    """What differs from `session`, and whether the server reads what the driver escapes."""
    canary = connection.literal(_CANARY)
    found = await _read(connection, f"HEX({canary})", *(f"@@{name}" for name in session))
    wanted = (_CANARY.encode().hex().upper(), *session.values())
    names = ("a text with quotes and backslashes", *session)
    faults = [
        f"{name} is {is_!r}, not {should!r}"
        for name, is_, should in zip(names, found, wanted, strict=True)
        if is_ != should
    ]
    if not faults:
        return ""
    return (
        f"{'; '.join(faults)}, although it was set. A proxy in between may change or drop SET "
        "statements: let it pass them on for this user"
    )


async def _vitess_faults(connection: Any) -> str:
    """What is wrong with the connections that Vitess keeps to its MySQL servers."""
    variables = (*_CHARSETS, "time_zone", "system_time_zone", "sql_mode")
    *charsets, zone, system_zone, modes = await _read(connection, *(f"@@{v}" for v in variables))
    faults = [
        f"{name} is {is_!r}, not {should!r}: start each vttablet with --db_charset={should}"
        for (name, should), is_ in zip(_CHARSETS.items(), charsets, strict=True)
        if is_ != should
    ]
    zone = system_zone if zone == "SYSTEM" else zone
    if zone not in ("+00:00", "UTC", "Etc/UTC", "GMT"):
        faults.append(f"time_zone is {zone!r}: default_time_zone has to be +00:00")
    mode = set(modes.split(","))
    if not mode & {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"}:
        faults.append(f"sql_mode {modes!r} cuts values off: it has to have STRICT_TRANS_TABLES")
    if alien := sorted(mode & _ALIEN_MODES):
        faults.append(f"sql_mode has {', '.join(alien)}, which change the meaning of statements")
    if not faults:
        return ""
    return f"{'; '.join(faults)}. Vitess takes this from its own and its MySQL's configuration only"


async def _read(connection: Any, *expressions: str) -> tuple[Any, ...]:
    async with connection.cursor() as cursor:
        await cursor.execute(f"SELECT {','.join(expressions)}")
        (row,) = await cursor.fetchall()
        return tuple(row)


def _dropped(opening: asyncio.Task[Any]) -> None:
    """Close a connection that opened although nobody waits for it any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


async def _largest_packet(connection: Any) -> int:
    async with connection.cursor() as cursor:
        await cursor.execute("SELECT @@max_allowed_packet")
        ((size,),) = await cursor.fetchall()
        return int(size)


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
        return cls(await translated(loop.run_in_executor(thread, opened), None), thread)

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

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        return await _one_by_one(self, steps)

    async def rollback(self) -> None:
        await self._in_thread(self._connection.rollback)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        loop = asyncio.get_running_loop()
        try:
            return await translated(loop.run_in_executor(self._thread, work), None)
        except (RejectedByDatabase, Contention, LockWaitTimeout, SchemaChanged):
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with suppress(RuntimeError):  # it is closed already
            self._thread.submit(self._connection.close)
        self._thread.shutdown(wait=False)


async def _one_by_one(
    connection: Connection, steps: Sequence[Step]
) -> dict[int, RejectedByDatabase | SchemaChanged]:
    """Run the steps past those that are refused; which these are, by place."""
    refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
    for place, step in enumerate(steps):
        try:
            await connection.run([step])
        except (RejectedByDatabase, SchemaChanged) as error:
            refused[place] = error
    return refused


class _Shared:
    """The session of an SQLite connection of SQLAlchemy's, which has a thread of its own."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        async def ran() -> list[Result]:
            results = []
            for statement, rows in steps:
                sql = f"{statement.head}{statement.values}{statement.tail}"
                if statement.values:
                    cursor = await self._connection.executemany(sql, rows)
                    results.append(Result(cursor.rowcount, ()))
                    continue
                for row in rows:
                    cursor = await self._connection.execute(sql, row)
                    results.append(Result(cursor.rowcount, [*await cursor.fetchall()]))
            return results

        return await translated(ran(), None)

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        return await _one_by_one(self, steps)

    async def rollback(self) -> None:
        await translated(self._connection.rollback(), None)

    def close(self) -> None:
        """Leave it to SQLAlchemy, whose connection it is."""


async def shared(connection: AsyncConnection, *, seconds: float) -> Connection:
    """The session and transaction of SQLAlchemy's connection, as the hot path uses one.

    It stays SQLAlchemy's to close. Raises DatabaseUnavailable.
    """
    driver = (await connection.get_raw_connection()).driver_connection
    if isinstance(driver, aiosqlite.Connection):
        return _Shared(driver)
    return _MySQLConnection(driver, seconds, await translated(_largest_packet(driver), seconds))


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


async def close_idle(engine: AsyncEngine) -> None:
    """Close what the engine's pool keeps open, unless some of it is in use."""
    pool: Any = engine.sync_engine.pool
    if not pool.checkedout():
        # First another in its place: what is taken while this one closes would be lost with it.
        await engine.dispose(close=False)
        await greenlet_spawn(pool.dispose)
