"""What a backfill or a reconcile found and did, by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clerk_sync.outcomes import DRIFTS, Ending, Verdict

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(slots=True)
class Tally:
    """What became of one kind's objects: `read` from Clerk, `written` to the table.

    `found` counts by verdict.
    """

    read: int = 0
    written: int = 0
    found: Counter[Verdict] = field(default_factory=Counter)

    @property
    def drift(self) -> dict[str, int]:
        """The number of rows that differed, by how."""
        return {verdict.value: self.found[verdict] for verdict in DRIFTS}

    @property
    def invalid(self) -> int:
        """The number of objects that the table cannot store."""
        return self.found[Verdict.UNFIT]


@dataclass(slots=True)
class Report:
    """What a run found and did.

    `clerk` and `table` are the counts of both sides at the end, `discrepancies` sentences on why
    they do not agree. `switched_off` are the kinds that the Clerk instance does not use.
    `unconfirmed` counts rows that stay although Clerk did not list them, `unmanaged` rows, by
    kind, whose keys are no Clerk ids. `instance` is the Clerk instance. Of a backfill: `resumed`
    is when the one started that it continues, `restarted` says why kinds start from the
    beginning.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    clerk: dict[str, int] = field(default_factory=dict)
    table: dict[str, int] = field(default_factory=dict)
    switched_off: list[str] = field(default_factory=list)
    unconfirmed: int = 0
    unmanaged: Counter[str] = field(default_factory=Counter)
    discrepancies: list[str] = field(default_factory=list)
    purged: int = 0
    resumed: datetime | None = None
    restarted: list[str] = field(default_factory=list)
    instance: str | None = None

    @property
    def drift(self) -> dict[str, dict[str, int]]:
        """The number of rows that differed, by kind and how."""
        return {kind: tally.drift for kind, tally in self.tallies.items()}

    @property
    def drifted(self) -> int:
        """The number of rows that differed."""
        return sum(sum(drift.values()) for drift in self.drift.values())

    @property
    def invalid(self) -> int:
        """The number of objects that their tables cannot store."""
        return sum(tally.invalid for tally in self.tallies.values())

    @property
    def ending(self) -> Ending:
        """How a run with this report ended, provided that nothing interrupted it."""
        if self.invalid or self.unconfirmed or self.discrepancies:
            return Ending.UNMENDED
        return Ending.MENDED if self.drifted else Ending.IN_STEP

    def summary(self) -> dict[str, Any]:
        """The report as plain JSON values, for the log and `clerk_sync_runs`."""
        return {
            "read": {kind: tally.read for kind, tally in self.tallies.items()},
            "written": {kind: tally.written for kind, tally in self.tallies.items()},
            "invalid": {kind: tally.invalid for kind, tally in self.tallies.items()},
            "drift": self.drift,
            "clerk": self.clerk,
            "table": self.table,
            "unconfirmed": self.unconfirmed,
            "unmanaged": dict(self.unmanaged),
            "discrepancies": self.discrepancies,
            "purged": self.purged,
            "instance": self.instance,
        }
