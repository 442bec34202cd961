"""Connections to the database, which run scripts and know nothing of what they say."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import asyncmy
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from clerk_sync.address import Locate, Target
from clerk_sync.answers import Reason
from clerk_sync.database_errors import Contention, LockWait, Refused, SchemaChanged, translated

CONNECT_SECONDS: Final = 4

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

        Raises Refused, Contention, LockWait or SchemaChanged, after which `rollback` makes it
        usable again, or another Unavailable, after which the connection is closed.
        """
        ...

    async def try_each(self, steps: Sequence[Step]) -> dict[int, Refused | SchemaChanged]:
        """Run all statements in order, past those that are refused; which these are, by place.

        Each step is one statement. One that is refused changes nothing, and the transaction
        stays open. Raises what `run` raises for everything else.
        """
        ...

    async def rollback(self) -> None:
        """Forget the open transaction. Raises Unavailable."""
        ...

    def close(self) -> None:
        """Drop the session; the server rolls back what was open."""
        ...


COMMIT: Final[Step] = (Statement("COMMIT"), NO_PARAMETERS)
# Statements that are tried in one packet: behind one that is refused, the rest are sent again.
_TRIED_TOGETHER: Final = 16


async def connect(target: Target, *, seconds: float) -> Connection:
    """Open a connection whose every round trip ends within `seconds`. Raises Unavailable."""
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
        await self._guarded(self._query(self._text(steps), results))
        return results

    async def try_each(self, steps: Sequence[Step]) -> dict[int, Refused | SchemaChanged]:
        refused: dict[int, Refused | SchemaChanged] = {}
        place = 0
        while place < len(steps):
            some = steps[place : place + _TRIED_TOGETHER]
            results: list[Result] = []
            try:
                await self._guarded(self._query(self._text(some), results))
            except (Refused, SchemaChanged) as error:
                refused[place + len(results)] = error
                place += 1
            place += len(results)
        return refused

    def _text(self, steps: Sequence[Step]) -> str:
        """The statements as one packet. Raises Refused when the server would not take it."""
        literal = self._connection.literal
        texts: list[str] = []
        for statement, rows in steps:
            if statement.values:
                values = ",".join([statement.values % tuple(map(literal, row)) for row in rows])
                texts.append(f"{statement.head}{values}{statement.tail}")
            else:
                texts.extend([statement.head % tuple(map(literal, row)) for row in rows])
        text = ";".join(texts)
        # The server would hang up on a larger one, which looks like any lost connection.
        if 4 * len(text) > self._largest_packet and len(text.encode()) >= self._largest_packet:
            raise Refused(Reason.TOO_LONG, f"more than max_allowed_packet={self._largest_packet}")
        return text

    async def _query(self, text: str, results: list[Result]) -> None:
        """Fill in the results one by one: where a statement fails, those before it are there."""
        cursor = self._connection.cursor()
        await cursor.execute(text)
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
        except (Refused, Contention, LockWait, SchemaChanged):
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()


async def open_mysql(target: Target) -> Any:
    """A plain asyncmy connection, strict about data, with `autocommit` off.

    It is open within CONNECT_SECONDS, or raises TimeoutError; cancelled, it ends at once.
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
        where = f"{target.host}:{target.port}"
        raise TimeoutError(f"{where} did not let us in within {CONNECT_SECONDS} s") from None


async def _opened(target: Target) -> Any:
    connection = await asyncmy.connect(
        host=target.host,
        port=target.port,
        user=target.username,
        password=target.password,
        database=target.name,
        ssl=target.tls,
        charset="utf8mb4",
        autocommit=False,
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
                "time_zone='+00:00',innodb_lock_wait_timeout=1"
            )
            while await cursor.nextset():
                pass
    return connection


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

    async def try_each(self, steps: Sequence[Step]) -> dict[int, Refused | SchemaChanged]:
        refused: dict[int, Refused | SchemaChanged] = {}
        for place, step in enumerate(steps):
            try:
                await self.run([step])
            except (Refused, SchemaChanged) as error:
                refused[place] = error
        return refused

    async def rollback(self) -> None:
        await self._in_thread(self._connection.rollback)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        loop = asyncio.get_running_loop()
        try:
            return await translated(loop.run_in_executor(self._thread, work), None)
        except (Refused, Contention, LockWait, SchemaChanged):
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
