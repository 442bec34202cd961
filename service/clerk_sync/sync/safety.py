"""What keeps a run from doing harm: another instance's key, a list that is wrong, mass deletion."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from clerk_sync.clerk.api import ClerkUnavailable
from clerk_sync.sync import history

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.sync.repair import Repairer
    from clerk_sync.sync.report import Report

GUARD_LEAST: Final = 10
"""Fewer rows than this prove nothing, however small the table."""
# As many ids as Clerk accepts in one question.
_SAMPLE: Final = 100
# A list and a count that differ by more, in percent, cannot both be right.
_APART_PERCENT: Final = 5
# A list that is so much longer than Clerk's count may have no end.
_LONGEST_FACTOR: Final = 10
_LONGEST_LEAST: Final = 100_000
_OFF_PERCENT: Final = 100
# https://clerk.com/docs/reference/backend-api: every id has its kind's prefix.
_IDS: Final = {
    "user": re.compile(r"user_[0-9A-Za-z]+"),
    "organization": re.compile(r"org_[0-9A-Za-z]+"),
    "organizationMembership": re.compile(r"orgmem_[0-9A-Za-z]+"),
}


class SafetyStop(Exception):
    """The run stopped before doing what is probably a mistake."""


def is_clerk_id(kind: str, key: str) -> bool:
    """Whether a key has the form of Clerk's ids: an app may have rows of its own."""
    return _IDS[kind].fullmatch(key) is not None


async def check_instance(
    clerk: Clerk, repairer: Repairer, engine: AsyncEngine, report: Report, *, expected: str | None
) -> None:
    """Raise SafetyStop if the key belongs to another instance than these tables.

    With such a key, all users of that instance would be written, and all of this one's deleted.
    Clerk says which instance a key belongs to. Which one the tables belong to is known from the
    last run, and from `expected`, the setting. If neither is known, Clerk is asked for a sample
    of the users in the table: if it knows none of them, the key is another instance's.
    """
    known = report.instance = await history.instance(engine)
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
    if "user" not in repairer.store.targets:
        return
    ids = [one for one in await repairer.ids("user", after="") if is_clerk_id("user", one)]
    some = ids[:: max(1, len(ids) // _SAMPLE)][:_SAMPLE]
    if len(some) >= GUARD_LEAST and not await clerk.known_users(some):
        raise SafetyStop(
            f"Clerk knows none of {len(some)} users of this table: nothing was changed. Is "
            "CLERK_SECRET_KEY the key of this database's instance? If all of them were deleted on "
            "purpose, `clerk-sync erase` removes each"
        )


def check_deletions(kind: str, orphaned: int, rows: int, *, percent: float) -> None:
    """The deletion guard: raise SafetyStop if a run would delete too much of a table.

    `orphaned` of its `rows` are about to be deleted. `percent` is how much of a table may go,
    100 is everything.
    """
    limit = math.inf if percent >= _OFF_PERCENT else max(GUARD_LEAST, rows * percent / 100)
    if orphaned >= limit:
        raise SafetyStop(
            f"{orphaned} of {rows} {kind}s are no longer in Clerk, which the deletion guard "
            f"({percent:g} %, at least {GUARD_LEAST}) takes for a mistake: nothing was deleted. Is "
            "CLERK_SECRET_KEY the key of this database's instance? `clerk-sync reconcile "
            "--dry-run --breaker 100` lists them. If they were deleted on purpose, run it again "
            "with --breaker 100"
        )


def check_growth(kind: str, listed: int, counted: int) -> None:
    """Raise ClerkUnavailable if a list goes on far beyond what Clerk counts."""
    if listed > _LONGEST_FACTOR * counted + _LONGEST_LEAST:
        raise ClerkUnavailable(
            f"the list does not end: Clerk counts {counted} {kind}s, and has listed {listed} so far"
        )


def check_listed(kind: str, listed: int, *, before: int, after: int) -> None:
    """Raise ClerkUnavailable if a list, and the counts before and after it, cannot all be right.

    An object that was created or deleted meanwhile may be in one of the two counts only.
    """
    least, most = sorted((before, after))
    if least - listed >= _slack(least):
        raise ClerkUnavailable(
            f"the list ended early: Clerk counts {least} {kind}s and listed {listed}; "
            "nothing was deleted"
        )
    if listed - most >= _slack(most):
        raise ClerkUnavailable(
            f"Clerk counts {most} {kind}s and listed {listed}: one of the two is wrong; "
            "nothing was deleted"
        )


def _slack(counted: int) -> float:
    return max(GUARD_LEAST, counted * _APART_PERCENT / 100)
