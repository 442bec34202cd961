"""`clerk-sync quarantine`: list, replay, drop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING

import click

from clerk_sync import app
from clerk_sync.cli.applying import AT_ONCE, apply
from clerk_sync.cli.common import command, load, load_settings, text
from clerk_sync.cli.exits import fail
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.schema.checks import own_faults
from clerk_sync.schema.reflection import live_tables
from clerk_sync.store import quarantine as dead_letters

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.cli.applying import Group


@click.group(epilog="\b\nExample:\n  clerk-sync quarantine list")
def quarantine() -> None:
    """List, replay or drop events that could not be applied."""


@contextlib.asynccontextmanager
async def _open_engine() -> AsyncIterator[AsyncEngine]:
    """An engine on a database that has clerk-sync's tables; else the end of the command."""
    settings = load_settings()
    async with app.open_engine(settings, size=1) as engine:
        if faults := [*own_faults(await live_tables(engine))]:
            fail(*(f"{settings.locate().where}: {fault}" for fault in faults))
        yield engine


@command("clerk-sync quarantine list --json", name="list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with payloads.")
async def list_(*, as_json: bool) -> int:
    """List the events in quarantine, oldest first, and why they are there."""
    async with _open_engine() as engine:
        events = await dead_letters.listed(engine, payloads=as_json)
    for one in events:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(one), default=str, ensure_ascii=False))
        else:
            at = one.quarantined_at.isoformat(sep=" ", timespec="seconds")
            retry = f"  next try {one.retry_at:%H:%M:%S} UTC" if one.retry_at else ""
            click.echo(
                f"{at}  {one.reason:<14} {one.detail or '-':<20} "
                f"{one.type:<30} {one.clerk_id or '-'}  {one.svix_id}{retry}"
            )
    if not events and not as_json:
        click.echo("the quarantine is empty")
    return 0


@command("clerk-sync quarantine replay --all")
@click.argument("svix_ids", nargs=-1, metavar="[SVIX_ID]…", type=text)
@click.option("--all", "everything", is_flag=True, help="Replay every event in quarantine.")
async def replay(svix_ids: tuple[str, ...], *, everything: bool) -> int:
    """Apply quarantined events again, after you corrected the column or the mapping.

    Events that succeed leave the quarantine. Exit code 1 if any stays in it.
    """
    if bool(svix_ids) == everything:
        fail("name the events (clerk-sync quarantine list), or give --all")
    settings, mapping = load()
    async with app.open_engine(settings, size=1) as engine:
        events = await dead_letters.listed(engine, svix_ids, payloads=False)
        ids = [one.svix_id for one in events]
        missing = sorted({*svix_ids} - {*ids})
        for svix_id in missing:
            click.echo(f"{svix_id}: is not in quarantine")
        failed = await apply(settings, mapping, _deliveries(engine, ids), quarantined=True)
        left = ids and await dead_letters.listed(engine, ids, payloads=False)
    return 1 if failed or missing or left else 0


async def _deliveries(engine: AsyncEngine, ids: Sequence[str]) -> AsyncIterator[Group]:
    """The deliveries in quarantine. Those whose payload was never stored stay as they are."""
    for start in range(0, len(ids), AT_ONCE):
        yield [
            (one.svix_id, one.delivery or Answer(Outcome.QUARANTINED, Reason(one.reason)))
            for one in await dead_letters.listed(engine, ids[start : start + AT_ONCE])
        ]


@command("clerk-sync quarantine drop msg_2x…")
@click.argument("svix_ids", nargs=-1, required=True, metavar="SVIX_ID…", type=text)
async def drop(svix_ids: tuple[str, ...]) -> int:
    """Delete events from the quarantine for good. Exit code 1 if one was not in quarantine."""
    async with _open_engine() as engine:
        dropped = await dead_letters.drop(engine, svix_ids)
    click.echo(f"dropped {dropped} of {len({*svix_ids})}")
    return 0 if dropped == len({*svix_ids}) else 1


for _command in (list_, replay, drop):
    quarantine.add_command(_command)
