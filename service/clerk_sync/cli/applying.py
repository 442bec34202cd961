"""Apply deliveries as the service does, from a command, and print what became of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Final

import click

from clerk_sync import app
from clerk_sync.clerk.signature import Delivery, InvalidSignature
from clerk_sync.cli.exits import fail
from clerk_sync.mapping.change import from_quarantine
from clerk_sync.mapping.ingest import change_of
from clerk_sync.outcomes import Answer, Outcome
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.settings import Settings

AT_ONCE: Final = 16
"""Deliveries applied at once: each may be a MiB."""

Group = list[tuple[str, Delivery | Answer]]
"""Deliveries by the names to print; an Answer is one that could not be read."""


async def apply(
    settings: Settings,
    mapping: Mapping,
    groups: AsyncIterator[Group],
    *,
    quarantined: bool = False,
) -> int:
    """Apply deliveries group by group; the exit code is 1 if any was not accepted.

    `quarantined` says that they are from the quarantine.
    """
    logs.configure(settings.log_level, settings.log_format)
    counts: Counter[str] = Counter()

    async def commit(delivery: Delivery | Answer) -> Answer:
        if isinstance(delivery, Answer):
            return delivery
        try:
            change = change_of(delivery, mapping, instance_id=settings.instance_id)
        except InvalidSignature as error:
            return Answer(Outcome.REJECTED, error.reason)
        return await committer.commit(from_quarantine(change) if quarantined else change)

    async def show(name: str, delivery: Delivery | Answer) -> None:
        answer = await commit(delivery)
        counts[answer.outcome.value] += 1
        reason = f" {answer.reason}" if answer.reason else ""
        click.echo(f"{name}: {answer.outcome.value}{reason}")

    try:
        async with app.open_committer(settings, mapping) as committer:
            async for group in groups:
                await asyncio.gather(*(show(name, delivery) for name, delivery in group))
    except SchemaMismatch as error:
        fail(*error.faults)
    click.echo(
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none"
    )
    return 1 if counts.keys() & {"rejected", "unavailable", "error"} else 0
