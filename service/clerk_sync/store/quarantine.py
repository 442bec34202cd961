"""The quarantine (a dead-letter table): list, count, drop and claim its events.

An event that another one may unblock is retried automatically, such as a membership whose user is
missing, or an account whose address is still taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.clerk.signature import Delivery
from clerk_sync.clock import now_utc
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.tables import quarantine
from clerk_sync.store.values import time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

FIRST_RETRY_MS: Final = 1_000
# The pause before the next retry is at most this part of the time since the first. So an event is
# at most a tenth late, after at most some hundred retries.
RETRY_PART: Final = 10
# Svix retries the event that this one may wait for over 27 hours and 35 minutes
# (https://docs.svix.com/retries).
RETRIED_MS: Final = 28 * 3_600_000
# An event that is still retried after this time needs attention.
PATIENCE: Final = timedelta(minutes=10)
# How long a claim lasts, in which no other process retries the event.
_CLAIMED: Final = timedelta(seconds=30)


def first_retry(now_ms: int) -> int:
    """Return the time of the first retry of an event quarantined now, in unix milliseconds."""
    return next_retry(now_ms, now_ms) or now_ms


def next_retry(now_ms: int, since_ms: int) -> int | None:
    """Return the time of the next retry in unix milliseconds; None after RETRIED_MS.

    It is a whole multiple of the pause, which is a second doubled some times. So events that wait
    for each other, as in a swap of values, are due at the same moments, however old each is.
    """
    age = now_ms - since_ms
    if age >= RETRIED_MS:
        return None
    doublings = max(0, (age // RETRY_PART // FIRST_RETRY_MS).bit_length() - 1)
    pause = FIRST_RETRY_MS << doublings
    return (now_ms // pause + 1) * pause


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One event in quarantine. Its times are naive UTC.

    `payload` is None where the body was not kept, `retry_at` where a retry would not help.
    """

    svix_id: str
    type: str
    kind: str | None
    clerk_id: str | None
    reason: str
    detail: str | None
    payload: str | None
    quarantined_at: datetime
    retry_at: datetime | None

    @property
    def since_ms(self) -> int:
        """The time when it was quarantined, in unix milliseconds."""
        return round(self.quarantined_at.replace(tzinfo=UTC).timestamp() * 1000)

    @property
    def delivery(self) -> Delivery | None:
        """The delivery, to be applied again; None where its payload was not kept."""
        if self.payload is None:
            return None
        return Delivery(self.svix_id, self.since_ms // 1000, self.payload)


async def listed(
    engine: AsyncEngine, ids: Sequence[str] = (), *, payloads: bool = True
) -> list[Quarantined]:
    """Return the events in quarantine, oldest first; only those with these ids, if any are given.

    Payloads may be a MiB each: with `payloads=False` they are None. Raises DatabaseUnavailable.
    """
    columns = [
        column if payloads or column is not quarantine.c.payload else sa.null().label("payload")
        for column in quarantine.c
    ]
    query = sa.select(*columns).order_by(quarantine.c.quarantined_at, quarantine.c.svix_id)
    if ids:
        query = query.where(quarantine.c.svix_id.in_(ids))
    return await _read(engine, query)


@dataclass(frozen=True, slots=True)
class Size:
    """The number of events that need attention, and of those that are retried."""

    stuck: int
    retried: int


async def size(engine: AsyncEngine) -> Size:
    """Count the events in quarantine; one that was retried for long counts as both.

    Raises DatabaseUnavailable.
    """
    retried = quarantine.c.retry_at.is_not(None)
    young = quarantine.c.quarantined_at > now_utc() - PATIENCE
    query = sa.select(
        sa.func.count(),
        sa.func.count(quarantine.c.retry_at),
        sa.func.sum(sa.case((sa.and_(retried, young), 1), else_=0)),
    ).select_from(quarantine)
    with translate_engine_errors():
        async with engine.connect() as connection:
            every, again, patient = (await connection.execute(query)).one()
    return Size(int(every) - int(patient or 0), int(again))


async def drop(engine: AsyncEngine, ids: Sequence[str]) -> int:
    """Delete these events, and return how many there were. The ledger keeps its rows.

    Raises DatabaseUnavailable.
    """
    with translate_engine_errors():
        async with engine.begin() as connection:
            gone = await connection.execute(
                sa.delete(quarantine).where(quarantine.c.svix_id.in_(ids))
            )
            return gone.rowcount


async def claim(engine: AsyncEngine, limit: int) -> list[Quarantined]:
    """Claim events that are due, so that only this process retries them, and return them.

    Raises DatabaseUnavailable.
    """
    now = now_utc()
    due = sa.select(quarantine).where(quarantine.c.retry_at <= now)
    claimed = []
    found = await _read(engine, due.order_by(quarantine.c.retry_at).limit(limit))
    with translate_engine_errors():
        # In one transaction and one order: whoever has the first has those that are due with it.
        async with engine.begin() as connection:
            for one in sorted(found, key=lambda one: one.svix_id):
                mine = sa.update(quarantine).where(
                    quarantine.c.svix_id == one.svix_id, quarantine.c.retry_at == one.retry_at
                )
                if (await connection.execute(mine.values(retry_at=now + _CLAIMED))).rowcount:
                    claimed.append(one)
    return claimed


async def postpone(engine: AsyncEngine, svix_id: str, reason: str, retry_at_ms: int | None) -> None:
    """Store why the event was rejected again, and when it is retried, in unix milliseconds.

    An event that was erased or dropped meanwhile does not come back. Raises DatabaseUnavailable.
    """
    at = None if retry_at_ms is None else datetime.fromisoformat(time_text(retry_at_ms))
    row = sa.update(quarantine).where(quarantine.c.svix_id == svix_id)
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(row.values(reason=reason, retry_at=at))


async def next_due(engine: AsyncEngine) -> datetime | None:
    """Return the time of the next retry, as naive UTC. Raises DatabaseUnavailable."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            at: datetime | None = await connection.scalar(
                sa.select(sa.func.min(quarantine.c.retry_at))
            )
    return at


async def _read(engine: AsyncEngine, query: sa.Select[Any]) -> list[Quarantined]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            rows = (await connection.execute(query)).mappings()
            return [Quarantined(**row) for row in rows]
