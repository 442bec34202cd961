"""Write what Clerk has and the tables lack, resuming where the last backfill stopped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.clerk.api import ClerkUnavailable
from clerk_sync.clerk.listing import OVERLAP, Page, Range, each_page, ranges_of
from clerk_sync.clock import now_utc
from clerk_sync.outcomes import Verdict
from clerk_sync.sync import checkpoints
from clerk_sync.sync.counts import Listed, countable, retry_rejected, settle
from clerk_sync.sync.report import Report, Tally
from clerk_sync.sync.safety import GUARD_LEAST, check_growth, check_instance, check_listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.mapping.model import Mapping as Mapped
    from clerk_sync.mapping.model import TableMapping
    from clerk_sync.store.lease import Lease
    from clerk_sync.sync.repair import Repairer

log = structlog.get_logger()

# A backfill that started longer ago than this is not resumed.
OLD_SECONDS: Final = 86_400.0
# A table that lacks so many of the rows that were written is another table.
_LOST_PERCENT: Final = 5


async def backfill(
    clerk: Clerk,
    mapping: Mapped,
    repairer: Repairer,
    engine: AsyncEngine,
    lease: Lease,
    *,
    instance: str | None,
    pauses: Sequence[float],
    restart: bool,
    report: Report,
    on_page: Callable[[str, int, int], None],
) -> None:
    """Write all objects that Clerk has and the tables lack.

    Users first, then organizations, then memberships: rows may refer to those before them.
    `instance` is the Clerk instance that the settings name, `pauses` is for `settle`. `on_page` is
    called after each page, with the kind, how many objects were processed, and how many there
    are. `restart` ignores the checkpoints. Raises SafetyStop, ClerkUnavailable, ClerkRefused,
    DatabaseUnavailable, LeaseLost.
    """
    report.tallies = repairer.tallies
    counted = await countable(clerk, mapping, report)
    await check_instance(clerk, repairer, engine, report, expected=instance)
    started_at = await checkpoints.started_at(engine)
    if restart or (started_at is not None and _age(started_at) > OLD_SECONDS):
        await checkpoints.clear(engine, lease)
    saved = await _resumed_ranges(mapping, repairer, engine, lease, report)
    repairer.tallies |= {kind: Tally() for kind in counted}
    listing: dict[str, Listed] = {}
    for kind, total in counted.items():
        ranges = saved.get(kind) or await ranges_of(clerk, kind, count=total)
        if kind not in saved:
            await checkpoints.save(
                engine, ranges, fingerprint(mapping.tables[kind], report.instance)
            )
        taken = Counter({kind: sum(_written(range_) for range_ in ranges)})
        listing[kind] = Listed(total, ranges[-1])

        async def take(page: Page, taken: Counter[str] = taken) -> None:
            lease.check()
            kind = page.range.kind
            ahead = await repairer.repair(kind, page.objects, began_ms=page.began_ms)
            repairer.tallies[kind].found[Verdict.NEWER] += len(ahead)
            await checkpoints.advance(repairer, page.range)
            taken[kind] += len(page.objects)
            if page.range.number == listing[kind].end.number:
                listing[kind].end = page.range
            check_growth(kind, taken[kind], counted[kind])
            on_page(kind, taken[kind], counted[kind])

        await each_page(clerk, ranges, take)
        listing[kind].after = await clerk.count(kind)
        _report_listed(report, kind, taken[kind], listing[kind], resumed=kind in saved)
    await retry_rejected(clerk, repairer, counted)
    await checkpoints.clear(engine, lease)
    await settle(clerk, repairer, listing, report, pauses=pauses)


def _report_listed(
    report: Report, kind: str, taken: int, listing: Listed, *, resumed: bool
) -> None:
    """Report a discrepancy if the list is not what Clerk counts.

    A resumed run counts those twice that were created at the moment of its checkpoint.
    """
    try:
        if not resumed:
            check_listed(kind, taken, before=listing.before, after=listing.after)
    except ClerkUnavailable as error:
        report.discrepancies.append(str(error).partition(";")[0])
        return
    least = min(listing.before, listing.after)
    if taken < least:
        report.discrepancies.append(f"Clerk counts {least} {kind}s and listed {taken}")


async def _resumed_ranges(
    mapping: Mapped, repairer: Repairer, engine: AsyncEngine, lease: Lease, report: Report
) -> Mapping[str, Sequence[Range]]:
    """The ranges to resume. Those of another mapping, or of a table that was lost, start over.

    Rows that were written with another mapping lack columns; those of a lost table, everything.
    """
    saved = await checkpoints.load(engine)
    hashes = await checkpoints.fingerprints(engine)
    for kind in [*saved]:
        table = mapping.tables.get(kind)
        if table is None:
            continue
        taken = sum(_written(range_) for range_ in saved[kind])
        why = None
        if hashes.get(kind) != fingerprint(table, report.instance):
            why = f"{kind}: starts from the beginning, as its mapping has changed"
        elif taken:
            lost = taken - await repairer.rows(kind)
            if lost >= max(GUARD_LEAST, taken * _LOST_PERCENT / 100):
                why = (
                    f"{kind}: starts from the beginning, as `{table.table}` lacks {lost} of the "
                    f"{taken} rows of the last backfill"
                )
        if why is not None:
            log.warning("backfill_restarted", kind=kind, error=why)
            report.restarted.append(why)
            await checkpoints.clear(engine, lease, kind)
            del saved[kind]
    report.resumed = await checkpoints.started_at(engine)
    return saved


def _written(range_: Range) -> int:
    """How many different objects were written: those at the end of a list are read again."""
    return (
        range_.seen if range_.kind == "user" or range_.finished else max(0, range_.seen - OVERLAP)
    )


def fingerprint(table: TableMapping, instance: str | None) -> str:
    """A hash of everything that decides which rows a backfill writes, and what into them."""
    content = [
        instance,
        *(table.kind, table.table, table.key, table.mark),
        [[column.name, column.expression, column.type] for column in table.columns],
        [[column.name, column.expression] for column in table.adopt],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _age(at: datetime) -> float:
    return (now_utc() - at).total_seconds()
