"""The service with the database call left out: what everything but the database costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvloop

from clerk_sync import app, settings
from clerk_sync.database.connection import Connection, connect
from clerk_sync.mapping import loader
from clerk_sync.outcomes import Answer, Outcome
from clerk_sync.store.committer import Committer
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from clerk_sync.mapping.change import Change
    from clerk_sync.settings import Settings
    from clerk_sync.telemetry.metrics import Metrics
    from clerk_sync.telemetry.tracing import Trace


class NothingToCommit(Committer):
    """Answers at once, without queue, transaction or row: the strictest ceiling there is."""

    async def commit(self, change: Change, trace: Trace | None = None) -> Answer:  # noqa: ARG002
        return Answer(Outcome.APPLIED)


def committer_of(settings: Settings, metrics: Metrics) -> Committer:
    async def opened() -> Connection:
        return await connect(settings.locate(), seconds=settings.deadline_seconds)

    return NothingToCommit(opened, metrics=metrics, writers=1, batch_limit=1, queue_limit=1)


if __name__ == "__main__":
    found, _ = settings.load()
    logs.configure(found.log_level, found.log_format)
    uvloop.run(
        app.serve(found, loader.load(found.config), committer_of=committer_of),
    )
