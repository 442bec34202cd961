"""`clerk-sync trigger`."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import click

from clerk_sync.clerk import samples, signature
from clerk_sync.cli.common import command, load_settings, text
from clerk_sync.cli.exits import fail
from clerk_sync.cli.target import here, signers_of
from clerk_sync.clock import now_ms

_ANSWER_SECONDS: Final = 15


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
async def trigger(type_: str, url: str | None, clerk_id: str | None, file: Path | None) -> int:
    """Post a signed, realistic event of this TYPE, such as user.created.

    The event belongs to the instance in CLERK_INSTANCE_ID. Exit code 0 if it was answered 2xx and
    not quarantined.
    """
    settings = load_settings(signing=True)
    instance = {"instance_id": settings.instance_id} if settings.instance_id else {}
    try:
        event = samples.event(type_, clerk_id=clerk_id, now_ms=now_ms(), **instance)
        if file is not None:
            event = _event_from(file, event, clerk_id)
    except ValueError as error:
        fail(str(error))
    body = json.dumps(event)
    svix_id = f"msg_{secrets.token_urlsafe(20)}"
    headers = signature.signed(
        body, svix_id=svix_id, sent_at=datetime.now(UTC), signers=signers_of(settings)[:1]
    )
    target = url or here(settings)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)) as session,
            session.post(target, data=body, headers=headers) as response,
        ):
            answer = await response.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        fail(f"{target}: {type(error).__name__}: is the service running there?")
    data = event.get("data")
    named = data.get("id") if isinstance(data, dict) else None
    click.echo(f"{event.get('type')} {named or ''} as {svix_id}: {response.status} {answer}")
    if '"quarantined"' in answer:
        click.echo("`clerk-sync quarantine list` says why", err=True)
        return 1
    return 0 if response.ok else 1


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
