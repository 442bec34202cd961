"""The internal listener: who may read people's data, and how many at once; and odd requests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import aiohttp
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.cli import cli
from clerk_sync.database.connection import close_idle, engine_of
from clerk_sync.database.session import open_mysql
from clerk_sync.database.url import target_of
from clerk_sync.http import internal
from clerk_sync.http.access import InvalidToken, refusal, tokens
from clerk_sync.settings import InvalidSettings, Secret
from tests import clerk_api, deliveries
from tests.deliveries import SECRET, At, event, served
from tests.system.test_hostile import Target, fuzzing
from tests.system.test_rotation import Mounted
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from tests.deliveries import Reply
    from tools.servers import Managed

TOKEN: Final = "6a09e667f3bcc908b2fb1366ea957d3e"
OTHER: Final = "bb67ae8584caa73b25742d7078b83b89"
KEY: Final = "sk_live_bm90IHRvIGJlIHNlZW4gaW4gYW55IGFuc3dlcg"
FOR_THE_APP: Final = (
    ("GET", "/profiles"),
    ("GET", "/profiles?username=ada"),
    ("POST", "/ensure/u"),
)
FOR_ALL: Final = ("/livez", "/readyz", "/metrics")
HERE: Final = ("127.0.0.1", 40000)
THERE: Final = ("10.1.2.3", 40000)


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# --- Who is let in, by values ------------------------------------------------------------------


def refused(
    *headers: tuple[str, str], peer: Any = THERE, own: Any = THERE, known: str = f"{TOKEN} {OTHER}"
) -> str | None:
    given = CIMultiDictProxy(CIMultiDict(headers))
    return refusal(given, peer=peer, own=own, known=tokens(known) if known else ())


@pytest.mark.parametrize("token", [TOKEN, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
def test_each_token_opens_from_anywhere(scheme: str, token: str) -> None:
    assert refused(("authorization", f"{scheme}{token}")) is None
    assert refused(("Authorization", f"{scheme}{token} "), peer=None, own=None) is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        TOKEN,
        f"Bearer{TOKEN}",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}0",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {TOKEN} {OTHER}",
        f"Bearer {TOKEN},{OTHER}",
        f"Bearer {TOKEN}\u00e9",
        f"Bearer {TOKEN}\udce9",
        f"Bearer \x00{TOKEN}",
        "Bearer \u00e9\u20ac\U0001f511",
    ],
)
def test_nothing_else_does(value: str) -> None:
    assert refused(("Authorization", value))


def test_several_authorizations_are_none() -> None:
    """Which of them counts is a question that proxies answer differently."""
    good, bad = (("Authorization", f"Bearer {token}") for token in (TOKEN, "x" * 32))
    assert refused(good, bad)
    assert refused(bad, good)
    assert refused(good, good)


def test_without_a_token_nothing_opens_from_elsewhere_and_it_is_said_what_to_set() -> None:
    for headers in ((), (("Authorization", "Bearer "),), (("Authorization", "Bearer"),)):
        said = refused(*headers, known="")
        assert said is not None
        assert "set CLERK_SYNC_APP_TOKEN" in said
        assert "`Authorization: Bearer TOKEN`" in said
    said = refused()
    assert said is not None
    assert "send one of the tokens in CLERK_SYNC_APP_TOKEN" in said
    assert TOKEN not in said


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.0.6", "127.255.255.254", "::1", "::ffff:127.0.0.1"]
)
def test_loopback_is_loopback_however_it_is_written(address: str) -> None:
    assert refused(peer=(address, 1, 0, 0), own=(address, 2, 0, 0)) is None
    assert refused(peer=(address, 1), own=(address, 2), known="") is None


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "128.0.0.1", "0.0.0.0", "::", "::2", "::ffff:10.0.0.1", "fe80::1%eth0", "", "x"],
)
def test_nothing_else_is(address: str) -> None:
    assert refused(peer=(address, 1), own=HERE)
    assert refused(peer=HERE, own=(address, 1))


@pytest.mark.parametrize("address", [None, "", "127.0.0.1", (), (None,), b"/run/socket"])
def test_a_connection_that_has_no_address_is_not_beside_us(address: Any) -> None:
    assert refused(peer=address, own=HERE)
    assert refused(peer=HERE, own=address)


@pytest.mark.parametrize(
    "header",
    [
        ("X-Forwarded-For", "127.0.0.1"),
        ("x-forwarded-for", ""),
        ("X-Forwarded-Host", "localhost"),
        ("X-Forwarded-Proto", "http"),
        ("X-Real-IP", "::1"),
        ("Forwarded", "for=127.0.0.1"),
        ("Via", "1.1 proxy"),
        ("Origin", "https://evil.example"),
        ("Origin", "http://localhost:3000"),
        ("Origin", "null"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("Host", "evil.example:8081"),
        ("Host", "127.0.0.1.evil.example:8081"),
        ("Host", "localhost.evil.example"),
        ("Host", "localhost:8081@evil.example"),
        ("Host", "evil-localhost"),
        ("Host", "clerk-sync-internal"),
        ("Host", ""),
    ],
)
def test_one_who_asks_for_somebody_else_is_not_beside_us(header: tuple[str, str]) -> None:
    """A proxy in our pod, or a page in the browser of one who develops here."""
    assert refused(header, peer=HERE, own=HERE)
    assert refused(header)
    assert refused(header, ("Authorization", f"Bearer {TOKEN}"), peer=HERE, own=HERE) is None


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:8081", "localhost.", "127.0.0.1:8081", "[::1]:8081", "0.0.0.0:8081"],
)
def test_an_address_or_localhost_is_no_name_of_somebody_s(host: str) -> None:
    assert refused(("Host", host), peer=HERE, own=HERE) is None
    # Typed into a browser, or a page of our own.
    assert refused(("Host", host), ("Sec-Fetch-Site", "none"), peer=HERE, own=HERE) is None
    assert refused(peer=HERE, own=HERE) is None  # HTTP/1.0


def test_tokens_are_separated_by_spaces_or_commas() -> None:
    assert tokens(f" {TOKEN},\n{OTHER}\t") == (TOKEN.encode(), OTHER.encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "short",
        "x" * 15,
        f"{TOKEN} short",
        "x" * 513,
        "\u00e9" * 32,
        "x" * 31 + "\u200b",
        "x" * 31 + "\x00",
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        tokens(text)
    assert "openssl rand -hex 32" in str(caught.value)
    assert not set(text.split()) & set(str(caught.value).replace(",", " ").split())


# --- Over real connections ---------------------------------------------------------------------


@pytest.fixture
def embedded_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/clerk-sync.db"


def address_of_this_host() -> str:
    """Return an address that is not loopback: whoever connects to it comes from it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))  # nothing is sent
        return str(one.getsockname()[0])


def token_of(text: str) -> Secret:
    return Secret("CLERK_SYNC_APP_TOKEN", value=text)


def everywhere(token: str) -> dict[str, Any]:
    return {"CLERK_SYNC_HOST": "0.0.0.0", "CLERK_SYNC_APP_TOKEN": token_of(token)}


@contextlib.asynccontextmanager
async def elsewhere(at: At, source: str | None = None) -> AsyncIterator[At]:
    """Ask the same service by an address that is not loopback, from there or from `source`."""
    port = urlsplit(at.internal_url).port
    url = f"http://{address_of_this_host()}:{port}"
    connector = aiohttp.TCPConnector(local_addr=(source, 0) if source else None)
    async with aiohttp.ClientSession(connector=connector) as http:
        yield At(at.url, url, http)


async def asked(at: At, headers: Mapping[str, str] | None = None) -> list[Reply]:
    return [
        await at.request(method, at.internal_url + path, headers=headers)
        for method, path in FOR_THE_APP
    ]


async def statuses(at: At, headers: Mapping[str, str] | None = None) -> list[int]:
    return [reply.status for reply in await asked(at, headers)]


async def test_others_need_the_token_and_probes_do_not(embedded_url: str) -> None:
    options: dict[str, Any] = {
        "CLERK_SYNC_HOST": "0.0.0.0",
        "CLERK_SYNC_APP_TOKEN": token_of(f"{TOKEN} {OTHER}"),
    }
    async with served(embedded_url, **options) as at:
        assert await statuses(at) == [200, 200, 501]
        # A mesh's proxy connects to the pod's address, from one of loopback (Istio: 127.0.0.6).
        for source in (None, "127.0.0.6"):
            async with elsewhere(at, source) as there:
                for path in FOR_ALL:
                    assert (await there.inside(path)).status == 200
                for reply in await asked(there):
                    assert reply.status == 403
                    assert "CLERK_SYNC_APP_TOKEN" in reply.json["error"]
                    assert TOKEN not in reply.text
                for name in ("X-Forwarded-For", "Forwarded", "Host", "X-Real-IP"):
                    assert await statuses(there, {name: "127.0.0.1"}) == [403] * 3
                for wrong in (TOKEN[:-1], TOKEN + "0", "\u00e9" * 32, "x" * 7000):
                    assert await statuses(there, bearing(wrong)) == [403] * 3
                for right in (TOKEN, OTHER):
                    assert await statuses(there, bearing(right)) == [200, 200, 501]


async def test_without_a_token_others_are_told_to_set_one(embedded_url: str) -> None:
    async with (
        served(embedded_url, CLERK_SYNC_HOST="0.0.0.0") as at,
        elsewhere(at) as there,
    ):
        for headers in (None, bearing(TOKEN), {"Authorization": "Bearer "}):
            for reply in await asked(there, headers):
                assert reply.status == 403
                assert "set CLERK_SYNC_APP_TOKEN" in reply.json["error"]


async def test_a_page_in_a_browser_here_reads_nothing(embedded_url: str) -> None:
    async with served(embedded_url, CLERK_SYNC_APP_TOKEN=token_of(TOKEN)) as at:
        for headers in (
            {"Host": "rebound.example:8081"},
            {"Origin": "https://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"X-Forwarded-For": "203.0.113.7"},
        ):
            assert await statuses(at, headers) == [403] * 3
            assert await statuses(at, {**headers, **bearing(TOKEN)}) == [200, 200, 501]


@pytest.mark.parametrize(
    "lines",
    [
        [b"Authorization: Bearer " + b"\xff" * 32],
        [b"Authorization: Bearer \xc3\xa9"],
        [b"Authorization: Bearer " + TOKEN.encode(), b"Authorization: Bearer " + TOKEN.encode()],
        [b"Authorization: Bearer " + TOKEN.encode(), b"Authorization: Basic eDp5"],
        [b"Authorization:"],
        [b"Host: \xff"],
        [b"Host: [::1"],
        [b"Host: ["],
        [b"Host: localhost", b"Host: evil.example"],
        [b"Sec-Fetch-Site: \xff"],
    ],
)
async def test_strange_headers_open_and_break_nothing(
    embedded_url: str, lines: list[bytes]
) -> None:
    options: dict[str, Any] = {
        "CLERK_SYNC_HOST": "0.0.0.0",
        "CLERK_SYNC_APP_TOKEN": token_of(TOKEN),
    }
    async with served(embedded_url, **options) as at:
        target = Target(f"http://{address_of_this_host()}:{urlsplit(at.internal_url).port}")
        for method, path in FOR_THE_APP:
            head = [f"{method} {path} HTTP/1.1".encode(), *lines, b"Content-Length: 0"]
            if not lines[0].startswith(b"Host"):
                head.append(b"Host: test")
            status = await asyncio.to_thread(target.status_of, b"\r\n".join(head) + b"\r\n\r\n")
            assert status in {400, 403}


async def test_the_token_is_rotated_without_a_restart_and_never_told(
    tmp_path: Path, embedded_url: str
) -> None:
    await deliveries.migrate(embedded_url)
    mounted = Mounted(tmp_path / "secret", token=TOKEN + "\n")
    environment = {
        "CLERK_SYNC_APP_TOKEN_FILE": mounted["token"],
        "CLERK_SYNC_HOST": "0.0.0.0",
        "LOG_LEVEL": "debug",
    }
    async with (
        deliveries.process(tmp_path, embedded_url, **environment) as (process, at),
        elsewhere(at) as there,
    ):
        await at.until_ready()

        async def seen() -> list[int]:
            return [
                (await there.inside("/profiles", headers=bearing(one))).status
                for one in (TOKEN, OTHER)
            ]

        async def answers(expected: list[int]) -> None:
            await until(seen, lambda found: found == expected, seconds=5)

        assert await seen() == [200, 403]
        mounted.write(token=f"{OTHER},{TOKEN}")
        await answers([200, 200])
        mounted.write(token=OTHER)
        await answers([403, 200])
        # What is no token opens nothing and closes nothing.
        mounted.write(token="short")
        await until(
            at.metrics,
            lambda found: found("secret_stale", secret="app_token") == 1,
        )
        assert await seen() == [403, 200]
        assert (await there.inside("/profiles", headers=bearing("short"))).status == 403
        mounted.write(token=TOKEN)
        await answers([200, 403])
        events = Counter(line["event"] for line in process.lines())
        assert (events["app_token_changed"], events["app_token_invalid"]) == (3, 1)
        assert events["forbidden"] > 0
        for one in (TOKEN, OTHER, "short"):
            assert one not in process.log


async def test_who_is_refused_cannot_fill_the_log(tmp_path: Path, embedded_url: str) -> None:
    await deliveries.migrate(embedded_url)
    environment = {"CLERK_SYNC_HOST": "0.0.0.0"}
    async with (
        deliveries.process(tmp_path, embedded_url, **environment) as (process, at),
        elsewhere(at) as there,
    ):
        for _ in range(10):
            assert await statuses(there, bearing(TOKEN)) == [403] * 3
        told = [line for line in process.lines() if line["event"] == "forbidden"]
        assert len(told) == 10
        assert told[0]["peer"] == address_of_this_host()
        assert "set CLERK_SYNC_APP_TOKEN" in told[0]["error"]


@pytest.mark.parametrize("text", ["short", " , ", f"{TOKEN} short", "\u00e9" * 32])
async def test_what_is_no_token_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLERK_SYNC_APP_TOKEN", text)
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", SECRET)
    for command in ("serve", "check"):
        result = await asyncio.to_thread(CliRunner().invoke, cli, [command])
        assert result.exit_code == 1
        assert "CLERK_SYNC_APP_TOKEN: " in result.output
        assert "openssl rand -hex 32" in result.output
        assert text not in result.output.replace(" , ", "")
    with pytest.raises(InvalidSettings, match="CLERK_SYNC_APP_TOKEN: "):
        async with deliveries.serving(
            deliveries.settings_of("sqlite:///x.db", CLERK_SYNC_APP_TOKEN=token_of(text))
        ):
            pass


def test_check_says_that_a_token_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLERK_SYNC_APP_TOKEN", TOKEN)
    output = CliRunner().invoke(cli, ["check"]).output
    assert "ok   app token is one" in output
    assert TOKEN not in output


# --- How many at once --------------------------------------------------------------------------


async def test_many_readers_take_neither_readiness_nor_events(mysql_server: Managed) -> None:
    """The app holds a lock on its users' table: who reads it waits, and others do not."""
    url = mysql_server.create_database("clerk_sync_readers")
    async with served(url, CLERK_SYNC_WRITERS=1) as at:
        connection = await open_mysql(target_of(url))
        async with connection.cursor() as cursor:
            await cursor.execute("LOCK TABLES clerk_users WRITE")
        verdicts: Counter[int] = Counter()

        async def watched() -> None:
            while True:
                verdicts[(await at.inside("/readyz")).status] += 1
                await asyncio.sleep(0.05)

        watcher = asyncio.create_task(watched())
        replies: list[Reply] = []

        async def reader(number: int) -> None:
            await asyncio.sleep(number / 100)  # they come at any time, not all at the same
            for _ in range(3):
                replies.append(await at.inside("/profiles"))
                await asyncio.sleep(0.5)

        readers = [asyncio.create_task(reader(number)) for number in range(300)]
        for number in range(20):
            made = event("organization.created", f"org_{number}")
            assert (await at.post(made)).outcome == "applied"
            await asyncio.wait(readers, timeout=0.25)
        await asyncio.gather(*readers)
        assert {reply.status for reply in replies} == {503}
        assert all(reply.headers["Retry-After"] == "5" for reply in replies)
        told = Counter(reply.json["error"] for reply in replies)
        assert told.keys() == {
            "the database is not reachable",
            f"{internal.READ_LIMIT} others are read already",
        }
        watcher.cancel()
        assert verdicts.keys() == {200}
        connection.close()

        async def read() -> Reply:
            return await at.inside("/profiles")

        await until(read, lambda reply: reply.status == 200)


async def connections(server: Managed, url: str) -> int:
    name = urlsplit(url).path.strip("/")
    sql = f"SELECT COUNT(*) FROM information_schema.processlist WHERE db = '{name}'"
    return int((await asyncio.to_thread(server.execute, sql))[0][0])


async def test_connections_are_as_many_as_the_docs_say(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_connections")
    async with served(url, CLERK_SYNC_WRITERS=2, CLERK_SYNC_POOL_SIZE=4) as at:
        await asyncio.gather(*(at.post(event("user.created", f"user_{n}")) for n in range(50)))
        await asyncio.gather(*(at.inside("/profiles") for _ in range(60)))
        assert await connections(mysql_server, url) <= 6


async def test_connections_that_nobody_uses_are_closed(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_idle")
    engine = engine_of(lambda: target_of(url), size=3)

    async def there() -> int:
        return await connections(mysql_server, url)

    async with engine.connect() as one, engine.connect() as other:
        for connection in (one, other):
            await connection.execute(sa.text("SELECT 1"))
        assert await there() == 2
        await close_idle(engine)
        assert (await one.execute(sa.text("SELECT 1"))).scalar() == 1
        assert await there() == 2
    await close_idle(engine)
    await until(there, lambda number: number == 0)

    async def used() -> None:
        async with engine.connect() as again:
            assert (await again.execute(sa.text("SELECT 1"))).scalar() == 1

    # What is taken meanwhile is not lost.
    await used()
    await asyncio.gather(close_idle(engine), used())
    await close_idle(engine)
    await until(there, lambda number: number == 0)


# --- /ensure -----------------------------------------------------------------------------------


@pytest.fixture
async def api() -> AsyncIterator[clerk_api.ClerkApi]:
    """Return a Clerk with one user."""
    async with clerk_api.running(key=KEY) as running:
        running.put_user("user_ada", first_name="Ada")
        yield running


def of(api: clerk_api.ClerkApi, share: float) -> dict[str, Any]:
    return {
        "CLERK_SECRET_KEY": Secret("CLERK_SECRET_KEY", value=KEY),
        "CLERK_API_URL": f"{api.url}/v1",
        "CLERK_SYNC_CLERK_SHARE": share,
    }


async def ensure(at: At, user_id: str) -> Reply:
    return await at.request("POST", f"{at.internal_url}/ensure/{user_id}")


async def test_what_nobody_waits_for_keeps_nobody_waiting(
    embedded_url: str, api: clerk_api.ClerkApi
) -> None:
    """More than Clerk may be asked at once, whose callers leave."""
    api.faults.append(clerk_api.hanging(path="/v1/users/user_gone", times=1000))
    async with served(embedded_url, **of(api, 1)) as at:
        calls = [asyncio.create_task(ensure(at, f"user_gone{number}")) for number in range(200)]
        await until(in_flight(api), lambda number: number >= 32)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert (await ensure(at, "user_ada")).status == 200
        # Those that waited for their turn were not asked for at all.
        assert len(api.asked) < 100


def in_flight(api: clerk_api.ClerkApi) -> Any:
    async def look() -> int:
        return len(api.asked)

    return look


async def test_no_more_users_wait_than_clerk_s_limit_lets_through(
    monkeypatch: pytest.MonkeyPatch, embedded_url: str, api: clerk_api.ClerkApi
) -> None:
    monkeypatch.setattr("clerk_sync.clerk.api.RATE_SECONDS", 0.2)
    gate = asyncio.Event()
    for name in "abc":
        api.put_user(f"user_{name}")
        api.before_read(1, gate.wait, path=f"/v1/users/user_{name}")
    async with served(embedded_url, **of(api, 0.003)) as at:
        calls = [asyncio.create_task(ensure(at, f"user_{name}")) for name in "abca"]
        await until(in_flight(api), lambda number: number == 3)
        reply = await ensure(at, "user_ada")
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert reply.json == {"error": "too many users are asked for at once"}
        assert len(api.asked) == 3
        # Who leaves makes room.
        calls[1].cancel()
        await asyncio.wait({calls[1]})

        async def again() -> Reply:
            return await ensure(at, "user_ada")

        await until(again, lambda found: found.status == 200)
        gate.set()
        replies = await asyncio.gather(calls[0], calls[2], calls[3])
        assert [one.status for one in replies] == [200, 200, 200]
        assert len(api.asked_for("/v1/users/user_a")) == 1


async def test_so_many_callers_wait_and_no_more(
    monkeypatch: pytest.MonkeyPatch, embedded_url: str, api: clerk_api.ClerkApi
) -> None:
    monkeypatch.setattr(internal, "ENSURE_LIMIT", 20)
    gate = asyncio.Event()
    api.before_read(1, gate.wait, path="/v1/users/user_ada")
    async with served(embedded_url, **of(api, 1)) as at:
        calls = [asyncio.create_task(ensure(at, "user_ada")) for _ in range(50)]
        done: set[asyncio.Task[Reply]] = set()
        while len(done) < 30:
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert {call.result().status for call in done} == {503}
        gate.set()
        replies = await asyncio.gather(*calls)
        assert Counter(reply.status for reply in replies) == {503: 30, 200: 20}
        assert len(api.asked) == 1
        assert (await ensure(at, "user_ada")).status == 200


# --- Odd requests ------------------------------------------------------------------------------


async def test_a_client_that_ends_its_side_gets_its_answer(embedded_url: str) -> None:
    async with served(embedded_url) as at:
        for path in FOR_ALL:
            async with deliveries.raw(replace(at, url=at.internal_url)) as client:
                client.writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
                client.writer.write_eof()
                reply = await client.reply()
                assert reply is not None
                assert reply.status == 200
                assert await client.rest(seconds=1) == b""


pieces = st.sampled_from(
    [
        *("text/plain", "application/openmetrics-text", "*/*", "text/*", "", " ", ";", ",", "="),
        *(";version=", ";version=a.b", ";version=1.0.0", "; version=1.0.0 ", ";version=0.0.4"),
        *(";version=2.0.0", ";version=1", ";version=1.a", ";version=1..0", ';version="1.0.0"'),
        *(";version=\u00b9.0", ";version=2.\u00e9", ";version=9\udcff", ";version=" + "9" * 5000),
        *(";escaping=", ";escaping=allow-utf-8", ";escaping=values", ";escaping=\u00e9", ";q=x"),
        *(";version=-1.0.0", ";version=1_0.0.0", ";version=9999999.0.0", ";version=1.0.0;version="),
    ]
)
accepts = st.one_of(st.lists(pieces, max_size=6).map("".join), st.text(max_size=40))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(accept=accepts)
def test_metrics_are_told_whatever_is_accepted(accept: str) -> None:
    text, content_type = METRICS.exposed(accept)
    read = openmetrics if "openmetrics" in content_type else plain
    assert content_type.isascii()
    assert content_type.isprintable()
    assert any(family.name == "clerk_sync_received" for family in read(text.decode()))


METRICS: Final = new_metrics()


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Return the internal listener of a process; at its end its log knows no defect."""
    folder = tmp_path_factory.mktemp("fuzzed")
    url = f"sqlite:///{folder}/fuzzed.db"
    asyncio.run(deliveries.migrate(url))
    process = deliveries.Process(folder / "log", {"DATABASE_URL": url})
    try:
        yield Target(asyncio.run(process.listening())[1])
        assert "Traceback" not in process.log
        assert {line["level"] for line in process.lines()} <= {"info", "warning"}
    finally:
        process.close()


headers = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("Accept", "Authorization", "Host", "Origin", "Accept-Encoding", "Cookie"),
                *("Content-Type", "If-None-Match", "Range", "X-Forwarded-For", "Sec-Fetch-Site"),
                "Expect",
            ]
        ),
        st.one_of(accepts, st.text(st.characters(max_codepoint=255), max_size=40)),
    ),
    max_size=3,
)


@fuzzing
@example(given_headers=[("Accept", "text/plain; version=a.b; escaping=")], path="/metrics")
@example(given_headers=[("Expect", "100-conti\udcffue")], path="/metrics")
@given(given_headers=headers, path=st.sampled_from([*FOR_ALL, "/profiles", "/profiles?username=a"]))
def test_no_headers_make_a_500(
    inner: Target, given_headers: list[tuple[str, str]], path: str
) -> None:
    lines = [f"GET {path} HTTP/1.1", "Connection: close"]
    if "Host" not in [name for name, _ in given_headers]:
        lines.append("Host: localhost")
    lines += [f"{name}: {value}" for name, value in given_headers]
    data = "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"
    assert inner.status_of(data) in {200, 400, 403, 417}


@pytest.mark.parametrize(
    "query",
    [
        *(
            "username=%ff",
            "username=%00",
            "username=%ED%A0%80",
            "username=%F0%9F%A6%8A",
            "username",
        ),
        *("username=a&username=b", "username=" + "u" * 5000, "username=%27", "&&&", "username=%zz"),
        *("username=%C0%80", "username=+%20", "username=%25s", "username=:a", "username=%5C"),
    ],
)
async def test_odd_names_are_nobody_s(database_url: str, query: str) -> None:
    async with served(database_url) as at:
        address = urlsplit(at.internal_url)
        target = Target(at.internal_url)
        data = f"GET /profiles?{query} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
        status = await asyncio.to_thread(target.status_of, data)
        assert status == 200
