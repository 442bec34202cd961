"""The probe: through the public URL to a commit; and what it says of whatever is in the way."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import pytest
from aiohttp import web

from clerk_sync.clerk import signature
from clerk_sync.clerk.catalog import PROBE
from clerk_sync.cli.probe import Found, address, send, shown
from clerk_sync.database.connection import engine_of
from clerk_sync.http.responses import response_to
from clerk_sync.mapping import loader
from clerk_sync.outcomes import QUARANTINES, REJECTIONS, UNAVAILABILITIES, Answer, Outcome, Reason
from clerk_sync.store import retention
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, SECRET, rows
from tools import servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


SIGNERS: Final = signature.signers(SECRET)
HTML: Final = "<!doctype html><title>Welcome to nginx!</title>"


async def probed(url: str, *, seconds: float = 5, secrets: str = SECRET) -> Found:
    return await send(address(url), signature.signers(secrets), seconds=seconds)


@asynccontextmanager
async def answering(
    answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Run what answers in clerk-sync's place, as an ingress does; its URL."""
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield f"http{'s' * (tls is not None)}://127.0.0.1:{runner.addresses[0][1]}{PATH}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def saying(head: bytes) -> AsyncIterator[str]:
    """Run what answers with these bytes, whatever they are; its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{PATH}"


async def met(
    status: int, body: str | bytes = HTML, *, type_: str = "text/html", **headers: str
) -> Found:
    """Probe a server that always answers so."""

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        data = body.encode() if isinstance(body, str) else body
        return web.Response(status=status, body=data, headers={"Content-Type": type_, **headers})

    async with answering(answer) as url:
        return await probed(url, seconds=1)  # so, no second attempt


# --- Through -----------------------------------------------------------------------------------


async def test_it_is_committed_and_changes_nothing_else(database_url: str) -> None:
    async with deliveries.served(database_url, CLERK_INSTANCE_ID="ins_1") as at:
        before = await at.metrics()
        found = await probed(at.url + PATH)
        assert found.through
        assert found.text.startswith("verified and committed in ")
        after = await at.metrics()
    assert after.grown_since(before) == {
        "received": 1,
        f"outcomes{{outcome=ignored,type={PROBE}}}": 1,
    }
    assert after("last_success_timestamp_seconds") == 0
    assert after("event_age_seconds_count") == 0
    assert after("request_seconds_count") == after("apply_seconds_count") == 1
    ((svix_id, *row),) = await rows(
        database_url, "SELECT svix_id, type, kind, clerk_id, outcome FROM clerk_sync_events"
    )
    assert svix_id.startswith("probe_")
    assert row == [PROBE, None, None, "ignored"]
    for table in ("clerk_users", "clerk_sync_entities", "clerk_sync_quarantine"):
        assert await rows(database_url, f"SELECT * FROM {table}") == []


async def test_any_of_the_secrets_of_a_rotation_will_do(tmp_path: Path) -> None:
    async with deliveries.served(f"sqlite:///{tmp_path}/x.db") as at:
        assert (await probed(at.url + PATH, secrets=f"{OTHER_SECRET} {SECRET}")).through
        assert not (await probed(at.url + PATH, secrets=OTHER_SECRET)).through


async def test_only_an_hour_of_probes_is_kept(database_url: str) -> None:
    await deliveries.migrate(database_url)
    now = datetime.now(UTC).replace(tzinfo=None)
    kept = {"msg_old": "user.created", "msg_odd": PROBE, "probe_new": PROBE, "probe_x": "user.x"}
    gone = {"probe_old": PROBE, "probe_~": PROBE}
    for svix_id, type_ in (kept | gone).items():
        at = now - timedelta(minutes=1 if svix_id == "probe_new" else 61)
        await rows(
            database_url,
            "INSERT INTO clerk_sync_events (svix_id, type, outcome, committed_at)"
            f" VALUES ('{svix_id}', '{type_}', 'ignored', '{at:%Y-%m-%d %H:%M:%S.%f}')",
        )
    engine = engine_of(deliveries.settings_of(database_url).locate, size=1)
    try:
        assert await retention.expire(engine, ledger_days=100, quarantine_days=30) == len(gone)
    finally:
        await engine.dispose()
    assert (await deliveries.ledger(database_url)).keys() == kept.keys()


def test_no_mapping_can_name_it() -> None:
    kind, _, _ = PROBE.partition(".")
    with pytest.raises(loader.InvalidMapping, match=f"has no `{kind}`"):
        loader.read(f"tables: {{{kind}: {{table: t, key: k, columns: {{}}}}}}", source="m")


# --- What clerk-sync itself has against it -----------------------------------------------------


async def test_another_secret_another_path_no_tables(tmp_path: Path) -> None:
    settings = deliveries.settings_of(f"sqlite:///{tmp_path}/x.db")
    async with deliveries.serving(settings) as at:
        wrong = await probed(at.url + PATH, secrets=OTHER_SECRET)
        assert not wrong.through
        assert wrong.text.startswith("clerk-sync has another signing secret than this probe: ")
        assert wrong.text.endswith(" (401 rejected wrong)")
        path = await probed(f"{at.url}/webhook")
        assert path.text.endswith("CLERK_SYNC_WEBHOOK_PATH says which (404 rejected path)")
        schema = await probed(at.url + PATH, seconds=1)
        assert schema.text.endswith("run `clerk-sync migrate` (503 unavailable schema)")


async def test_a_database_that_takes_no_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with deliveries.served(f"sqlite:///{path}", CLERK_SYNC_DEADLINE_SECONDS=0.3) as at:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        locked = await probed(at.url + PATH, seconds=1)
        assert not locked.through
        # By whichever of the two limits comes first: they are the same.
        assert re.search(r"database .*\(503 unavailable (database|deadline)\)$", locked.text)
        holder.execute("ROLLBACK")
        holder.close()
        assert (await probed(at.url + PATH)).through


@pytest.mark.parametrize(
    "answer",
    [
        *(Answer(Outcome.REJECTED, reason) for reason in REJECTIONS),
        *(Answer(Outcome.UNAVAILABLE, reason) for reason in UNAVAILABILITIES),
        Answer(Outcome.ERROR, Reason.INTERNAL),
        Answer(Outcome.QUARANTINED, QUARANTINES[0]),
        Answer(Outcome.STALE),
    ],
    ids=str,
)
async def test_every_other_answer_of_clerk_sync_is_told(answer: Answer) -> None:
    response = response_to(answer)
    found = await met(response.status, response.body, type_="application/json")
    assert not found.through
    assert found.lasting == (response.status < 500)
    assert "clerk-sync" in found.text or "svix-" in found.text or "POST" in found.text
    said = f"{response.status} {answer.outcome}" + (f" {answer.reason}" if answer.reason else "")
    assert found.text.endswith(f" ({said})")
    # What a probe can meet has a sentence of its own.
    odd = answer.reason in (Reason.INSTANCE, Reason.TOO_LARGE) or response.status == 200
    assert odd == found.text.startswith("clerk-sync did not recognize the probe")


# --- What is in front of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (200, "something other than clerk-sync answers, with text/html: if it is a login, it must"),
        (204, "something other than clerk-sync answers, with text/html: "),
        (401, "something in front of clerk-sync requires a login: it must let this path through"),
        (403, "something in front of clerk-sync forbids it: a firewall, or a list of addresses"),
        (404, "clerk-sync is not at this URL: compare host and path with the ingress"),
        (405, "the server there accepts no POST, so it is not clerk-sync"),
        (413, "something in front of clerk-sync limits the size of bodies"),
        (418, "something other than clerk-sync answers, with text/html: "),
        (429, "something in front of clerk-sync limits the rate (429)"),
        (500, "something other than clerk-sync answers, with text/html: "),
        (502, "the proxy in front answers, but cannot reach clerk-sync (502)"),
        (503, "the proxy in front answers, but has no ready clerk-sync behind it (503)"),
        (504, "the proxy in front answers, but gets no answer from clerk-sync (504)"),
    ],
)
async def test_whatever_else_answers_is_told(status: int, told: str) -> None:
    found = await met(status)
    assert not found.through
    assert found.text.startswith(told)
    assert found.text.endswith(f"({status})")
    assert found.lasting == (status < 500 and status != 429)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"ignored"', b'{"outcome": "fine"}', b"\xff", b"{}", b"1"]
)
async def test_only_the_words_of_clerk_sync_are_taken_for_its_answer(body: bytes) -> None:
    found = await met(200, body, type_="application/json")
    assert (found.through, found.lasting) == (False, True)
    assert found.text == (
        "something other than clerk-sync answers, with application/json: compare host and path "
        "with the ingress or route (200)"
    )


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_told_and_not_followed(status: int) -> None:
    asked = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        to = "https://hooks.example.com/webhooks/clerk?token=hunter2"
        return web.Response(status=status, headers={"Location": to})

    async with answering(answer) as url:
        found = await probed(url)
    assert asked == [PATH]
    assert found == Found(
        through=False,
        text="redirects to https://hooks.example.com/webhooks/clerk, where Clerk does not follow:"
        f" give Clerk that URL instead ({status})",
    )


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (b"/login", "/login"),
        (b"https://ada:hunter2@sso.example.com/x#hunter2", "https://sso.example.com/x"),
        (b"https://sso.example.com/\x1b[2J\x1b]0;hunter\x07", "https://sso.example.com/%1B"),
        (b"https://[", "what is no URL"),
        (b"https://sso.example.com/" + b"x" * 7000, "https://sso.example.com/xxx"),
    ],
    ids=["path", "token", "terminal", "broken", "long"],
)
async def test_where_a_redirect_leads_is_told_without_tokens_and_escapes(
    location: bytes, told: str
) -> None:
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location
    async with saying(head + b"\r\n\r\n") as url:
        text = (await probed(url)).text
    assert text.startswith(f"redirects to {told}")
    assert "hunter2" not in text
    assert text.isprintable()
    assert len(text) < 400


async def test_a_type_that_a_terminal_would_obey_is_told_without_that() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Type: text/\x1b[2Jx\r\n\r\n"
    async with saying(head) as url:
        assert (await probed(url)).text == (
            "something other than clerk-sync answers, with text/?[2jx: compare host and path with "
            "the ingress or route (200)"
        )


@pytest.mark.parametrize(
    "to", ["https://login.example.com/", "/signin", "https://sso.example.com/x"]
)
async def test_a_redirect_to_elsewhere_may_be_a_login(to: str) -> None:
    found = await met(302, Location=f"{to}?token=hunter2")
    assert found.text == (
        f"redirects to {to}, where Clerk does not follow: if it is a login, it must let this "
        "path through; otherwise give Clerk that URL (302)"
    )


async def test_no_name_no_port_no_answer() -> None:
    unknown = await probed("https://nowhere.invalid/webhooks/clerk", seconds=1)
    assert unknown.text == "the name nowhere.invalid is not found"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        refused = await probed(f"http://127.0.0.1:{port}/", seconds=1)
        assert refused.text == f"cannot connect to port {port} of 127.0.0.1: Connection refused"

        bound.listen()  # and never accept: the kernel does, nobody answers
        began = time.monotonic()
        hanging = await probed(f"http://127.0.0.1:{port}/", seconds=1)
        assert hanging.text.startswith("no answer within 1 s: ")
        assert time.monotonic() - began < 2

    async def leave(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with answering(leave) as url:
        gone = await probed(url, seconds=1)
    assert gone.text.startswith("the connection ended without an answer (")
    assert not any(one.through or one.lasting for one in (unknown, refused, hanging, gone))


async def test_tls_that_nobody_would_trust_is_told(tmp_path: Path) -> None:
    servers.write_certificates(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")

    async def never(request: web.BaseRequest) -> web.Response:
        raise AssertionError

    async with answering(never, tls) as url:
        untrusted = await probed(url)
        assert untrusted.text == (
            "the certificate is not accepted: unable to get local issuer certificate"
        )
    async with answering(never) as url:
        port = address(url).port
        plain = await probed(url.replace("http:", "https:"))
        assert (
            plain.text == f"port {port} does not speak TLS, or no version that this client supports"
        )
    assert untrusted.lasting
    assert plain.lasting


# --- Again -------------------------------------------------------------------------------------


async def test_it_tries_again_as_the_same_delivery_and_takes_duplicate_for_committed() -> None:
    seen = []

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        now = time.time()
        seen.append(signature.verify(headers, body, signers=SIGNERS, now=now).id)
        if len(seen) == 1:
            assert request.transport is not None
            request.transport.abort()  # committed, and the answer is lost
        known = response_to(Answer(Outcome.DUPLICATE))
        return web.Response(status=known.status, body=known.body, headers=known.headers)

    async with answering(answer) as url:
        found = await probed(url)
    assert found.through
    assert len(seen) == 2
    assert len(set(seen)) == 1


async def test_what_lasts_is_not_tried_again_and_what_may_pass_until_the_time_is_up() -> None:
    async def tried(status: int, seconds: float) -> int:
        asked = []

        async def answer(request: web.BaseRequest) -> web.Response:
            asked.append(request)
            return web.Response(status=status)

        async with answering(answer) as url:
            assert not (await probed(url, seconds=seconds)).through
        return len(asked)

    for status, seconds, times in ((404, 9, 1), (503, 1.5, 2), (503, 4, 3)):
        began = time.monotonic()
        assert await tried(status, seconds) == times
        assert time.monotonic() - began < min(seconds, 4) + 0.5


# --- The command -------------------------------------------------------------------------------


async def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "clerk_sync", "probe", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


async def test_the_command_needs_a_secret_and_a_url_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    async with deliveries.served(f"sqlite:///{tmp_path}/x.db") as at:
        url = f"{at.url}{PATH}"
        hidden = url.replace("://", "://me:hunter2@") + "?token=hunter2#x"
        by_file = {"CLERK_WEBHOOK_SIGNING_SECRET_FILE": str(tmp_path / "secret")}
        # Nothing else is even looked at.
        fine = await command("--url", hidden, **by_file, DATABASE_URL="postgres://nowhere")
        assert (fine.returncode, fine.stderr) == (0, "")
        assert fine.stdout.startswith(f"{url}: verified and committed in ")
        assert fine.stdout.count("\n") == 1
        here = {"CLERK_SYNC_PORT": str(address(url).port), **by_file}
        assert (await command(**here)).returncode == 0

        wrong = await command("--url", hidden, CLERK_WEBHOOK_SIGNING_SECRET=OTHER_SECRET)
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert wrong.stderr.startswith(f"clerk-sync: {url}: clerk-sync has another signing secret")
        assert wrong.stderr.count("\n") == 1
        for secret in (SECRET, OTHER_SECRET, "hunter2"):
            assert secret not in fine.stdout + wrong.stderr


async def test_the_command_ends_in_its_time() -> None:
    began = time.monotonic()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        late = await command("--url", url, "--seconds", "1", CLERK_WEBHOOK_SIGNING_SECRET=SECRET)
    assert late.returncode == 1
    assert "cannot connect to port" in late.stderr
    assert time.monotonic() - began < 20  # not the 30 of the default; a start takes a while


@pytest.mark.parametrize(
    "url", ["hooks.example.com/hunter2", "ftp://hunter2@x/", "https://", "http://[::1/hunter2", ""]
)
async def test_what_is_no_url_is_told_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^is not a URL of the form https://HOST/webhooks/clerk$"):
        address(url)
    if url.startswith("ftp"):
        done = await command("--url", url, CLERK_WEBHOOK_SIGNING_SECRET=SECRET)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("clerk-sync: --url: is not a URL of the form ")
        assert "hunter2" not in done.stderr


def test_what_is_shown_of_a_url_has_no_secret() -> None:
    url = address("https://me:hunter2@hooks.example.com:8443/webhooks/clerk?x=hunter2#hunter2")
    assert shown(url) == "https://hooks.example.com:8443/webhooks/clerk"
