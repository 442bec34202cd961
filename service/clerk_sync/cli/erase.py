"""`clerk-sync erase`."""

from __future__ import annotations

import click

from clerk_sync import app
from clerk_sync.cli.common import command, load, text, unnamed
from clerk_sync.cli.exits import fail
from clerk_sync.clock import now_ms
from clerk_sync.schema.binding import bind
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.store import erasure


@command("clerk-sync erase user_2x…")
@click.argument("user_id", metavar="USER_ID", type=text)
async def erase(user_id: str) -> int:
    """Erase a person from every mapped table and from clerk-sync's own tables. It cannot be undone.

    Only the id stays, as a tombstone, so that a late event does not bring the person back. Clerk
    is not called: delete the user there as well.
    """
    settings, mapping = load()
    try:
        async with app.open_engine(settings, size=2) as engine:
            store = await bind(engine, mapping)
            removed = await erasure.erase(engine, store, user_id, now_ms=now_ms())
    except SchemaMismatch as error:
        fail(*error.faults, *unnamed(settings))
    except ValueError as error:
        fail(f"{user_id}: {error}")
    for table, number in sorted(removed.items()):
        click.echo(f"{table}: removed {number}")
    click.echo(f"{user_id} is erased: only a tombstone with the id remains")
    for kind in erasure.out_of_reach(store):
        click.echo(f"warning: rows of `{kind}` may be this user's, but no column says so", err=True)
    return 0
