"""Clerk's API, tables and a reconcile between them: what the tests of reconciling share."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from clerk_sync import app
from clerk_sync.clerk.catalog import LISTED
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.clerk.signature import Delivery
from clerk_sync.mapping.ingest import change_of
from clerk_sync.schema.migrate import migrate
from clerk_sync.settings import Secret, Settings
from clerk_sync.sync.report import Report
from tests import clerk_api
from tests.deliveries import settings_of
from tests.histories import OWN, Committing, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.outcomes import Ending
    from clerk_sync.store.store import Store
    from clerk_sync.sync.diff import Comparison
    from clerk_sync.sync.runs import Runs
    from tests.clerk_api import ClerkApi, Event

# A production key: the limit of one for development would make the tests wait.
KEY: Final = "sk_live_c3RhbmQtaW4gb2YgdGhlIHRlc3Rz"
NAMES: Final = ("people", "organizations", "members")
TABLE: Final = dict(zip(LISTED, NAMES, strict=True))
# What runs themselves leave behind.
OF_RUNS: Final = ("clerk_sync_leases", "clerk_sync_runs")

_TABLES: Final = """
tables:
  user:
    table: people
    create: true
    key: clerk_id
    columns:
      username: {value: username, type: string(8)}
      metadata: {value: public_metadata, type: json}
    on_delete: %s
    owns:
      - {table: members, column: user_id, references: clerk_id}
  organization:
    table: organizations
    create: true
    key: clerk_id
    columns:
      name: {value: name, type: string(8)}
    owns:
      - {table: members, column: organization_id, references: clerk_id}
  organizationMembership:
    table: members
    create: true
    key: clerk_id
    columns:
      organization_id: {value: organization.id, type: id}
      user_id: {value: public_user_data.user_id, type: id}
      role: {value: role, type: string(8)}
"""
REMOVING: Final = mapped(_TABLES % "remove")
MARKING: Final = mapped(_TABLES % "{mark: deleted_at}")
PURGING: Final = mapped(_TABLES % "{mark: deleted_at, purge_after: 30d}")


def with_api(url: str, api: ClerkApi) -> Settings:
    """Return settings for this database and this API."""
    return settings_of(
        url,
        CLERK_SECRET_KEY=Secret("CLERK_SECRET_KEY", value=api.key),
        CLERK_API_URL=f"{api.url}/v1",
        CLERK_SYNC_CLERK_SHARE=1,
    )


@dataclass
class Walking:
    """One instance of Clerk's, and one database that a mapping binds to it."""

    api: ClerkApi
    database: Database
    mapping: Mapping
    store: Store
    runs: Runs
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def change(self, event: Event) -> Change:
        """The event as its one delivery brings it."""
        svix_id = f"msg_{next(self._numbers):06}"
        delivery = Delivery(svix_id, event["timestamp"] // 1000, json.dumps(event))
        return change_of(delivery, self.mapping, instance_id=None)

    async def deliver(self, *events: Event) -> list[str]:
        """Apply these webhooks, by a clock of long ago."""
        return await self.database.apply(self.store, *map(self.change, events))

    async def deliver_now(self, *events: Event) -> list[str]:
        async with Committing(self.database, self.store) as committing:
            return await committing.commit(*map(self.change, events))

    async def reconcile(
        self, *, percent: float = 5, report: Report | None = None
    ) -> tuple[Ending, Report]:
        report = Report() if report is None else report
        ending = await self.runs.reconcile(breaker_percent=percent, report=report, patience=False)
        return ending, report

    async def backfill(self, *, restart: bool = False) -> tuple[Ending, Report]:
        report = Report()
        ending = await self.runs.backfill(restart=restart, report=report)
        return ending, report

    async def look(self) -> tuple[Report, list[tuple[str, Comparison]]]:
        report, told = Report(), list[tuple[str, "Comparison"]]()
        await self.runs.dry_run(
            breaker_percent=5,
            report=report,
            on_drift=lambda kind, one: told.append((kind, one)),
        )
        return report, told

    async def ids(self, kind: str) -> list[str]:
        """The ids of the rows that are there and not marked."""
        target = self.store.targets[kind].mapping
        where = f" WHERE {target.mark} IS NULL" if target.mark else ""
        query = f"SELECT {target.key} FROM {target.table}{where} ORDER BY {target.key}"
        return [clerk_id for (clerk_id,) in await self.database.rows(query)]

    async def written(self) -> dict[str, list[str]]:
        """All that a run may write but its lease and how it ended."""
        return await self.everything(*(name for name in OWN if name not in OF_RUNS))

    async def everything(self, *own: str) -> dict[str, list[str]]:
        """Every row of the mapped tables and of clerk-sync's own."""
        tables = {one.table for one in self.mapping.tables.values()}
        return {
            name: sorted(map(repr, await self.database.rows(f"SELECT * FROM {name}")))
            for name in sorted({*tables, *(own or OWN)})
        }


@asynccontextmanager
async def walking(
    url: str, mapping: Mapping = REMOVING, *, store: Store | None = None, **options: Any
) -> AsyncIterator[Walking]:
    """Empty tables, and an empty instance of Clerk's with these options.

    A store that is bound to the tables already saves much of the time.
    """
    async with clerk_api.running(key=KEY, **options) as api, Database.at(url) as database:
        await database.empty(*(one.table for one in mapping.tables.values()))
        store = store or await database.store(mapping)
        settings, metrics = with_api(url, api), new_metrics()
        async with app.open_clerk(settings, metrics) as clerk:
            # Nothing is on its way here that could be waited for.
            runs = app.runs_of(
                settings, mapping, clerk, database.engine, store, metrics=metrics, pauses=(0.0,)
            )
            yield Walking(api, database, mapping, store, runs)


async def prepare(url: str, *ddl: str) -> dict[bool, Store]:
    """Make the tables; the stores of what marks and what removes."""
    async with Database.at(url) as database:
        await migrate(database.engine, MARKING)
        await database.ddl(*ddl)
        return {one is MARKING: await database.store(one) for one in (MARKING, REMOVING)}
