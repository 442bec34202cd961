"""A lease: the right to do what only one process on a database may do at a time.

A dead holder stops renewing, so that its lease expires. A stalled one is fenced off: every
acquisition increments the token, and writes with an old token fail. Each step is a single
statement on one row, which works on Vitess, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.database.errors import DatabaseUnavailable, translate_engine_errors
from clerk_sync.store.tables import leases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

LEASE_SECONDS: Final = 15
_STATEMENT_SECONDS: Final = 5
_RELEASE_SECONDS: Final = 2

# Milliseconds since 1970, by the database: the clocks of two pods differ. Neither depends on the
# time zone of a session.
_SQLITE_NOW: Final = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
_MYSQL_NOW: Final = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)"


class LeaseHeld(Exception):
    """Another process holds the lease: who, and at least until when, by the database's clock."""

    def __init__(self, name: str, holder: str, expires_ms: int) -> None:
        until = datetime.fromtimestamp(expires_ms // 1000, UTC)
        super().__init__(
            f"{holder} is at work, and only one may be: wait until it ends, then try again. It "
            f"holds the lease `{name}` until {until:%Y-%m-%d %H:%M:%S} UTC, and renews it while it "
            "lives"
        )
        self.holder = holder
        self.expires_ms = expires_ms


class LeaseLost(Exception):
    """The lease expired, and another process holds it now."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that this process holds, until `lost` is set.

    `token` is the fencing token: greater than that of every holder before.
    """

    name: str
    token: int
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Raise LeaseLost once another process holds it."""
        if self.lost.is_set():
            raise LeaseLost("another process has taken over the lease")


def holds(lease: Lease) -> sa.Exists:
    """The condition, for a statement's WHERE, that nobody else has taken this lease."""
    return sa.exists().where(leases.c.name == lease.name, leases.c.token == lease.token)


def holder_name() -> str:
    """Return this process's name for people: `clerk-sync-7c9f (pid 1)`."""
    return f"{socket.gethostname()} (pid {os.getpid()})"


@asynccontextmanager
async def held(
    engine: AsyncEngine,
    name: str,
    holder: str,
    *,
    seconds: float = LEASE_SECONDS,
    patience: bool = True,
) -> AsyncIterator[Lease]:
    """Hold the lease `name` within, renewing it three times in its `seconds`.

    With `patience`, wait while another process holds it: until that one renews it, and so is alive,
    or until it expires. Renewing needs a connection of the engine's pool besides those used within.
    Raises LeaseHeld or DatabaseUnavailable.
    """
    row = _Row(engine, name, seconds)
    lease = Lease(name, await row.taken(holder, patience=patience))
    renewal = asyncio.create_task(row.renewed(lease))
    try:
        yield lease
    finally:
        renewal.cancel()
        await row.released(lease.token, after=renewal)


class _Row:
    """The row of one lease."""

    def __init__(self, engine: AsyncEngine, name: str, seconds: float) -> None:
        self._engine = engine
        self._name = name
        self._seconds = seconds
        text = _SQLITE_NOW if engine.dialect.name == "sqlite" else _MYSQL_NOW
        self._now: sa.ColumnElement[int] = sa.literal_column(text, sa.BigInteger)
        self._expiry = self._now + round(seconds * 1000)

    async def taken(self, holder: str, *, patience: bool) -> int:
        """Acquire the lease and return its token. Raises LeaseHeld or DatabaseUnavailable."""
        seen = None
        while True:
            row = await self._read()
            if row is None:
                await self._make()
            elif row.expires_ms <= row.now_ms:
                if await self._take(holder, row.token + 1):
                    return int(row.token) + 1
                patience = False  # the process that was faster is alive
            elif not patience or (seen and seen != (row.token, row.expires_ms)):
                raise LeaseHeld(self._name, row.holder, row.expires_ms)
            else:
                seen = (row.token, row.expires_ms)
                await asyncio.sleep(self._seconds / 30)

    async def renewed(self, lease: Lease) -> None:
        """Renew the lease, until it is lost."""
        pause = self._seconds / 3
        while not lease.lost.is_set():
            await asyncio.sleep(pause)
            pause = self._seconds / 15
            # Whatever fails: even an expired lease is ours until another process acquires it.
            with suppress(Exception):
                if not await self._expire(lease.token, self._expiry):
                    # MySQL counts changed rows: one that would expire then anyway is not.
                    row = await self._read()
                    if row is None or row.token != lease.token:
                        lease.lost.set()
                pause = self._seconds / 3

    async def released(self, token: int, *, after: asyncio.Task[Any]) -> None:
        """Release the lease once that task has ended, if the database answers in time."""
        with suppress(Exception):
            async with asyncio.timeout(_RELEASE_SECONDS):
                await asyncio.wait([after])
                await self._expire(token, sa.literal(0))

    async def _read(self) -> sa.Row[Any] | None:
        query: sa.Select[Any] = sa.select(*leases.c, self._now.label("now_ms"))
        async with self._transaction() as connection:
            found = await connection.execute(query.where(leases.c.name == self._name))
            row: sa.Row[Any] | None = found.one_or_none()
            return row

    async def _make(self) -> None:
        free = sa.insert(leases).values(name=self._name, holder="", token=0, expires_ms=0)
        async with self._transaction() as connection:
            with suppress(sa.exc.IntegrityError):  # another process just did
                await connection.execute(free)

    async def _take(self, holder: str, token: int) -> bool:
        """Acquire the lease, unless it was acquired or renewed since it was read."""
        update = sa.update(leases).where(
            leases.c.name == self._name,
            leases.c.token == token - 1,
            leases.c.expires_ms <= self._now,
        )
        taking = asyncio.create_task(
            self._changed(update.values(holder=holder, token=token, expires_ms=self._expiry))
        )
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            # Otherwise a lease that was just acquired would never be released.
            with suppress(Exception):
                async with asyncio.timeout(_RELEASE_SECONDS):
                    if await taking:
                        await self._expire(token, sa.literal(0))
            raise

    async def _expire(self, token: int, at: sa.ColumnElement[int]) -> bool:
        """Set when the lease expires. Returns False if nothing changed."""
        ours = sa.update(leases).where(leases.c.name == self._name, leases.c.token == token)
        return await self._changed(ours.values(expires_ms=at))

    async def _changed(self, update: sa.Update) -> bool:
        async with self._transaction() as connection:
            return (await connection.execute(update)).rowcount == 1

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        with translate_engine_errors():
            try:
                async with asyncio.timeout(_STATEMENT_SECONDS), self._engine.begin() as connection:
                    yield connection
            except TimeoutError:
                raise DatabaseUnavailable("the database did not answer in time") from None
