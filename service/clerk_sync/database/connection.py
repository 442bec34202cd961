"""Connections to the database: they run statements, and know nothing of what those say."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from clerk_sync.database.errors import (
    Contention,
    LockWaitTimeout,
    RejectedByDatabase,
    SchemaChanged,
    translated,
)
from clerk_sync.database.session import CONNECT_SECONDS, open_mysql
from clerk_sync.database.url import Locate, Target
from clerk_sync.outcomes import Reason

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
    """The result of one statement: how many rows it changed, and the rows it read."""

    affected: int
    rows: Rows


class Connection(Protocol):
    """One session with one transaction at a time, opened by the first statement."""

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        """Run all statements in order, and return a result for each.

        Raises RejectedByDatabase, Contention, LockWaitTimeout or SchemaChanged, after which
        `rollback` makes it usable again, or another DatabaseUnavailable, after which the connection
        is closed.
        """
        ...

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        """Run all statements in order, stepping over rejected ones, and return those by place.

        Each step is one statement. A rejected one changes nothing, and the transaction stays open.
        Raises what `run` raises for everything else.
        """
        ...

    async def rollback(self) -> None:
        """Roll the open transaction back. Raises DatabaseUnavailable."""
        ...

    def close(self) -> None:
        """Close the session. The server rolls back an open transaction."""
        ...


COMMIT: Final[Step] = (Statement("COMMIT"), NO_PARAMETERS)
# Statements that are tried in one packet: behind one that is refused, the rest are sent again.
_TRIED_TOGETHER: Final = 16


async def connect(target: Target, *, seconds: float) -> Connection:
    """Open a connection whose every round trip ends within `seconds`.

    Raises DatabaseUnavailable.
    """
    if target.path is not None:
        return await _open_sqlite(target.path, seconds)
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
        """Return the steps as one packet.

        Raises RejectedByDatabase for a text that is not valid Unicode: the driver would send some
        lone surrogates as raw bytes, as it does with binary values, and so store another text. Also
        for a packet that is too large: the server would hang up, as if the connection was lost.
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
        """Append the results one by one: where a statement fails, those before it are known."""
        cursor = self._connection.cursor()
        await cursor.execute(packet)
        while True:
            rows = await cursor.fetchall() if cursor.description else ()
            results.append(Result(cursor.rowcount, rows))
            if not await cursor.nextset():
                return

    async def rollback(self) -> None:
        await self._guarded(self._connection.rollback())

    async def _guarded(self, work: Awaitable[_T]) -> _T:
        return await _guarded(self, translated(work, self._seconds))

    def close(self) -> None:
        self._connection.close()


async def _guarded(connection: Connection, work: Awaitable[_T]) -> _T:
    """Close the connection after any error but those after which `rollback` makes it usable."""
    try:
        return await work
    except (RejectedByDatabase, Contention, LockWaitTimeout, SchemaChanged):
        raise
    except BaseException:
        connection.close()
        raise


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


async def _largest_packet(connection: Any) -> int:
    async with connection.cursor() as cursor:
        await cursor.execute("SELECT @@max_allowed_packet")
        ((size,),) = await cursor.fetchall()
        return int(size)


class _SQLiteConnection:
    """A session of SQLite's, whose calls block and so are made by `in_session` elsewhere."""

    def __init__(self, in_session: InSession, close: Callable[[], None]) -> None:
        self._in_session = in_session
        self.close = close

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        results: list[Result] = await self._guarded(lambda session: _run(session, steps))
        return results

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
        for place, step in enumerate(steps):
            try:
                await self.run([step])
            except (RejectedByDatabase, SchemaChanged) as error:
                refused[place] = error
        return refused

    async def rollback(self) -> None:
        await self._guarded(lambda session: session.rollback())

    async def _guarded(self, work: Callable[[Any], Any]) -> Any:
        return await _guarded(self, translated(self._in_session(work), None))


InSession = Callable[[Callable[[Any], Any]], Awaitable[Any]]
"""Calls a function with a blocking DBAPI connection, where it may block."""


def _run(session: Any, steps: Sequence[Step]) -> list[Result]:
    # SQLAlchemy's session has begun already.
    if isinstance(session, sqlite3.Connection) and not session.in_transaction:
        session.execute("BEGIN IMMEDIATE")
    cursor = session.cursor()
    results = []
    for statement, rows in steps:
        sql = f"{statement.head}{statement.values}{statement.tail}"
        if statement.values:
            cursor.executemany(sql, rows)
            results.append(Result(cursor.rowcount, ()))
            continue
        for row in rows:
            cursor.execute(sql, row)
            results.append(Result(cursor.rowcount, cursor.fetchall()))
    return results


async def _open_sqlite(path: str, seconds: float) -> Connection:
    """Open the standard library's SQLite in a thread of its own, durable at every commit."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
    loop = asyncio.get_running_loop()

    def opened() -> sqlite3.Connection:
        connection = sqlite3.connect(
            path, timeout=max(1, seconds - 1), isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    session = await translated(loop.run_in_executor(thread, opened), None)

    def close() -> None:
        with suppress(RuntimeError):  # it is closed already
            thread.submit(session.close)
        thread.shutdown(wait=False)

    return _SQLiteConnection(lambda work: loop.run_in_executor(thread, work, session), close)


async def shared(connection: AsyncConnection, *, seconds: float) -> Connection:
    """Return SQLAlchemy's connection as a Connection, in the same session and transaction.

    SQLAlchemy closes it. Raises DatabaseUnavailable.
    """
    if connection.dialect.name == "sqlite":

        def in_session(work: Callable[[Any], Any]) -> Awaitable[Any]:
            return connection.run_sync(lambda sync: work(sync.connection.dbapi_connection))

        return _SQLiteConnection(in_session, lambda: None)
    driver: Any = (await connection.get_raw_connection()).driver_connection
    return _MySQLConnection(driver, seconds, await translated(_largest_packet(driver), seconds))


def engine_of(locate: Locate, *, size: int) -> AsyncEngine:
    """Return SQLAlchemy's pooled engine, for everything but the hot path.

    Errors never show a statement's parameters: those are people's data.
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
        # First another pool in its place: a connection taken from this one would be closed.
        await engine.dispose(close=False)
        await greenlet_spawn(pool.dispose)
