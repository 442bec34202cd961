"""How a run begins and ends: by counting both sides, and explaining every difference."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from clerk_sync.clerk.api import ClerkRefused, DeletionUnconfirmed
from clerk_sync.clerk.catalog import LISTED
from clerk_sync.clerk.listing import read_on
from clerk_sync.outcomes import Verdict
from clerk_sync.sync.safety import is_clerk_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.clerk.listing import Range
    from clerk_sync.mapping.model import Mapping as Mapped
    from clerk_sync.sync.repair import Repairer
    from clerk_sync.sync.report import Report

# Events of the last moments may take so long to arrive, in seconds.
PAUSES: Final = (0.0, 0.5, 1.5)
# What a membership refers to: the kind, and where the membership has its id.
_OWNERS: Final = (("user", "public_user_data", "user_id"), ("organization", "organization", "id"))


@dataclass(slots=True)
class Listed:
    """The listing of one kind: Clerk's count before and after it, and the range at its end."""

    before: int
    end: Range
    after: int = 0


async def countable(clerk: Clerk, mapping: Mapped, report: Report) -> dict[str, int]:
    """The mapped kinds that Clerk lists, with its count of each.

    Kinds that the instance has switched off go into the report.
    """
    counted = {}
    for kind in LISTED:
        if kind in mapping.tables:
            try:
                counted[kind] = await clerk.count(kind)
            except ClerkRefused as error:
                if not error.switched_off:
                    raise
                report.switched_off.append(kind)
    return counted


async def count(clerk: Clerk, repairer: Repairer, kinds: Iterable[str], report: Report) -> None:
    """Count both sides, into the report."""
    for kind in kinds:
        report.clerk[kind] = await clerk.count(kind)
        report.table[kind] = await repairer.rows(kind)


async def retry_rejected(clerk: Clerk, repairer: Repairer, kinds: Iterable[str]) -> None:
    """Write again what the database rejected, now that everything else is there.

    A foreign key needs the row that it refers to, a unique key a value that another row gave up.
    The owners of a membership are read from Clerk, as both may have been created meanwhile.
    """
    for kind in kinds:
        rejected = repairer.take_rejected(kind)
        if not rejected:
            continue
        if kind == "organizationMembership":
            for owner, part, name in _OWNERS:
                ids = {str((data.get(part) or {}).get(name)) for data, _ in rejected}
                await _bring(clerk, repairer, owner, sorted(ids))
        for data, began_ms in rejected:
            await repairer.repair(kind, [data], began_ms=began_ms, again=True)


async def _bring(clerk: Clerk, repairer: Repairer, kind: str, ids: Iterable[str]) -> None:
    if kind not in repairer.store.targets or kind not in repairer.tallies:
        return
    for clerk_id in ids:
        if not is_clerk_id(kind, clerk_id):
            continue
        try:
            read = await clerk.one(kind, clerk_id)
        except DeletionUnconfirmed:
            continue
        if read is not None:
            await repairer.repair(kind, [read.json], began_ms=read.began_ms)


async def settle(
    clerk: Clerk,
    repairer: Repairer,
    listed: Mapping[str, Listed],
    report: Report,
    *,
    pauses: Sequence[float],
    dry_run: bool = False,
) -> None:
    """Count both sides, into the report; what does not agree in the end is a discrepancy.

    Objects that were created since are written first. Events that are on their way are waited
    for: `pauses` are in seconds.
    """
    tallies, late = repairer.tallies, Counter[str]()
    differed: dict[str, list[int]] = {kind: [] for kind in listed}
    counts: dict[str, list[int]] = {kind: [] for kind in listed}

    def differs(kind: str) -> bool:
        found = tallies[kind].found
        would = found[Verdict.MISSING] - found[Verdict.DELETED] if dry_run else 0
        rows = report.table[kind] + would - report.unmanaged[kind]
        counts[kind].append(report.clerk[kind])
        differed[kind].append(report.clerk[kind] - rows)
        return differed[kind][-1] != 0

    def explained(kind: str) -> bool:
        """Whether what comes and goes makes the difference: no count is of one moment."""
        its, now, difference = listed[kind], counts[kind][-1], differed[kind][-1]
        if min(differed[kind]) < 0 < max(differed[kind]):
            return True  # it goes both ways, while events come
        moved = now - counts[kind][-2] if len(counts[kind]) > 1 else 0
        gone = max(0, its.before - its.after) + max(0, its.after + late[kind] - now)
        return min(-gone, moved) <= difference <= max(0, moved)

    await count(clerk, repairer, listed, report)
    different = [kind for kind in listed if differs(kind)]
    for pause in pauses:
        if not different or report.invalid or report.unconfirmed:
            break
        await asyncio.sleep(pause)
        for kind, its in listed.items():
            read = await read_on(clerk, its.end)
            missing = tallies[kind].found[Verdict.MISSING]
            if read.json:
                await repairer.repair(kind, read.json, began_ms=read.began_ms)
            late[kind] += tallies[kind].found[Verdict.MISSING] - missing
        await retry_rejected(clerk, repairer, listed)
        await count(clerk, repairer, listed, report)
        different = [kind for kind in listed if differs(kind) and not explained(kind)]
    for kind in different:
        report.discrepancies.append(
            f"Clerk counts {report.clerk[kind]} {kind}s, `{_table(repairer, kind)}` has "
            f"{report.table[kind] - report.unmanaged[kind]} of them"
        )


def _table(repairer: Repairer, kind: str) -> str:
    return repairer.store.targets[kind].mapping.table
