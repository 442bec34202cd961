"""What a backfill or a reconcile found and did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk.api import ClerkRefused
from clerk_sync.clerk.catalog import LISTED
from clerk_sync.outcomes import Ending

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.sync.repair import Mending, Tally

# The breaker does not mind fewer than this, however small the table.
BREAKER_LEAST: Final = 10


@dataclass(slots=True)
class Report:
    """What a run found and did, by kind.

    `clerk` and `table` are what both sides counted at the end, `absent` the kinds that the
    Clerk instance has switched off. `unconfirmed` are rows that Clerk did not list, and that it
    neither gave nor said, in its own words, to have no more. `foreign` are rows, by kind, whose
    keys are no ids of Clerk's: they are left. `doubts` say in sentences why both sides do not
    agree. `instance` is whose users these are, `anew` why a backfill did not go on where the
    last one was left off.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    clerk: dict[str, int] = field(default_factory=dict)
    table: dict[str, int] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    unconfirmed: int = 0
    foreign: Counter[str] = field(default_factory=Counter)
    doubts: list[str] = field(default_factory=list)
    purged: int = 0
    resumed: datetime | None = None
    anew: list[str] = field(default_factory=list)
    instance: str | None = None

    @property
    def drift(self) -> dict[str, dict[str, int]]:
        """What was out of step, by kind."""
        return {kind: tally.drift for kind, tally in self.tallies.items()}

    @property
    def found(self) -> int:
        """How many rows were out of step."""
        return sum(sum(drift.values()) for drift in self.drift.values())

    @property
    def unfit(self) -> int:
        """How many objects no row could be made of."""
        return sum(tally.unfit for tally in self.tallies.values())

    @property
    def ending(self) -> Ending:
        """How a run with this report ended, if it did get to its end."""
        if self.unfit or self.unconfirmed or self.doubts:
            return Ending.UNMENDED
        return Ending.MENDED if self.found else Ending.IN_STEP

    def summary(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "read": {kind: tally.read for kind, tally in self.tallies.items()},
            "written": {kind: tally.written for kind, tally in self.tallies.items()},
            "unfit": {kind: tally.unfit for kind, tally in self.tallies.items()},
            "drift": self.drift,
            "clerk": self.clerk,
            "table": self.table,
            "unconfirmed": self.unconfirmed,
            "foreign": dict(self.foreign),
            "doubts": self.doubts,
            "purged": self.purged,
            "instance": self.instance,
        }


class SafetyStop(Exception):
    """What Clerk says is more likely a mistake than true, and nothing was done about it."""


async def listed(clerk: Clerk, mapping: Mapping, report: Report) -> dict[str, int]:
    """What there is to walk: the mapped kinds that Clerk lists, with what it counts of each.

    A kind that the instance has switched off goes into the report.
    """
    counted = {}
    for kind in LISTED:
        if kind in mapping.tables:
            try:
                counted[kind] = await clerk.count(kind)
            except ClerkRefused as error:
                if not error.switched_off:
                    raise
                report.absent.append(kind)
    return counted


async def count(clerk: Clerk, mending: Mending, kinds: Iterable[str], report: Report) -> None:
    """What both sides count, into the report."""
    for kind in kinds:
        report.clerk[kind] = await clerk.count(kind)
        report.table[kind] = await mending.rows(kind)
