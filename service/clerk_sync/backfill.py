"""What Clerk has and the tables have not: written, from where the last backfill was left off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clerk_sync import progress
from clerk_sync.answers import Verdict
from clerk_sync.mending import Tally
from clerk_sync.report import Report, check_instance, count, listed
from clerk_sync.walk import Page, parts_of, walk

# What was walked longer ago than this is walked again.
OLD_SECONDS: Final = 86_400.0

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk import Clerk
    from clerk_sync.lease import Lease
    from clerk_sync.mapping import Mapping
    from clerk_sync.mending import Mending


async def backfill(
    clerk: Clerk,
    mapping: Mapping,
    mending: Mending,
    engine: AsyncEngine,
    lease: Lease,
    *,
    restart: bool,
    report: Report,
    on_page: Callable[[str, int, int], None],
) -> None:
    """Write all that Clerk has and the tables have not, from where the last backfill was.

    `on_page` hears of each page: the kind, how many objects were taken by now, and how many
    there are. Raises Stopped, ClerkUnavailable, ClerkRefused, Unavailable, Lost.
    """
    report.tallies = mending.tallies
    counted = await listed(clerk, mapping, report)
    await check_instance(clerk, mending)
    begun = await progress.begun(engine)
    if restart or (begun is not None and progress.age_of(begun) > OLD_SECONDS):
        await progress.forget(engine, lease)
    report.resumed = await progress.begun(engine)
    kept = await progress.parts(engine)
    mending.tallies |= {kind: Tally() for kind in counted}
    for kind, total in counted.items():
        if kind not in kept:
            kept[kind] = await parts_of(clerk, kind, count=total)
            await progress.planned(engine, kept[kind])
    seen = {kind: sum(part.seen for part in kept[kind]) for kind in counted}

    async def take(page: Page) -> None:
        kind = page.part.kind
        lease.check()
        ahead = await mending.take(kind, page.objects, began_ms=page.began_ms)
        mending.tallies[kind].found[Verdict.NEWER] += len(ahead)
        await progress.moved(mending, page.part)
        seen[kind] += len(page.objects)
        on_page(kind, seen[kind], counted[kind])

    await walk(clerk, [part for kind in counted for part in kept[kind]], take)
    await progress.forget(engine, lease)
    await count(clerk, mending, counted, report)
