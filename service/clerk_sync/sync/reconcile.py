"""Both sides looked at whole: what is missing, old, altered or gone, and mending it."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any, Final

import structlog

from clerk_sync.clerk.api import DeletionUnconfirmed, Read
from clerk_sync.clerk.listing import AT_ONCE, Met, Page, parts_of, walk
from clerk_sync.database.connection import COMMIT
from clerk_sync.mapping.change import ApiRead, Delete
from clerk_sync.store import erasure
from clerk_sync.store.target import IDS_LIMIT
from clerk_sync.store.values import as_text
from clerk_sync.sync.diff import SETTLED_MS, Compared, lingering, states_of
from clerk_sync.sync.repair import Tally
from clerk_sync.sync.report import BREAKER_LEAST, Report, SafetyStop, listed
from clerk_sync.sync.safety import (
    Walked,
    again,
    check_growth,
    check_instance,
    check_listed,
    is_clerks,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.database.connection import Connection
    from clerk_sync.mapping.model import Mapping as Mapped
    from clerk_sync.store.lease import Lease
    from clerk_sync.store.target import Target
    from clerk_sync.sync.diff import State
    from clerk_sync.sync.repair import Mending

log = structlog.get_logger()

_CONFIRMED_AT_ONCE: Final = 8
# A row that a webhook has just brought is asked for twice before it is deleted: the API may lag.
_YOUNG_SECONDS: Final = 5.0


_NO_ENDS: Final = (
    "the table does not hold what it takes to ask for it: map organization.id and "
    "public_user_data.user_id"
)


class _ConfirmationFailed(Exception):
    """The table does not hold what it takes to ask Clerk for this object."""


class _Absent:
    """Clerk objects of one kind that the table has and the walk did not meet."""

    def __init__(self) -> None:
        self.rows = 0
        self.ids: list[str] = []


class Reconcile:
    """One reconcile; without a lease it only looks."""

    def __init__(
        self,
        clerk: Clerk,
        mapping: Mapped,
        mending: Mending,
        engine: AsyncEngine,
        lease: Lease | None,
        *,
        instance: str | None,
        pauses: Sequence[float],
        breaker_percent: float,
        report: Report,
        on_page: Callable[[str, int, int], None],
        at_once: int = AT_ONCE,
    ) -> None:
        self._clerk = clerk
        self._mapping = mapping
        self._mending = mending
        self._engine = engine
        self._lease = lease
        self._instance = instance
        self._pauses = pauses
        self._breaker_percent = breaker_percent
        self._report = report
        self._on_page = on_page
        self._at_once = at_once
        self._asking = asyncio.Semaphore(_CONFIRMED_AT_ONCE)

    async def run(self) -> None:
        """Bring the tables to what Clerk has; the report tells what that took.

        Raises SafetyStop when too much is gone, ClerkUnavailable, ClerkRefused,
        DatabaseUnavailable, LeaseLost: nothing is deleted then.
        """
        report = self._report
        report.tallies = self._mending.tallies
        counted = await listed(self._clerk, self._mapping, report)
        await check_instance(
            self._clerk, self._mending, self._engine, report, expected=self._instance
        )
        report.tallies |= {kind: Tally() for kind in counted}
        absent = {}
        walked: dict[str, Walked] = {}
        for kind, total in counted.items():
            met, walked[kind] = await self._walked(kind, total)
            check_listed(kind, len(met), walked[kind])
            absent[kind] = await self._absent(kind, met)
        for kind, missed in absent.items():
            self._check_breaker(kind, missed)
        # Rows that refer to others go before them.
        for kind, missed in reversed(absent.items()):
            self._check_lease()
            await self._remove(kind, missed.ids)
        await again(self._clerk, self._mending, counted)
        dry_run = self._lease is None
        now_ms = _now_ms()
        purged = await erasure.purge(
            self._engine, self._mending.store, now_ms=now_ms, dry_run=dry_run
        )
        report.purged = sum(purged.values())
        await settle(
            self._clerk,
            self._mending,
            walked,
            report,
            pauses=self._pauses,
            dry_run=dry_run,
        )

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    async def _walked(self, kind: str, total: int) -> tuple[Met, Walked]:
        """Compare all that Clerk lists of one kind, and mend it; the ids that there were."""
        met = Met()
        taken = 0

        async def take(page: Page) -> None:
            nonlocal taken
            self._check_lease()
            for data in page.objects:
                met.add(str(data.get("id")))
            ahead = await self._mending.take(kind, page.objects, began_ms=page.began_ms)
            if ahead:
                objects = {one.get("id"): one for one in page.objects}
                for one in ahead:
                    await self._outdo(kind, one, objects[one.clerk_id])
            taken += len(page.objects)
            if page.part.number == walked.end.number:
                walked.end = page.part
            check_growth(kind, taken, total)
            self._on_page(kind, taken, total)

        parts = await parts_of(self._clerk, kind, count=total)
        walked = Walked(total, parts[-1])
        await walk(self._clerk, parts, take, at_once=self._at_once)
        walked.after = await self._clerk.count(kind)
        return met, walked

    async def _outdo(self, kind: str, one: Compared, data: Mapping[str, Any]) -> None:
        """Mend a row whose version is ahead of Clerk's, for a while already: but ask again."""
        organization, user = data.get("organization"), data.get("public_user_data")
        try:
            read = await self._ask(
                kind,
                one.clerk_id,
                organization=organization.get("id") if isinstance(organization, dict) else None,
                user=user.get("user_id") if isinstance(user, dict) else None,
            )
        except _ConfirmationFailed:
            return
        except DeletionUnconfirmed as error:
            self._unconfirmed(kind, one.clerk_id, str(error))
            return
        # Where it moves meanwhile, a webhook will tell, or the next run.
        if read is not None and read.json.get("updated_at") == data.get("updated_at"):
            await self._mending.lower(kind, one)
            await self._mending.mend(kind, [one])

    async def _ask(
        self, kind: str, clerk_id: str, *, organization: object, user: object
    ) -> Read | None:
        """The object as Clerk has it now, None when there is none. Raises _ConfirmationFailed."""
        if kind != "organizationMembership":
            return await self._clerk.one(kind, clerk_id)
        if not isinstance(organization, str) or not isinstance(user, str):
            raise _ConfirmationFailed
        return await self._clerk.membership(clerk_id, organization=organization, user=user)

    def _threshold(self, rows: int) -> float:
        if self._breaker_percent >= 100:  # noqa: PLR2004 -- switched off
            return math.inf
        return max(BREAKER_LEAST, rows * self._breaker_percent / 100)

    def _check_breaker(self, kind: str, absent: _Absent) -> None:
        if len(absent.ids) >= self._threshold(absent.rows):
            raise SafetyStop(
                f"{len(absent.ids)} of {absent.rows} {kind}s are not in Clerk any more, which "
                f"the breaker ({self._breaker_percent:g} %, at least {BREAKER_LEAST}) takes for a "
                "mistake: nothing was deleted. Is CLERK_SECRET_KEY the key of this database's "
                "instance? `clerk-sync reconcile --dry-run --breaker 100` lists them. If they were "
                "deleted on purpose, run it again with --breaker 100"
            )

    async def _absent(self, kind: str, met: Met) -> _Absent:
        """Go over the table by its key, and note the ids that the walk did not meet."""
        absent = _Absent()
        ids = await self._mending.ids(kind, after="")
        while ids:
            absent.rows += len(ids)
            missed = [clerk_id for clerk_id in ids if clerk_id not in met]
            foreign = await self._foreign(kind, missed)
            self._report.foreign[kind] += len(foreign)
            absent.ids += [clerk_id for clerk_id in missed if clerk_id not in foreign]
            ids = await self._mending.ids(kind, after=ids[-1])
        return absent

    async def _foreign(self, kind: str, ids: Sequence[str]) -> set[str]:
        """Those of these keys that are no ids of Clerk's, nor ever came from it."""
        odd = [one for one in ids if not is_clerks(kind, one)]
        if not odd:
            return set()
        states = await self._mending.reading(
            lambda connection: states_of(connection, self._mending.store, kind, odd)
        )
        return {*odd} - states.keys()

    def _unconfirmed(self, kind: str, clerk_id: str, why: str) -> None:
        log.warning("deletion_unconfirmed", kind=kind, clerk_id=clerk_id, error=why)
        self._report.unconfirmed += 1

    async def _remove(self, kind: str, ids: Sequence[str]) -> None:
        """Delete these rows, each once Clerk has said that it has no such object."""
        target = self._mending.store.targets[kind]
        for start in range(0, len(ids), IDS_LIMIT):
            some = ids[start : start + IDS_LIMIT]

            async def read(connection: Connection, some: Sequence[str] = some) -> Any:
                rows, _ = await connection.run([target.read.of(some), COMMIT])
                states = await states_of(connection, self._mending.store, kind, some)
                return [(row, states.get(as_text(row[0]))) for row in rows.rows]

            there = await self._mending.reading(read)
            try:
                async with asyncio.TaskGroup() as group:
                    asked = [
                        group.create_task(self._gone(target, row, state)) for row, state in there
                    ]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            gone = [one.result() for one in asked]
            await self._mending.mend(kind, [one for one in gone if one is not None])

    async def _gone(
        self, target: Target, row: Sequence[Any], state: State | None
    ) -> Compared | None:
        """What deletes a row whose object is gone, by Clerk's own word; None when it is not."""
        kind, clerk_id = target.mapping.kind, as_text(row[0])
        now_ms = _now_ms()
        asked = ApiRead(now_ms)
        if state is not None and state.deleted_ms is not None:
            return lingering(Delete((kind, clerk_id), state.deleted_ms), asked, target, row)

        def value(expression: str) -> object:
            name = target.mapping.column_of(expression)
            found = None if name is None else row[target.names.index(name)]
            return None if found is None else as_text(found)

        organization, user = value("organization.id"), value("public_user_data.user_id")
        # By two clocks, as one may be wrong: Clerk's, and that of whoever wrote the row.
        young = (
            state is not None
            and state.delivered
            and max(state.event_ms, state.synced_ms) > now_ms - SETTLED_MS
        )
        async with self._asking:
            for pause in (0.0, _YOUNG_SECONDS) if young else (0.0,):
                await asyncio.sleep(pause)
                try:
                    read = await self._ask(kind, clerk_id, organization=organization, user=user)
                except _ConfirmationFailed:
                    self._unconfirmed(kind, clerk_id, _NO_ENDS)
                    return None
                except DeletionUnconfirmed as error:
                    self._unconfirmed(kind, clerk_id, str(error))
                    return None
                if read is not None:
                    await self._mending.take(kind, [read.json], began_ms=read.began_ms)
                    return None
        return lingering(Delete((kind, clerk_id), now_ms), asked, target, row)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
