"""Retry quarantined events that wait for another event."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.clerk.signature import InvalidSignature
from clerk_sync.clock import now_ms, now_utc
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.mapping.change import Delete, Upsert
from clerk_sync.mapping.ingest import change_of
from clerk_sync.outcomes import Outcome
from clerk_sync.store import quarantine

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.outcomes import Answer
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.quarantine import Quarantined

log = structlog.get_logger()

# Payloads may be a MiB each.
AT_ONCE: Final = 16
# Another replica may have put one there.
LOOK_SECONDS: Final = 5.0
_SHORTEST_SECONDS: Final = 0.2


class Retries:
    """Retry the events that this replica claims. Each is claimed by one replica at a time."""

    def __init__(
        self,
        engine: AsyncEngine,
        mapping: Mapping,
        committer: Committer,
        *,
        instance_id: str | None,
        ready: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._mapping = mapping
        self._committer = committer
        self._instance_id = instance_id
        self._ready = ready

    async def keep(self) -> None:
        """Retry events when they are due, until cancelled."""
        while True:
            pause = LOOK_SECONDS
            if self._ready():
                try:
                    pause = await self.due()
                except DatabaseUnavailable as error:
                    log.warning("quarantine_retry_failed", error=str(error))
                except Exception:
                    log.exception("quarantine_retry_failed")
            try:
                async with asyncio.timeout(pause):
                    await self._committer.parked()
                await asyncio.sleep(quarantine.FIRST_RETRY_MS / 1000)
            except TimeoutError:
                pass

    async def due(self) -> float:
        """Retry the events that are due, and return the seconds until the next check.

        Raises DatabaseUnavailable.
        """
        while due := await quarantine.claim(self._engine, AT_ONCE):
            tried: list[tuple[Quarantined, Change]] = []
            for one in due:
                if (change := self._change(one)) is not None:
                    tried.append((one, change))
                else:  # another replica may have another mapping
                    await self._postpone(one, one.reason)
            answers = await self._committer.retry([change for _, change in tried])
            for (one, change), answer in zip(tried, answers, strict=True):
                await self._note(one, change, answer)
            if len(due) < AT_ONCE:
                break
        at = await quarantine.next_due(self._engine)
        if at is None:
            return LOOK_SECONDS
        wait = (at - now_utc()).total_seconds()
        return min(max(wait, _SHORTEST_SECONDS), LOOK_SECONDS)

    def _change(self, one: Quarantined) -> Change | None:
        """Return the event's change by the current mapping; None when it changes no table."""
        if (delivery := one.delivery) is None:
            return None
        try:
            change = change_of(delivery, self._mapping, instance_id=self._instance_id)
        except InvalidSignature:
            return None
        return change if isinstance(change.effect, Upsert | Delete) else None

    async def _note(self, one: Quarantined, change: Change, answer: Answer) -> None:
        if answer.outcome is Outcome.QUARANTINED:
            if await self._postpone(one, answer.reason.value if answer.reason else one.reason):
                return
        elif answer.outcome in (Outcome.UNAVAILABLE, Outcome.ERROR):
            return  # it is due again when the claim ends
        else:
            await quarantine.drop(self._engine, [one.svix_id])
        log.info(
            "quarantine_retried",
            svix_id=one.svix_id,
            type=change.type,
            clerk_id=change.clerk_id,
            outcome=answer.outcome.value,
            reason=answer.reason.value if answer.reason else None,
        )

    async def _postpone(self, one: Quarantined, reason: str) -> bool:
        """Schedule the next retry; False when its time is over."""
        again = quarantine.next_retry(now_ms(), one.since_ms)
        await quarantine.postpone(self._engine, one.svix_id, reason, again)
        return again is not None
