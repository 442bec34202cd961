"""`clerk-sync migrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from clerk_sync import app
from clerk_sync.cli.common import command, load
from clerk_sync.cli.exits import fail
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.schema import migrate as ddl
from clerk_sync.schema import rehearsal
from clerk_sync.schema.binding import store_of
from clerk_sync.schema.checks import SchemaMismatch, advice
from clerk_sync.schema.reflection import live_tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.schema.reflection import Live


@command("DATABASE_URL=mysql://… clerk-sync migrate --print > clerk-sync.sql")
@click.option("--print", "print_", is_flag=True, help="Print the SQL instead of running it.")
async def migrate(*, print_: bool) -> int:
    """Create clerk-sync's tables, and the tables and columns that the mapping needs.

    Safe to repeat, and to run from several pods at once. With --print nothing is changed: the
    missing SQL goes to stdout, for example for a PlanetScale deploy request.
    """
    settings, mapping = load()
    for warning in mapping.warnings:
        click.echo(f"warning: {warning}", err=True)
    try:
        async with app.open_engine(settings, size=2) as engine:  # one keeps the lease
            if print_:
                await _print(engine, mapping)
            else:
                await _migrate(engine, mapping, probe_rows=settings.probe_rows == "true")
    except DatabaseUnavailable as error:
        fail(f"{settings.locate().where}: {error}")
    return 0


async def _print(engine: AsyncEngine, mapping: Mapping) -> None:
    """Print the SQL that is missing."""
    if sql := await ddl.migration_sql(engine, mapping):
        click.echo(sql, nl=False)
        return
    await _check(engine, mapping)
    click.echo("-- Nothing to do: the schema is what clerk-sync needs.")


async def _migrate(engine: AsyncEngine, mapping: Mapping, *, probe_rows: bool) -> None:
    """Run the SQL that is missing, and try whether the tables take rows."""
    for line in await ddl.migrate(engine, mapping) or ["nothing to do"]:
        click.echo(line)
    live = await _check(engine, mapping)
    if probe_rows:
        try:
            rehearsed = await rehearsal.rehearse(engine, mapping, live)
        except rehearsal.AccessDenied as error:  # who runs DDL may be somebody else than who serves
            click.echo(f"advice: no probe row was written: {error}", err=True)
            return
        for warning in rehearsed.warnings:
            click.echo(f"advice: {warning}", err=True)
        if rehearsed.faults:
            fail(*rehearsed.faults)


async def _check(engine: AsyncEngine, mapping: Mapping) -> Live:
    """The live tables, once they are what the mapping needs; else the end."""
    live = await live_tables(engine, mapping)
    try:
        store_of(mapping, live)
    except SchemaMismatch as error:
        fail(*error.faults)
    for warning in advice(mapping, live):
        click.echo(f"advice: {warning}", err=True)
    return live
