"""How a walk over both sides begins and ends: of one instance, and with counts that agree."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from clerk_sync.clerk.api import ClerkUnavailable, DeletionUnconfirmed
from clerk_sync.clerk.listing import later
from clerk_sync.outcomes import Verdict
from clerk_sync.sync import progress
from clerk_sync.sync.report import BREAKER_LEAST, Report, SafetyStop, count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.clerk.listing import Part
    from clerk_sync.sync.repair import Mending

# As many ids as Clerk takes in one question.
_SAMPLE: Final = 100
# A walk that met so much less or more than Clerk counts, in percent, went wrong, or Clerk did.
_APART_PERCENT: Final = 5
# A list that is so much longer than Clerk counts may have no end.
_LONGEST_FACTOR: Final = 10
_LONGEST_LEAST: Final = 100_000
# Events of the last moments are on their way: so long may they take, in seconds.
PAUSES: Final = (0.0, 0.5, 1.5)
# https://clerk.com/docs/reference/backend-api: every id has its kind's prefix.
_IDS: Final = {
    "user": re.compile(r"user_[0-9A-Za-z]+"),
    "organization": re.compile(r"org_[0-9A-Za-z]+"),
    "organizationMembership": re.compile(r"orgmem_[0-9A-Za-z]+"),
}
# Those that a membership belongs to: kind, and where it has the id.
_OWNERS: Final = (("user", "public_user_data", "user_id"), ("organization", "organization", "id"))


def is_clerks(kind: str, key: str) -> bool:
    """Whether a key has the form of Clerk's ids: an app may have rows of its own."""
    return _IDS[kind].fullmatch(key) is not None


async def check_instance(
    clerk: Clerk, mending: Mending, engine: AsyncEngine, report: Report, *, expected: str | None
) -> None:
    """Raise SafetyStop when the key is another instance's than these tables'.

    With such a key, all of that instance's users would be written, and all of this one's
    deleted. Clerk names the instance of a key; whose the tables are is known from the last run,
    and from `expected`, the setting. Where neither helps, Clerk is asked for some of the users
    in the table: with many of them, and none known, the key is another's.
    """
    known = report.instance = await progress.instance(engine)
    found = await clerk.instance()
    for other, source in (
        (expected, "CLERK_INSTANCE_ID"),
        (known, "the last run on this database"),
    ):
        if found is not None and other is not None and found != other:
            raise SafetyStop(
                f"CLERK_SECRET_KEY is a key of the instance {found}, and {source} names {other}: "
                "nothing was changed. One database and its tables are for one instance of Clerk: "
                "correct the key; or, if these tables are to change hands, empty them and "
                "clerk-sync's own first"
            )
    report.instance = found or known
    if "user" not in mending.store.targets:
        return
    ids = [one for one in await mending.ids("user", after="") if is_clerks("user", one)]
    some = ids[:: max(1, len(ids) // _SAMPLE)][:_SAMPLE]
    if len(some) >= BREAKER_LEAST and not await clerk.known_users(some):
        raise SafetyStop(
            f"Clerk knows none of {len(some)} users of this table: nothing was changed. Is "
            "CLERK_SECRET_KEY the key of this database's instance? If all of them were deleted on "
            "purpose, `clerk-sync erase` removes each"
        )


def check_growth(kind: str, listed: int, counted: int) -> None:
    """Raise ClerkUnavailable when a list goes on far beyond what Clerk counts."""
    if listed > _LONGEST_FACTOR * counted + _LONGEST_LEAST:
        raise ClerkUnavailable(
            f"the walk does not end: Clerk counts {counted} {kind}s, and has listed {listed} so far"
        )


def check_listed(kind: str, listed: int, walked: Walked) -> None:
    """Raise ClerkUnavailable when a list and its counts cannot both be right.

    Whoever came or went during the walk may be in one of the two counts only.
    """
    least, most = sorted((walked.before, walked.after))
    if least - listed >= _slack(least):
        raise ClerkUnavailable(
            f"the walk ended early: Clerk counts {least} {kind}s and listed {listed}; "
            "nothing was deleted"
        )
    if listed - most >= _slack(most):
        raise ClerkUnavailable(
            f"Clerk counts {most} {kind}s and listed {listed}: one of the two is wrong; "
            "nothing was deleted"
        )


def _slack(counted: int) -> float:
    return max(BREAKER_LEAST, counted * _APART_PERCENT / 100)


async def again(clerk: Clerk, mending: Mending, kinds: Iterable[str]) -> None:
    """Write once more what the database refused on the way, now that all the rest is there.

    A foreign key asks for the row that it refers to, a unique one for a value that somebody else
    gave up. Whoever a membership belongs to is asked for, as both may have come during the walk.
    """
    for kind in kinds:
        refused = mending.refused(kind)
        if not refused:
            continue
        if kind == "organizationMembership":
            for owner, part, name in _OWNERS:
                ids = {str((data.get(part) or {}).get(name)) for data, _ in refused}
                await _bring(clerk, mending, owner, sorted(ids))
        for data, began_ms in refused:
            await mending.take(kind, [data], began_ms=began_ms, again=True)


async def _bring(clerk: Clerk, mending: Mending, kind: str, ids: Iterable[str]) -> None:
    if kind not in mending.store.targets or kind not in mending.tallies:
        return
    for clerk_id in ids:
        if not is_clerks(kind, clerk_id):
            continue
        try:
            read = await clerk.one(kind, clerk_id)
        except DeletionUnconfirmed:
            continue
        if read is not None:
            await mending.take(kind, [read.json], began_ms=read.began_ms)


@dataclass(slots=True)
class Walked:
    """The walk over one kind: what Clerk counted before and after it, and where it ended."""

    before: int
    end: Part
    after: int = 0


async def settle(
    clerk: Clerk,
    mending: Mending,
    walked: Mapping[str, Walked],
    report: Report,
    *,
    pauses: Sequence[float],
    dry_run: bool = False,
) -> None:
    """Count both sides, into the report; where they do not agree, a doubt says so.

    Who came after the walk is written first, and events that are on their way are waited for, in
    these pauses of so many seconds.
    """
    tallies, late = mending.tallies, Counter[str]()
    differed: dict[str, list[int]] = {kind: [] for kind in walked}
    counts: dict[str, list[int]] = {kind: [] for kind in walked}

    def differs(kind: str) -> bool:
        found = tallies[kind].found
        would = found[Verdict.MISSING] - found[Verdict.DELETED] if dry_run else 0
        rows = report.table[kind] + would - report.foreign[kind]
        counts[kind].append(report.clerk[kind])
        differed[kind].append(report.clerk[kind] - rows)
        return differed[kind][-1] != 0

    def explained(kind: str) -> bool:
        """Whether those who come and go make the difference, as no count is of one moment."""
        its, now, difference = walked[kind], counts[kind][-1], differed[kind][-1]
        if min(differed[kind]) < 0 < max(differed[kind]):
            return True  # it goes both ways, while events come
        moved = now - counts[kind][-2] if len(counts[kind]) > 1 else 0
        gone = max(0, its.before - its.after) + max(0, its.after + late[kind] - now)
        return min(-gone, moved) <= difference <= max(0, moved)

    await count(clerk, mending, walked, report)
    different = [kind for kind in walked if differs(kind)]
    for pause in pauses:
        if not different or report.unfit or report.unconfirmed:
            break
        await asyncio.sleep(pause)
        for kind, its in walked.items():
            read = await later(clerk, its.end)
            missing = tallies[kind].found[Verdict.MISSING]
            if read.json:
                await mending.take(kind, read.json, began_ms=read.began_ms)
            late[kind] += tallies[kind].found[Verdict.MISSING] - missing
        await again(clerk, mending, walked)
        await count(clerk, mending, walked, report)
        different = [kind for kind in walked if differs(kind) and not explained(kind)]
    for kind in different:
        report.doubts.append(
            f"Clerk counts {report.clerk[kind]} {kind}s, `{_table(mending, kind)}` has "
            f"{report.table[kind] - report.foreign[kind]} of them"
        )


def _table(mending: Mending, kind: str) -> str:
    return mending.store.targets[kind].mapping.table
