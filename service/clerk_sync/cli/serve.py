"""The commands that run the service, make its tables and say what is wrong."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import click
import structlog

from clerk_sync.check import findings
from clerk_sync.cli.common import command, fail, run, settled
from clerk_sync.database.connection import engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.schema import migrate as ddl
from clerk_sync.schema import rehearsal
from clerk_sync.schema.binding import store_of
from clerk_sync.schema.checks import SchemaMismatch, advice
from clerk_sync.schema.reflection import live_tables
from clerk_sync.settings import load as load_settings
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Mapping as Environment

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.schema.reflection import Live
    from clerk_sync.telemetry.tracing import Tracing


@command("CLERK_WEBHOOK_SIGNING_SECRET=whsec_… DATABASE_URL=mysql://… clerk-sync serve")
def serve() -> None:
    """Receive Clerk's webhooks until SIGTERM.

    It never changes the schema: with one that is missing or old it is live, not ready, and says
    what to run.
    """
    settings, mapping = settled(signing=True, mapped=True, token=True)
    assert mapping is not None
    from clerk_sync import app  # noqa: PLC0415 -- the other commands start sooner without it

    logs.configure(settings.log_level, settings.log_format)
    tracing, doubts = tracing_of(os.environ)
    for warning in (*settings.doubts(os.environ), *mapping.warnings, *doubts):
        structlog.get_logger().warning("config_warning", detail=warning)

    async def work() -> int:
        try:
            await app.serve(settings, mapping, tracing=tracing)
        except OSError as error:
            fail(
                f"cannot listen: {error.strerror or error}: "
                "CLERK_SYNC_PORT and CLERK_SYNC_INTERNAL_PORT name other ports"
            )
        return 0

    run(work())


def tracing_of(environ: Environment[str, str]) -> tuple[Tracing | None, list[str]]:
    """Tracing, if the standard's variables ask for it; and why there is none all the same.

    They may be in every pod of a cluster: none of them keeps the service from starting.
    """
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    default = "otlp" if any(environ.get(name) for name in endpoints) else "none"
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip() or default
    if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None, []
    if "otlp" not in re.split(r"[\s,]+", exporter):
        return None, [f"OTEL_TRACES_EXPORTER is {exporter}: no traces, as there is only otlp"]
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(name, "").strip()
        if protocol == "http/protobuf":
            break
        if protocol:
            told = "no traces, as there is only http/protobuf, which collectors take on port 4318"
            return None, [f"{name} is {protocol}: {told}"]
    try:
        from clerk_sync.telemetry.tracing import Tracing  # noqa: PLC0415 -- off, it costs nothing
    except ImportError:
        return None, ["OTEL_… asks for traces, but clerk-sync[otel] is not installed: no traces"]
    doubts = []
    for name in ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"):
        headers = environ.get(name, "")
        # It would be refused at each attempt, in words that quote it, and it holds a token.
        if re.search("%0[ad]", headers, re.IGNORECASE):
            return None, [f"no traces: {name} has a line break in it, as %0A or %0D"]
        parts = (part for part in headers.split(",") if part.strip())
        if not all(re.fullmatch(r"\s*[^\s:=]+\s*=.*\s*", part) for part in parts):
            doubts.append(f"{name} is no list of name=value, separated by commas")
    try:
        return Tracing.by_environment(), doubts
    except (ValueError, RuntimeError) as error:
        return None, [*doubts, f"no traces: {error}"]


@command("DATABASE_URL=mysql://… clerk-sync migrate --print > clerk-sync.sql")
@click.option("--print", "print_", is_flag=True, help="Print the SQL instead of running it.")
def migrate(*, print_: bool) -> None:
    """Make clerk-sync's tables, and what the mapping needs of others.

    Safe to run from several pods at once, and again. With --print nothing is changed: the SQL
    that is missing now goes to stdout, as for a PlanetScale deploy request.
    """
    settings, mapping = settled(signing=False, mapped=True)
    assert mapping is not None
    for warning in mapping.warnings:
        click.echo(f"warning: {warning}", err=True)

    async def work() -> int:
        engine = engine_of(settings.locate, size=2)  # one keeps the lease
        try:
            if print_:
                await printed(engine, mapping)
            else:
                await migrated(engine, mapping, probe_rows=settings.probe_rows == "true")
        except DatabaseUnavailable as error:
            fail(f"{settings.locate().where}: {error}")
        finally:
            await engine.dispose()
        return 0

    run(work())


async def printed(engine: AsyncEngine, mapping: Mapping) -> None:
    """Print the SQL that is missing."""
    if sql := await ddl.migration_sql(engine, mapping):
        click.echo(sql, nl=False)
        return
    await checked(engine, mapping)
    click.echo("-- Nothing to do: the schema is what clerk-sync needs.")


async def migrated(engine: AsyncEngine, mapping: Mapping, *, probe_rows: bool) -> None:
    """Run what is missing, and try whether the tables take rows."""
    for line in await ddl.migrate(engine, mapping) or ["nothing to do"]:
        click.echo(line)
    live = await checked(engine, mapping)
    if probe_rows:
        try:
            rehearsed = await rehearsal.rehearse(engine, mapping, live)
        except rehearsal.AccessDenied as error:  # who runs DDL may be somebody else than who serves
            click.echo(f"advice: no row was tried: {error}", err=True)
            return
        for warning in rehearsed.warnings:
            click.echo(f"advice: {warning}", err=True)
        if rehearsed.faults:
            fail(*rehearsed.faults)


async def checked(engine: AsyncEngine, mapping: Mapping) -> Live:
    """Return the live tables, or exit with their faults."""
    live = await live_tables(engine, mapping)
    try:
        store_of(mapping, live)
    except SchemaMismatch as error:
        fail(*error.faults)
    for warning in advice(mapping, live):
        click.echo(f"advice: {warning}", err=True)
    return live


@command("clerk-sync check")
def check() -> None:
    """Check settings, secrets, database, schema, mapping and Clerk's key: a line each.

    Exit code 1 if any fails.
    """

    async def work() -> int:
        settings, faults = load_settings()
        failed = False
        async for finding in findings(settings, faults, settings.doubts(os.environ)):
            click.echo(finding)
            failed |= finding.verdict == "FAIL"
        return 1 if failed else 0

    run(work())
