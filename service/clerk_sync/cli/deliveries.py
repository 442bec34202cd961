"""The commands that make deliveries, apply them again, and look after the quarantine."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import secrets
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import click

from clerk_sync.clerk import samples, signature
from clerk_sync.clerk.signature import Delivery
from clerk_sync.cli.common import cli, command, fail, run, settled, text
from clerk_sync.database.connection import engine_of
from clerk_sync.mapping.change import from_quarantine
from clerk_sync.mapping.ingest import change_of
from clerk_sync.mapping.model import Mapping
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.schema.checks import SchemaMismatch, own_faults
from clerk_sync.schema.reflection import live_tables
from clerk_sync.settings import Settings
from clerk_sync.store import quarantine as dead_letters
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine
    from standardwebhooks import Webhook


# Deliveries applied at once by a command: each may be a MiB.
AT_ONCE = 16
Group = list[tuple[str, "Delivery | Answer"]]


def _signers(settings: Settings) -> tuple[Webhook, ...]:
    """Of settings that `settled` has found to have a signing secret."""
    assert settings.signing_secret is not None
    return signature.signers(settings.signing_secret.read())


@command("clerk-sync trigger user.created --id user_ada --url http://127.0.0.1:8080/webhooks/clerk")
@click.argument("type_", metavar="TYPE", type=text)
@click.option("--url", type=text, help="Where to post. Default: the service on this machine.")
@click.option("--id", "clerk_id", type=text, help="The Clerk id of the object. Default: a new one.")
@click.option(
    "--file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send this JSON instead: a whole event, or its `data`.",
)
def trigger(type_: str, url: str | None, clerk_id: str | None, file: Path | None) -> None:
    """Post a signed, realistic event of this TYPE, such as user.created.

    It is of the instance that CLERK_INSTANCE_ID names. Exit code 0 if it was answered 2xx, and not
    put into quarantine.
    """
    settings, _ = settled(signing=True, mapped=False)
    now_ms = time.time_ns() // 1_000_000
    instance = {"instance_id": settings.instance_id} if settings.instance_id else {}
    try:
        event = samples.event(type_, clerk_id=clerk_id, now_ms=now_ms, **instance)
        if file is not None:
            event = _event_from(file, event, clerk_id)
    except ValueError as error:
        fail(str(error))
    body = json.dumps(event)
    svix_id = f"msg_{secrets.token_urlsafe(20)}"
    headers = signature.signed(
        body, svix_id=svix_id, sent_at=datetime.now(UTC), signers=_signers(settings)[:1]
    )
    target = url or _here(settings)

    async def work() -> int:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session,
                session.post(target, data=body, headers=headers) as response,
            ):
                text = await response.text(errors="replace")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            fail(f"{target}: {type(error).__name__}: is the service running there?")
        data = event.get("data")
        named = data.get("id") if isinstance(data, dict) else None
        click.echo(f"{event.get('type')} {named or ''} as {svix_id}: {response.status} {text}")
        if '"quarantined"' in text:
            click.echo("`clerk-sync quarantine list` says what it failed on", err=True)
            return 1
        return 0 if response.ok else 1

    run(work())


@command("clerk-sync probe --url https://hooks.example.com/webhooks/clerk")
@click.option(
    "--url", type=text, help="The webhook's public URL. Default: the service on this machine."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=30,
    show_default=True,
    help="Try again for so long where that may help.",
)
def probe(url: str | None, seconds: float) -> None:
    """Send a signed event through the public URL, and say whether it was committed.

    It changes no mapped table, and needs nothing but the URL and the signing secret. Exit code
    1 says that what Clerk sends does not get through, and why.
    """
    settings, _ = settled(signing=True, mapped=False, located=False)
    from clerk_sync.cli import probe as probing  # noqa: PLC0415 -- the other commands need none

    try:
        target = probing.address(url or _here(settings))
    except ValueError as error:
        fail(f"--url: {error}")

    async def work() -> int:
        found = await probing.probe(target, _signers(settings), seconds=seconds)
        if not found.through:
            fail(f"{probing.shown(target)}: {found.text}")
        click.echo(f"{probing.shown(target)}: {found.text}")
        return 0

    run(work())


def _here(settings: Settings) -> str:
    return f"http://127.0.0.1:{settings.port}{settings.webhook_path}"


def _event_from(file: Path, event: dict[str, Any], clerk_id: str | None) -> dict[str, Any]:
    """The event in the file; or `event` with the file's object for its `data`."""
    try:
        given = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file}: must hold a JSON object")  # noqa: TRY004 -- of the input
    if "data" not in given or "type" not in given:
        given = {**event, "data": given}
    if clerk_id is not None and isinstance(given["data"], dict):
        given["data"]["id"] = clerk_id
    return given


@command("clerk-sync replay deliveries.ndjson")
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"))
def replay(file: Any) -> None:
    """Apply recorded deliveries from FILE, or from stdin with `-`.

    One JSON object per line with `headers` and `body_b64`, as Clerk's own CLI listener prints
    them. Their signatures are checked, their age is not. Exit code 1 if any was not taken.
    """
    settings, mapping = settled(signing=True, mapped=True)
    assert mapping is not None
    keys = _signers(settings)

    def deliveries() -> Iterator[tuple[str, Delivery | Answer]]:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _recorded(line, keys)

    async def groups() -> AsyncIterator[Group]:
        lines = deliveries()
        while some := list(itertools.islice(lines, AT_ONCE)):
            yield some

    run(_applied(settings, mapping, groups()))


def _recorded(line: str, keys: Sequence[Webhook]) -> Delivery | Answer:
    try:
        record = json.loads(line)
        headers = {str(name).lower(): str(value) for name, value in record["headers"].items()}
        body = base64.b64decode(record["body_b64"], validate=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Answer(Outcome.REJECTED, Reason.MALFORMED)
    try:
        return signature.recorded(headers, body, signers=keys)
    except signature.InvalidSignature as error:
        return Answer(Outcome.REJECTED, error.reason)


async def _applied(
    settings: Settings,
    mapping: Mapping,
    groups: AsyncIterator[Group],
    *,
    kept: bool = False,
) -> int:
    """Apply deliveries as the service would, group by group; 1 if any was not taken.

    `kept` ones are from the quarantine.
    """
    from clerk_sync import app  # noqa: PLC0415

    logs.configure(settings.log_level, settings.log_format)
    counts: Counter[str] = Counter()

    async def told(name: str, delivery: Delivery | Answer) -> None:
        answer = delivery if isinstance(delivery, Answer) else await taken(delivery)
        counts[answer.outcome.value] += 1
        click.echo(
            f"{name}: {answer.outcome.value}" + (f" {answer.reason}" if answer.reason else "")
        )

    async def taken(delivery: Delivery) -> Answer:
        try:
            change = change_of(delivery, mapping, instance_id=settings.instance_id)
            return await committer.commit(from_quarantine(change) if kept else change)
        except signature.InvalidSignature as error:
            return Answer(Outcome.REJECTED, error.reason)

    try:
        async with app.committing(settings, mapping) as committer:
            async for group in groups:
                await asyncio.gather(*(told(name, delivery) for name, delivery in group))
    except SchemaMismatch as error:
        fail(*error.faults)
    click.echo(
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none"
    )
    return 1 if counts.keys() & {"rejected", "unavailable", "error"} else 0


@cli.group(epilog="\b\nExample:\n  clerk-sync quarantine list")
def quarantine() -> None:
    """Events that could not be applied: list, replay, drop."""


def _engine_work(work: Callable[[AsyncEngine], Coroutine[Any, Any, int]]) -> NoReturn:
    settings, _ = settled(signing=False, mapped=False)

    async def around() -> int:
        engine = engine_of(settings.locate, size=1)
        try:
            if faults := [*own_faults(await live_tables(engine))]:
                fail(*(f"{settings.locate().where}: {fault}" for fault in faults))
            return await work(engine)
        finally:
            await engine.dispose()

    run(around())


@quarantine.command("list", epilog="\b\nExample:\n  clerk-sync quarantine list --json")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with payloads.")
def quarantine_list(*, as_json: bool) -> None:
    """Show what is in quarantine, oldest first, and why."""

    async def work(engine: AsyncEngine) -> int:
        kept = await dead_letters.listed(engine, payloads=as_json)
        for one in kept:
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(one), default=str, ensure_ascii=False))
            else:
                at = one.quarantined_at.isoformat(sep=" ", timespec="seconds")
                again = f"  next try {one.retry_at:%H:%M:%S} UTC" if one.retry_at else ""
                click.echo(
                    f"{at}  {one.reason:<14} {one.detail or '-':<20} "
                    f"{one.type:<30} {one.clerk_id or '-'}  {one.svix_id}{again}"
                )
        if not kept and not as_json:
            click.echo("the quarantine is empty")
        return 0

    _engine_work(work)


@quarantine.command("replay", epilog="\b\nExample:\n  clerk-sync quarantine replay --all")
@click.argument("svix_ids", nargs=-1, metavar="[SVIX_ID]…", type=text)
@click.option("--all", "everything", is_flag=True, help="All that is in quarantine.")
def quarantine_replay(svix_ids: tuple[str, ...], *, everything: bool) -> None:
    """Apply events again, after the column or the mapping was mended.

    What succeeds leaves the quarantine. Exit code 1 if anything stays in it.
    """
    if bool(svix_ids) == everything:
        fail("name the events (clerk-sync quarantine list), or give --all")
    settings, mapping = settled(signing=False, mapped=True)
    assert mapping is not None

    async def work() -> int:
        engine = engine_of(settings.locate, size=1)
        try:
            kept = await dead_letters.listed(engine, svix_ids, payloads=False)
            missing = set(svix_ids) - {one.svix_id for one in kept}
            for svix_id in sorted(missing):
                click.echo(f"{svix_id}: is not in quarantine")
            ids = [one.svix_id for one in kept]
            failed = await _applied(settings, mapping, _kept(engine, ids), kept=True)
            left = ids and await dead_letters.listed(engine, ids, payloads=False)
            return 1 if failed or missing or left else 0
        finally:
            await engine.dispose()

    run(work())


async def _kept(engine: AsyncEngine, ids: Sequence[str]) -> AsyncIterator[Group]:
    """The deliveries in quarantine; those whose payload was never kept stay as they are."""
    for start in range(0, len(ids), AT_ONCE):
        some = await dead_letters.listed(engine, ids[start : start + AT_ONCE])
        yield [
            (
                one.svix_id,
                one.delivery or Answer(Outcome.QUARANTINED, Reason(one.reason)),
            )
            for one in some
        ]


@quarantine.command("drop", epilog="\b\nExample:\n  clerk-sync quarantine drop msg_2x…")
@click.argument("svix_ids", nargs=-1, required=True, metavar="SVIX_ID…", type=text)
def quarantine_drop(svix_ids: tuple[str, ...]) -> None:
    """Forget events in quarantine for good. Exit code 1 if one was not there."""

    async def work(engine: AsyncEngine) -> int:
        gone = await dead_letters.drop(engine, svix_ids)
        click.echo(f"dropped {gone} of {len(set(svix_ids))}")
        return 0 if gone == len(set(svix_ids)) else 1

    _engine_work(work)
