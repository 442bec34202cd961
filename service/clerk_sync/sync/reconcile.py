"""Compare every Clerk object with its row; repair missing, outdated, drifted, orphaned rows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from clerk_sync.clerk.api import DeletionUnconfirmed, Read
from clerk_sync.clerk.listing import AT_ONCE, Page, SeenIds, each_page, ranges_of
from clerk_sync.clock import now_ms
from clerk_sync.database.connection import COMMIT
from clerk_sync.mapping.change import ApiRead, Delete
from clerk_sync.store import erasure
from clerk_sync.store.target import IDS_LIMIT
from clerk_sync.store.values import as_text
from clerk_sync.sync.counts import Listed, countable, retry_rejected, settle
from clerk_sync.sync.diff import SETTLED_MS, Comparison, orphaned, states_of
from clerk_sync.sync.report import Report, Tally
from clerk_sync.sync.safety import (
    check_deletions,
    check_growth,
    check_instance,
    check_listed,
    is_clerk_id,
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
    from clerk_sync.sync.repair import Repairer

log = structlog.get_logger()

_CONFIRMED_AT_ONCE: Final = 8
# A row that a webhook has just written is confirmed twice before it is deleted: the API may lag.
_YOUNG_SECONDS: Final = 5.0


_NO_ENDS: Final = (
    "the table lacks the ids to ask Clerk for it: map organization.id and public_user_data.user_id"
)


class _CannotConfirm(Exception):
    """The row lacks the ids by which Clerk can be asked for its object."""


class _Orphans:
    """The rows of one kind, and the ids of those that Clerk did not list."""

    def __init__(self) -> None:
        self.rows = 0
        self.ids: list[str] = []


class Reconcile:
    """One reconcile; without a lease, a dry run."""

    def __init__(
        self,
        clerk: Clerk,
        mapping: Mapped,
        repairer: Repairer,
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
        self._repairer = repairer
        self._engine = engine
        self._lease = lease
        self._instance = instance
        self._pauses = pauses
        self._breaker_percent = breaker_percent
        self._report = report
        self._on_page = on_page
        self._at_once = at_once
        self._confirming = asyncio.Semaphore(_CONFIRMED_AT_ONCE)

    async def run(self) -> None:
        """Repair the tables, and fill the report.

        Raises SafetyStop if too much would be deleted, ClerkUnavailable, ClerkRefused,
        DatabaseUnavailable, LeaseLost: then nothing is deleted.
        """
        report = self._report
        report.tallies = self._repairer.tallies
        counted = await countable(self._clerk, self._mapping, report)
        await check_instance(
            self._clerk, self._repairer, self._engine, report, expected=self._instance
        )
        report.tallies |= {kind: Tally() for kind in counted}
        orphans = {}
        listing: dict[str, Listed] = {}
        for kind, total in counted.items():
            seen, listing[kind] = await self._list(kind, total)
            its = listing[kind]
            check_listed(kind, len(seen), before=its.before, after=its.after)
            orphans[kind] = await self._orphans(kind, seen)
        for kind, rows in orphans.items():
            check_deletions(kind, len(rows.ids), rows.rows, percent=self._breaker_percent)
        # Rows that refer to others go before them.
        for kind, rows in reversed(orphans.items()):
            self._check_lease()
            await self._remove(kind, rows.ids)
        await retry_rejected(self._clerk, self._repairer, counted)
        dry_run = self._lease is None
        purged = await erasure.purge(
            self._engine, self._repairer.store, now_ms=now_ms(), dry_run=dry_run
        )
        report.purged = sum(purged.values())
        await settle(
            self._clerk,
            self._repairer,
            listing,
            report,
            pauses=self._pauses,
            dry_run=dry_run,
        )

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    async def _list(self, kind: str, total: int) -> tuple[SeenIds, Listed]:
        """Compare and repair all objects that Clerk lists of one kind; the ids that it listed."""
        seen = SeenIds()
        taken = 0

        async def take(page: Page) -> None:
            nonlocal taken
            self._check_lease()
            for data in page.objects:
                seen.add(str(data.get("id")))
            ahead = await self._repairer.repair(kind, page.objects, began_ms=page.began_ms)
            if ahead:
                objects = {one.get("id"): one for one in page.objects}
                for one in ahead:
                    await self._rewind(kind, one, objects[one.clerk_id])
            taken += len(page.objects)
            if page.range.number == listing.end.number:
                listing.end = page.range
            check_growth(kind, taken, total)
            self._on_page(kind, taken, total)

        ranges = await ranges_of(self._clerk, kind, count=total)
        listing = Listed(total, ranges[-1])
        await each_page(self._clerk, ranges, take, at_once=self._at_once)
        listing.after = await self._clerk.count(kind)
        return seen, listing

    async def _rewind(self, kind: str, one: Comparison, data: Mapping[str, Any]) -> None:
        """Rewind and repair a row whose version is ahead of Clerk's, if Clerk confirms its own."""
        organization, user = data.get("organization"), data.get("public_user_data")
        try:
            read = await self._confirm(
                kind,
                one.clerk_id,
                organization=organization.get("id") if isinstance(organization, dict) else None,
                user=user.get("user_id") if isinstance(user, dict) else None,
            )
        except _CannotConfirm:
            return
        except DeletionUnconfirmed as error:
            self._unconfirmed(kind, one.clerk_id, str(error))
            return
        # If it has changed meanwhile, a webhook brings it, or the next run.
        if read is not None and read.json.get("updated_at") == data.get("updated_at"):
            await self._repairer.rewind(kind, one)
            await self._repairer.apply(kind, [one])

    async def _confirm(
        self, kind: str, clerk_id: str, *, organization: object, user: object
    ) -> Read | None:
        """The object as Clerk has it now, None if there is none. Raises _CannotConfirm."""
        if kind != "organizationMembership":
            return await self._clerk.one(kind, clerk_id)
        if not isinstance(organization, str) or not isinstance(user, str):
            raise _CannotConfirm
        return await self._clerk.membership(clerk_id, organization=organization, user=user)

    async def _orphans(self, kind: str, seen: SeenIds) -> _Orphans:
        """Read the table by its key, and collect the ids that Clerk did not list."""
        orphans = _Orphans()
        ids = await self._repairer.ids(kind, after="")
        while ids:
            orphans.rows += len(ids)
            orphaned_ids = [clerk_id for clerk_id in ids if clerk_id not in seen]
            unmanaged = await self._unmanaged(kind, orphaned_ids)
            self._report.unmanaged[kind] += len(unmanaged)
            orphans.ids += [clerk_id for clerk_id in orphaned_ids if clerk_id not in unmanaged]
            ids = await self._repairer.ids(kind, after=ids[-1])
        return orphans

    async def _unmanaged(self, kind: str, ids: Sequence[str]) -> set[str]:
        """Those of these keys that are no Clerk ids, and did not come from Clerk."""
        odd = [one for one in ids if not is_clerk_id(kind, one)]
        if not odd:
            return set()
        states = await self._repairer.reading(
            lambda connection: states_of(connection, self._repairer.store, kind, odd)
        )
        return {*odd} - states.keys()

    def _unconfirmed(self, kind: str, clerk_id: str, why: str) -> None:
        log.warning("deletion_unconfirmed", kind=kind, clerk_id=clerk_id, error=why)
        self._report.unconfirmed += 1

    async def _remove(self, kind: str, ids: Sequence[str]) -> None:
        """Delete these rows, each after Clerk has confirmed that it has no such object."""
        target = self._repairer.store.targets[kind]
        for start in range(0, len(ids), IDS_LIMIT):
            some = ids[start : start + IDS_LIMIT]

            async def read(connection: Connection, some: Sequence[str] = some) -> Any:
                rows, _ = await connection.run([target.read.of(some), COMMIT])
                states = await states_of(connection, self._repairer.store, kind, some)
                return [(row, states.get(as_text(row[0]))) for row in rows.rows]

            there = await self._repairer.reading(read)
            try:
                async with asyncio.TaskGroup() as group:
                    asked = [
                        group.create_task(self._confirmed(target, row, state))
                        for row, state in there
                    ]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            gone = [one.result() for one in asked]
            await self._repairer.apply(kind, [one for one in gone if one is not None])

    async def _confirmed(
        self, target: Target, row: Sequence[Any], state: State | None
    ) -> Comparison | None:
        """What deletes a row, if Clerk confirms that its object is gone; else None."""
        kind, clerk_id = target.mapping.kind, as_text(row[0])
        now = now_ms()
        read_now = ApiRead(now)
        if state is not None and state.deleted_ms is not None:
            return orphaned(Delete((kind, clerk_id), state.deleted_ms), read_now, target, row)

        def value(expression: str) -> object:
            name = target.mapping.column_of(expression)
            found = None if name is None else row[target.names.index(name)]
            return None if found is None else as_text(found)

        organization, user = value("organization.id"), value("public_user_data.user_id")
        # By two clocks, as one may be wrong: Clerk's, and that of whoever wrote the row.
        young = (
            state is not None
            and state.delivered
            and max(state.event_ms, state.synced_ms) > now - SETTLED_MS
        )
        async with self._confirming:
            for pause in (0.0, _YOUNG_SECONDS) if young else (0.0,):
                await asyncio.sleep(pause)
                try:
                    read = await self._confirm(kind, clerk_id, organization=organization, user=user)
                except _CannotConfirm:
                    self._unconfirmed(kind, clerk_id, _NO_ENDS)
                    return None
                except DeletionUnconfirmed as error:
                    self._unconfirmed(kind, clerk_id, str(error))
                    return None
                if read is not None:
                    await self._repairer.repair(kind, [read.json], began_ms=read.began_ms)
                    return None
        return orphaned(Delete((kind, clerk_id), now), read_now, target, row)
