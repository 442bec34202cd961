"""Events that could not be applied, kept until somebody mends what they met, or time does.

An event that another one may let in is tried again by itself: a membership whose user is not
there yet, an address that is not free yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.clerk.signature import Delivery
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.tables import quarantine
from clerk_sync.store.values import time_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

FIRST_RETRY_MS: Final = 1_000
# The pause before the next try is up to this part of the time since the first: whatever it
# waits for, it comes at most a tenth late, and never costs more than some hundred tries.
RETRY_PART: Final = 10
# Svix itself sends for 27 hours and 35 minutes what an event may wait for
# (https://docs.svix.com/retries).
RETRIED_MS: Final = 28 * 3_600_000
# One that is still tried after this time wants somebody's look.
PATIENCE: Final = timedelta(minutes=10)
# So long a process keeps what it tries to itself.
_CLAIMED: Final = timedelta(seconds=30)


def first_retry(now_ms: int) -> int:
    """When an event that just came into quarantine is tried again, in unix milliseconds."""
    return next_retry(now_ms, now_ms) or now_ms


def next_retry(now_ms: int, since_ms: int) -> int | None:
    """When an event that was refused again is tried the next time; None when it is not.

    Always at a whole multiple of the pause, which is a second doubled some times: so those that
    wait for each other, as for a swap, are due at the same moments, however old each is.
    """
    age = now_ms - since_ms
    if age >= RETRIED_MS:
        return None
    doublings = max(0, (age // RETRY_PART // FIRST_RETRY_MS).bit_length() - 1)
    pause = FIRST_RETRY_MS << doublings
    return (now_ms // pause + 1) * pause


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One event in quarantine. `payload` is None where it was never kept.

    `retry_at` is when it is tried again by itself, None where that would not help.
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
        """When it came into quarantine, in unix milliseconds."""
        return round(self.quarantined_at.replace(tzinfo=UTC).timestamp() * 1000)

    @property
    def delivery(self) -> Delivery | None:
        """The event as it was delivered, to be applied again; None where its payload is not."""
        if self.payload is None:
            return None
        return Delivery(self.svix_id, self.since_ms // 1000, self.payload)


async def listed(
    engine: AsyncEngine, ids: Sequence[str] = (), *, payloads: bool = True
) -> list[Quarantined]:
    """The events in quarantine, oldest first; only these ids, if any are given.

    Payloads may be a MiB each: without them there is a null in their place. Raises
    DatabaseUnavailable.
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
    """How many events in quarantine want somebody's look, and how many are tried again."""

    stuck: int
    retried: int


async def size(engine: AsyncEngine) -> Size:
    """Count the events in quarantine; one that is tried for long is in both.

    Raises DatabaseUnavailable.
    """
    retried = quarantine.c.retry_at.is_not(None)
    young = quarantine.c.quarantined_at > _now() - PATIENCE
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
    """Forget these events; how many were there. The ledger keeps its rows.

    Raises DatabaseUnavailable.
    """
    with translate_engine_errors():
        async with engine.begin() as connection:
            gone = await connection.execute(
                sa.delete(quarantine).where(quarantine.c.svix_id.in_(ids))
            )
            return gone.rowcount


async def claim(engine: AsyncEngine, limit: int) -> list[Quarantined]:
    """Those that are due, for this process alone to try. Raises DatabaseUnavailable."""
    now = _now()
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
    """Note why it was refused again, and when it is tried the next time.

    Raises DatabaseUnavailable.

    One that was erased or dropped meanwhile stays away.
    """
    at = None if retry_at_ms is None else datetime.fromisoformat(time_text(retry_at_ms))
    row = sa.update(quarantine).where(quarantine.c.svix_id == svix_id)
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(row.values(reason=reason, retry_at=at))


async def next_due(engine: AsyncEngine) -> datetime | None:
    """When the next one is tried again, as naive UTC. Raises DatabaseUnavailable."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            at: datetime | None = await connection.scalar(
                sa.select(sa.func.min(quarantine.c.retry_at))
            )
    return at


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


async def _read(engine: AsyncEngine, query: sa.Select[Any]) -> list[Quarantined]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            rows = (await connection.execute(query)).mappings()
            return [Quarantined(**row) for row in rows]
