"""`clerk-sync probe`: whether what Clerk sends to the public URL gets through.

A signed event takes the whole way to a commit in the database, and changes no mapped table. What
is in its way is said in one sentence: whoever reads it may not see the ingress's log.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import aiohttp
import click
import yarl
from pydantic_core import from_json

from clerk_sync.clerk import signature
from clerk_sync.clerk.catalog import PROBE, PROBE_IDS
from clerk_sync.cli.common import command, load_settings, text
from clerk_sync.cli.exits import fail
from clerk_sync.cli.target import here, signers_of
from clerk_sync.outcomes import Outcome, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from standardwebhooks import Webhook

# Svix waits 15 seconds, and clerk-sync answers well inside that.
_ATTEMPT_SECONDS: Final = 10.0
_FIRST_PAUSE_SECONDS: Final = 1.0
_READ_LIMIT: Final = 65536

# What clerk-sync itself says is in the way.
_OURS: Final = {
    Reason.WRONG: "clerk-sync has another signing secret than this probe: compare "
    "CLERK_WEBHOOK_SIGNING_SECRET on both sides, and with the endpoint's in Clerk's dashboard",
    Reason.EXPIRED: "the clock of clerk-sync's machine and of this one differ by over 5 minutes",
    Reason.MISSING: "something on the way drops the svix-… headers",
    Reason.MALFORMED: "something on the way alters the svix-… headers or the body",
    Reason.METHOD: "the POST arrives as something else: a proxy on the way turns it into a GET",
    Reason.PATH: "clerk-sync is there, but expects webhooks at another path: "
    "CLERK_SYNC_WEBHOOK_PATH says which",
    Reason.QUEUE_FULL: "events arrive faster than clerk-sync's database commits them: "
    "its queue is full",
    Reason.DATABASE: "clerk-sync's database is down, or accepts no writes: "
    "run `clerk-sync check` where it runs",
    Reason.SCHEMA: "clerk-sync's tables are not what it needs: run `clerk-sync migrate`",
    Reason.DEADLINE: "clerk-sync's database does not commit in time: a lock, or a slow disk",
    Reason.DRAINING: "clerk-sync is shutting down, and no other process answers",
    Reason.INTERNAL: "clerk-sync has a defect: its log has the traceback",
}
# What something else is likely to mean that answers in its place.
_THEIRS: Final = {
    HTTPStatus.UNAUTHORIZED: "something in front of clerk-sync requires a login: "
    "it must let this path through",
    HTTPStatus.FORBIDDEN: "something in front of clerk-sync forbids it: a firewall, "
    "or a list of addresses that this machine is not on",
    HTTPStatus.NOT_FOUND: "clerk-sync is not at this URL: compare host and path with the "
    "ingress or route",
    HTTPStatus.METHOD_NOT_ALLOWED: "the server there accepts no POST, so it is not clerk-sync: "
    "compare host and path with the ingress or route",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "something in front of clerk-sync limits the size "
    "of bodies: Clerk's are up to 1 MiB",
    HTTPStatus.TOO_MANY_REQUESTS: "something in front of clerk-sync limits the rate",
    HTTPStatus.BAD_GATEWAY: "the proxy in front answers, but cannot reach clerk-sync",
    HTTPStatus.SERVICE_UNAVAILABLE: "the proxy in front answers, but has no ready clerk-sync "
    "behind it",
    HTTPStatus.GATEWAY_TIMEOUT: "the proxy in front answers, but gets no answer from clerk-sync",
}


@command("clerk-sync probe --url https://hooks.example.com/webhooks/clerk")
@click.option(
    "--url", type=text, help="The webhook's public URL. Default: the service on this machine."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=30,
    show_default=True,
    help="How long to retry, if retrying may help.",
)
async def probe(url: str | None, seconds: float) -> int:
    """Send a signed event through the public URL; say whether it was committed.

    It changes no mapped table, and needs only the URL and the signing secret. Exit code 1 if
    Clerk's events would not get through; the output says why.
    """
    settings = load_settings(signing=True, located=False)
    try:
        target = address(url or here(settings))
    except ValueError as error:
        fail(f"--url: {error}")
    found = await send(target, signers_of(settings), seconds=seconds)
    if not found.through:
        fail(f"{shown(target)}: {found.text}")
    click.echo(f"{shown(target)}: {found.text}")
    return 0


@dataclass(frozen=True, slots=True)
class Found:
    """What one probe found: whether it got through, and a sentence that says so or why not.

    `lasting` says that a retry would find the same.
    """

    through: bool
    text: str
    lasting: bool = True


def address(url: str) -> yarl.URL:
    """The URL to post to. Raises ValueError, without quoting what may have a password in it."""
    try:
        where = yarl.URL(url)
    except ValueError:
        where = yarl.URL()
    if where.scheme not in ("http", "https") or not where.host:
        raise ValueError("is not a URL of the form https://HOST/webhooks/clerk")
    return where


def shown(url: yarl.URL) -> str:
    """The URL without what may be secret in it."""
    if url.raw_authority:
        url = url.with_user(None)
    return str(url.with_query(None).with_fragment(None))


async def send(url: yarl.URL, signers: Sequence[Webhook], *, seconds: float) -> Found:
    """Post one signed event to the webhook's URL; retry for so many seconds while that may help.

    Each attempt has the same svix-id: one whose answer got lost is then known as a duplicate.
    """
    svix_id = f"{PROBE_IDS}{secrets.token_urlsafe(20)}"
    ends = time.monotonic() + seconds
    pause = _FIRST_PAUSE_SECONDS
    # With the proxies of the environment: from inside a company there may be no other way out.
    async with aiohttp.ClientSession(trust_env=True) as session:
        while True:
            limit = min(_ATTEMPT_SECONDS, ends - time.monotonic())
            found = await _tried(session, url, svix_id, signers, limit)
            if found.through or found.lasting or time.monotonic() + pause >= ends:
                return found
            await asyncio.sleep(pause)
            pause *= 2


async def _tried(
    session: aiohttp.ClientSession,
    url: yarl.URL,
    svix_id: str,
    signers: Sequence[Webhook],
    seconds: float,
) -> Found:
    """One attempt."""
    now = datetime.now(UTC)
    event = {"type": PROBE, "object": "event", "timestamp": int(now.timestamp() * 1000), "data": {}}
    body = json.dumps(event)
    began = time.monotonic()
    try:
        async with session.post(
            url,
            data=body,
            headers=signature.signed(body, svix_id=svix_id, sent_at=now, signers=signers),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=seconds),
        ) as response:
            answer = await response.content.read(_READ_LIMIT)
    except TimeoutError:
        text = f"no answer within {seconds:.0f} s: the server hangs, or packets are dropped"
        return Found(through=False, text=text, lasting=False)
    except (aiohttp.ClientError, OSError) as error:
        return _unconnected(url, error)
    return _read(response, answer, round((time.monotonic() - began) * 1000))


def _unconnected(url: yarl.URL, error: Exception) -> Found:
    """What it means that there was no answer."""
    lasting = False
    match error:
        case aiohttp.ClientConnectorDNSError():
            text = f"the name {url.host} is not found"
        case aiohttp.ClientConnectorCertificateError():
            why = getattr(error.certificate_error, "verify_message", "")
            text = f"the certificate is not accepted: {why or 'it is not valid'}"
            lasting = True
        case aiohttp.ClientConnectorSSLError():
            text = f"port {url.port} does not speak TLS, or no version that this client supports"
            lasting = True
        case aiohttp.ClientConnectorError():
            # What asyncio makes of it repeats the address, and not what happened.
            number = error.os_error.errno
            why = os.strerror(number) if number else error.os_error.strerror or "no connection"
            text = f"cannot connect to port {url.port} of {url.host}: {why}"
        case _:
            text = f"the connection ended without an answer ({type(error).__name__})"
            if url.scheme == "http":
                text += ": is it https?"
    return Found(through=False, text=text, lasting=lasting)


def _read(response: aiohttp.ClientResponse, body: bytes, ms: int) -> Found:
    """What an answer means."""
    status = response.status
    lasting = status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.TOO_MANY_REQUESTS
    outcome, reason = _ours(body)
    if outcome in (Outcome.IGNORED, Outcome.DUPLICATE) and status == HTTPStatus.OK:
        return Found(through=True, text=f"verified and committed in {ms} ms")
    said = str(status)
    if outcome is not None:
        said += f" {outcome.value}" + (f" {reason.value}" if reason else "")
        text = (reason and _OURS.get(reason)) or "clerk-sync did not recognize the probe"
    elif status in _THEIRS:
        text = _THEIRS[HTTPStatus(status)]
    elif HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        text = _redirected(response)
    else:
        text = f"something other than clerk-sync answers, with {_printable(response.content_type)}"
        if response.content_type == "text/html":
            text += ": if it is a login, it must let this path through; otherwise"
        else:
            text += ":"
        text += " compare host and path with the ingress or route"
    return Found(through=False, text=f"{text} ({said})", lasting=lasting)


def _redirected(response: aiohttp.ClientResponse) -> str:
    """A redirect: to the URL that is meant, or away from it, as to a login."""
    given = response.headers.get("Location", "")
    leads = f"redirects to {_location(given)}, where Clerk does not follow"
    try:
        path = yarl.URL(given).path
    except ValueError:
        path = ""
    if path.strip("/") == response.url.path.strip("/"):
        return f"{leads}: give Clerk that URL instead"
    return (
        f"{leads}: if it is a login, it must let this path through; otherwise give Clerk that URL"
    )


def _location(given: str) -> str:
    """Where a redirect leads. Whoever answers wrote it, and logs and terminals get to see it."""
    try:
        return _printable(shown(yarl.URL(given))) if given else "nowhere"
    except ValueError:
        return "what is no URL"


def _printable(text: str) -> str:
    """The beginning of a stranger's text, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _ours(body: bytes) -> tuple[Outcome | None, Reason | None]:
    """Outcome and reason, if clerk-sync wrote this."""
    try:
        answer = from_json(body)
        reason = answer.get("reason")
        return Outcome(answer["outcome"]), None if reason is None else Reason(reason)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None, None
