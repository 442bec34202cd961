"""What Clerk has and the tables have not: written, from where the last backfill was left off."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.clerk.api import ClerkUnavailable
from clerk_sync.clerk.listing import OVERLAP, Page, Part, parts_of, walk
from clerk_sync.outcomes import Verdict
from clerk_sync.sync import progress
from clerk_sync.sync.repair import Tally
from clerk_sync.sync.report import BREAKER_LEAST, Report, listed
from clerk_sync.sync.safety import Walked, again, check_growth, check_instance, check_listed, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.mapping.model import Mapping as Mapped
    from clerk_sync.mapping.model import TableMapping
    from clerk_sync.store.lease import Lease
    from clerk_sync.sync.repair import Mending

log = structlog.get_logger()

# What was walked longer ago than this is walked again.
OLD_SECONDS: Final = 86_400.0
# A table that lacks so many of the rows that were written is not the one they were written to.
_LOST_PERCENT: Final = 5


async def backfill(
    clerk: Clerk,
    mapping: Mapped,
    mending: Mending,
    engine: AsyncEngine,
    lease: Lease,
    *,
    instance: str | None,
    pauses: Sequence[float],
    restart: bool,
    report: Report,
    on_page: Callable[[str, int, int], None],
) -> None:
    """Write all that Clerk has and the tables have not, from where the last backfill was.

    Users first, then organizations, then memberships, as rows may refer to those before them.
    `instance` is Clerk's that the settings name, `pauses` is for `settle`. `on_page` hears of
    each page: the kind, how many objects were taken by now, and how many there are. Raises
    SafetyStop, ClerkUnavailable, ClerkRefused, DatabaseUnavailable, LeaseLost.
    """
    report.tallies = mending.tallies
    counted = await listed(clerk, mapping, report)
    await check_instance(clerk, mending, engine, report, expected=instance)
    begun = await progress.begun(engine)
    if restart or (begun is not None and progress.age_of(begun) > OLD_SECONDS):
        await progress.forget(engine, lease)
    kept = await _kept(mapping, mending, engine, lease, report)
    mending.tallies |= {kind: Tally() for kind in counted}
    walked: dict[str, Walked] = {}
    for kind, total in counted.items():
        parts = kept.get(kind) or await parts_of(clerk, kind, count=total)
        if kind not in kept:
            await progress.planned(
                engine, parts, fingerprint(mapping.tables[kind], report.instance)
            )
        taken = Counter({kind: sum(_taken(part) for part in parts)})
        walked[kind] = Walked(total, parts[-1])

        async def take(page: Page, taken: Counter[str] = taken) -> None:
            lease.check()
            kind = page.part.kind
            ahead = await mending.take(kind, page.objects, began_ms=page.began_ms)
            mending.tallies[kind].found[Verdict.NEWER] += len(ahead)
            await progress.moved(mending, page.part)
            taken[kind] += len(page.objects)
            if page.part.number == walked[kind].end.number:
                walked[kind].end = page.part
            check_growth(kind, taken[kind], counted[kind])
            on_page(kind, taken[kind], counted[kind])

        await walk(clerk, parts, take)
        walked[kind].after = await clerk.count(kind)
        _doubt(report, kind, taken[kind], walked[kind], went_on=kind in kept)
    await again(clerk, mending, counted)
    await progress.forget(engine, lease)
    await settle(clerk, mending, walked, report, pauses=pauses)


def _doubt(report: Report, kind: str, taken: int, walked: Walked, *, went_on: bool) -> None:
    """Note when the list was not what Clerk counts.

    A run that went on counts those again that were created at the moment where it was left off.
    """
    try:
        if not went_on:
            check_listed(kind, taken, walked)
    except ClerkUnavailable as error:
        report.doubts.append(str(error).partition(";")[0])
        return
    least = min(walked.before, walked.after)
    if taken < least:
        report.doubts.append(f"Clerk counts {least} {kind}s and listed {taken}")


async def _kept(
    mapping: Mapped, mending: Mending, engine: AsyncEngine, lease: Lease, report: Report
) -> Mapping[str, Sequence[Part]]:
    """The parts from which to go on. Those of another mapping, or of a lost table, are forgotten.

    A row that was written with another mapping lacks a column; one that is gone, all of them.
    """
    kept = await progress.parts(engine)
    hashes = await progress.mappings(engine)
    for kind in [*kept]:
        table = mapping.tables.get(kind)
        if table is None:
            continue
        taken = sum(_taken(part) for part in kept[kind])
        why = None
        if hashes.get(kind) != fingerprint(table, report.instance):
            why = f"{kind}: begins anew, as its mapping is not that of the backfill before"
        elif taken:
            lost = taken - await mending.rows(kind)
            if lost >= max(BREAKER_LEAST, taken * _LOST_PERCENT / 100):
                why = (
                    f"{kind}: begins anew, as `{table.table}` lacks {lost} of the {taken} rows of "
                    "the backfill before"
                )
        if why is not None:
            log.warning("backfill_restarted", kind=kind, error=why)
            report.anew.append(why)
            await progress.forget(engine, lease, kind)
            del kept[kind]
    report.resumed = await progress.begun(engine)
    return kept


def _taken(part: Part) -> int:
    """How many different ones came up to where a part is: of a list, its last ones come again."""
    return part.seen if part.kind == "user" or part.finished else max(0, part.seen - OVERLAP)


def fingerprint(table: TableMapping, instance: str | None) -> str:
    """What decides which rows a backfill writes, and what into them, as a short text."""
    content = [
        instance,
        *(table.kind, table.table, table.key, table.mark),
        [[column.name, column.expression, column.type] for column in table.columns],
        [[column.name, column.expression] for column in table.adopt],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
