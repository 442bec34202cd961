"""`clerk-sync check`: settings, secrets, mapping, database, schema, Clerk's key; a line each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import aiohttp
import click
from sqlalchemy.ext.asyncio import AsyncEngine

from clerk_sync import app
from clerk_sync.cli.common import command
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.database.url import Target
from clerk_sync.mapping import loader
from clerk_sync.mapping.model import Mapping
from clerk_sync.rotation import signing_faults, token_faults
from clerk_sync.schema import rehearsal
from clerk_sync.schema.binding import store_of
from clerk_sync.schema.checks import RUN_MIGRATE, SchemaMismatch, advice, own_faults
from clerk_sync.schema.reflection import live_tables
from clerk_sync.settings import InvalidSettings, Settings, load
from clerk_sync.store import write_check

_CLERK_SECONDS: Final = 10


@command("clerk-sync check")
async def check() -> int:
    """Check settings, secrets, database, schema, mapping and Clerk's key.

    Prints one line per check. Exit code 1 if any fails.
    """
    settings, faults = load()
    failed = False
    async for finding in findings(settings, faults, settings.warnings(os.environ)):
        click.echo(finding)
        failed |= finding.verdict == "FAIL"
    return 1 if failed else 0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: the verdict, what was checked, and what was found."""

    verdict: Literal["ok", "warn", "FAIL"]
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<4} {self.about:<9} {self.text}"


async def findings(
    settings: Settings, faults: Sequence[str], warnings: Sequence[str]
) -> AsyncIterator[Finding]:
    """Check everything, one thing after the other.

    `faults` are those of the settings, `warnings` what in them is probably a mistake.
    """
    listen = f"listen on {settings.port} and {settings.internal_port}"
    for finding in _failed_or("settings", faults, listen):
        yield finding
    for warning in warnings:
        yield Finding("warn", "settings", warning)
    for finding in _failed_or("secrets", signing_faults(settings), "the signing secret is one"):
        yield finding
    if settings.app_token is not None:
        for finding in _failed_or("app token", token_faults(settings), "is one"):
            yield finding
    mapping = None
    try:
        mapping = loader.load(settings.config)
        yield Finding("ok", "mapping", f"{mapping.source}: {', '.join(mapping.tables)}")
        for warning in mapping.warnings:
            yield Finding("warn", "mapping", warning)
    except loader.InvalidMapping as error:
        for fault in error.faults:
            yield Finding("FAIL", "mapping", fault)
    async for finding in _of_database(settings, mapping):
        yield finding
    for finding in await _of_clerk_key(settings):
        yield finding


def _failed_or(about: str, faults: Iterable[str], fine: str) -> Iterator[Finding]:
    found = [Finding("FAIL", about, fault) for fault in faults]
    yield from found or [Finding("ok", about, fine)]


async def _of_database(settings: Settings, mapping: Mapping | None) -> AsyncIterator[Finding]:
    try:
        target = settings.locate()
    except InvalidSettings as error:
        for fault in error.faults:
            yield Finding("FAIL", "database", fault)
        return
    if target.path is not None and not Path(target.path).exists():  # noqa: ASYNC240 -- once
        missing = f"{target.where}: the file does not exist yet: {RUN_MIGRATE}"
        yield Finding("FAIL", "database", missing)
        return
    async with app.open_engine(settings, size=1) as engine:
        async for finding in _of_schema(settings, engine, mapping, target):
            yield finding


async def _of_schema(
    settings: Settings, engine: AsyncEngine, mapping: Mapping | None, target: Target
) -> AsyncIterator[Finding]:
    try:
        live = await live_tables(engine, mapping)
        # After a failover the old primary answers every SELECT. Without tables there is nothing
        # to write to yet.
        if not any(own_faults(live)):
            await write_check.check_privileges(engine)
            await write_check.check_writes(engine)
    except DatabaseUnavailable as error:
        yield Finding("FAIL", "database", f"{target.where}: {error}")
        return
    yield Finding("ok", "database", ", ".join(filter(None, (target.where, target.secrecy))))
    if mapping is None:
        return
    try:
        store_of(mapping, live)
    except SchemaMismatch as error:
        for fault in error.faults:
            yield Finding("FAIL", "schema", fault)
        return
    checked = "as the mapping needs it"
    warnings = [*advice(mapping, live)]
    if settings.probe_rows == "false":
        warnings.append("no probe row was written, because CLERK_SYNC_PROBE_ROWS is false")
        yield Finding("ok", "schema", checked)
    else:
        try:
            rehearsed = await rehearsal.rehearse(engine, mapping, live)
        except DatabaseUnavailable as error:
            yield Finding("FAIL", "database", f"{target.where}: {error}")
            return
        if rehearsed.tables:
            checked += f"; written, read back and rolled back: {', '.join(rehearsed.tables)}"
        for finding in _failed_or("schema", rehearsed.faults, checked):
            yield finding
        warnings += rehearsed.warnings
    for warning in warnings:
        yield Finding("warn", "schema", warning)


async def _of_clerk_key(settings: Settings) -> list[Finding]:
    key = settings.clerk_key
    if key is None:
        return [Finding("ok", "clerk key", "not set; webhooks do not need it")]
    faults: list[str] = []
    try:
        headers = {"Authorization": f"Bearer {key.read()}"}
        timeout = aiohttp.ClientTimeout(total=_CLERK_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{settings.api_url}/users/count", headers=headers) as response,
        ):
            if response.status in (401, 403):
                faults = [
                    f"{key.name}: Clerk answers {response.status}: copy the secret key (sk_…) again"
                ]
            elif response.status != 200:  # noqa: PLR2004
                faults = [f"CLERK_API_URL: Clerk answers {response.status}"]
    except InvalidSettings as error:
        faults = list(error.faults)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        faults = [f"CLERK_API_URL: not reachable: {type(error).__name__}"]
    return list(_failed_or("clerk key", faults, "Clerk accepts it"))
