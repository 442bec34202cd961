"""The client of Clerk's API, over real HTTP against the stand-in."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import aiohttp
import pytest
import stamina
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer

from clerk_sync.clerk.api import (
    API_VERSION,
    LONGEST_PAUSE,
    PAGE_LIMIT,
    Clerk,
    ClerkRateLimited,
    ClerkRefused,
    ClerkUnavailable,
    DeletionUnconfirmed,
    Rate,
    rate_limit,
)
from clerk_sync.clerk.metrics import new_metrics
from tests import clerk_api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from tests.clerk_api import ClerkApi

BORN: Final = 1_700_000_000_000
ATTEMPTS: Final = 8


class Asking:
    """A client, and what it is told: the stand-in, the key, the metrics."""

    def __init__(
        self, api: ClerkApi, session: aiohttp.ClientSession, *, share: float, patience: float
    ) -> None:
        self.api = api
        self.key = api.key
        self.metrics = new_metrics()
        self.clerk = Clerk(
            session,
            f"{api.url}/v1/",
            lambda: self.key,
            share=share,
            metrics=self.metrics,
            patience=patience,
        )

    async def users(self) -> list[str]:
        read = await self.clerk.users(after=None, from_ms=None, to_ms=None)
        return [one["id"] for one in read.json]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"clerk_sync_clerk_{name}", labels) or 0.0

    async def answered(self) -> None:
        """Wait until the first request is answered."""
        async with asyncio.timeout(5):
            while not self.requests:  # noqa: ASYNC110 -- there is nothing to wait for
                await asyncio.sleep(0.001)

    @property
    def requests(self) -> dict[str, float]:
        """How many requests were counted, by status."""
        (family,) = self.metrics.clerk_requests.collect()
        counts = [sample for sample in family.samples if sample.name.endswith("_total")]
        return {count.labels["status"]: count.value for count in counts if count.value}


@asynccontextmanager
async def asking(api: ClerkApi, *, share: float = 1, patience: float = 60) -> AsyncIterator[Asking]:
    async with api.serving(), aiohttp.ClientSession() as session:
        yield Asking(api, session, share=share, patience=patience)


@pytest.fixture
async def ask() -> AsyncIterator[Asking]:
    """Three users, the last of whom is a member of one organization."""
    api = clerk_api.ClerkApi(now_ms=BORN, tick_ms=1)
    for number in (1, 2, 3):
        api.put_user(f"user_{number}", created_at=BORN + number * 10)
    api.put_organization("org_1")
    api.put_membership("orgmem_1", "user_3", "org_1")
    async with asking(api) as ask:
        yield ask


@pytest.fixture
def unhurried() -> Iterator[None]:
    """As many attempts as always, without the waits between them."""
    with stamina.set_testing(True, attempts=1000, cap=True):
        yield


# What is asked


async def test_a_request_has_the_key_and_the_version(ask: Asking) -> None:
    assert await ask.users() == ["user_1", "user_2", "user_3"]
    (asked,) = ask.api.asked
    assert asked.headers.getall("Authorization") == [f"Bearer {clerk_api.KEY}"]
    assert asked.headers.getall("Clerk-API-Version") == [API_VERSION]
    assert clerk_api.KEY not in asked.target


async def test_what_a_query_would_take_for_its_own_is_escaped(ask: Asking) -> None:
    ask.api.lost_cursor = "empty"
    after = "user_+a&limit=1 %2B#ü"
    await ask.clerk.users(after=after, from_ms=None, to_ms=None)
    (asked,) = ask.api.asked
    assert "order_by=%2Bcreated_at" in asked.target
    assert asked.query.getall("order_by") == ["+created_at"]
    assert asked.query.getall("starting_after") == [after]
    assert asked.query.getall("limit") == [str(PAGE_LIMIT)]


@pytest.mark.parametrize(
    "clerk_id", ["..", ".", "...", "%2e%2e", "a/b", "/", "../count", "a?b", "a#b", "ü", "a;b=c"]
)
async def test_an_id_is_one_segment_of_the_path(ask: Asking, clerk_id: str) -> None:
    assert await ask.clerk.one("user", clerk_id) is None
    assert await ask.clerk.one("organization", clerk_id) is None
    assert await ask.clerk.membership("orgmem_1", organization=clerk_id, user="user_3") is None
    for asked, start, end in zip(
        ask.api.asked,
        ("/v1/users/", "/v1/organizations/", "/v1/organizations/"),
        ("", "", "/memberships"),
        strict=True,
    ):
        path = asked.target.partition("?")[0]
        segment = path.removeprefix(start).removesuffix(end)
        assert path == f"{start}{segment}{end}"
        assert "/" not in segment
        assert segment.strip(".")
        assert unquote(segment) == clerk_id


@pytest.mark.parametrize(
    ("from_ms", "to_ms", "ids"),
    [
        (None, None, "123"),
        (BORN + 10, BORN + 30, "12"),
        (BORN + 11, None, "23"),
        (None, BORN + 11, "1"),
        (BORN + 20, BORN + 21, "2"),
        (BORN + 20, BORN + 20, ""),
        (0, 1, ""),
    ],
)
async def test_a_window_has_its_beginning_and_not_its_end(
    ask: Asking, from_ms: int | None, to_ms: int | None, ids: str
) -> None:
    read = await ask.clerk.users(after=None, from_ms=from_ms, to_ms=to_ms)
    assert "".join(one["id"][-1] for one in read.json) == ids
    if from_ms is not None and to_ms is not None:
        assert await ask.clerk.count_users(from_ms, to_ms) == len(ids)


async def test_users_come_after_the_cursor(ask: Asking) -> None:
    read = await ask.clerk.users(after="user_1", from_ms=None, to_ms=None, limit=1)
    assert [one["id"] for one in read.json] == ["user_2"]


async def test_kinds_are_counted(ask: Asking) -> None:
    kinds = ("user", "organization", "organizationMembership")
    assert [await ask.clerk.count(kind) for kind in kinds] == [3, 1, 1]


async def test_lists_tell_their_total_and_organizations_their_members(ask: Asking) -> None:
    for name in "23":
        ask.api.put_organization(f"org_{name}")
    read, total = await ask.clerk.listed("organization", 0)
    assert [(one["id"], one["members_count"]) for one in read.json] == [
        ("org_1", 1),
        ("org_2", 0),
        ("org_3", 0),
    ]
    assert total == 3
    read, total = await ask.clerk.listed("organization", 2)
    assert ([one["id"] for one in read.json], total) == (["org_3"], 3)
    read, total = await ask.clerk.listed("organizationMembership", 0)
    assert ([one["id"] for one in read.json], total) == (["orgmem_1"], 1)
    one = await ask.clerk.one("organization", "org_1")
    assert one is not None
    assert one.json["members_count"] == 1


async def test_a_time_is_from_before_the_request(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.slow(0.2))
    begun_ms = time.time_ns() // 1_000_000
    read = await ask.clerk.one("user", "user_1")
    assert read is not None
    assert begun_ms <= read.began_ms < begun_ms + 150


# What is not there


async def test_what_is_not_there_is_none(ask: Asking) -> None:
    assert await ask.clerk.one("user", "user_gone") is None
    assert await ask.clerk.one("organization", "org_gone") is None
    ends = {"organization": "org_1", "user": "user_3"}
    found = await ask.clerk.membership("orgmem_1", **ends)
    assert found is not None
    assert found.json["id"] == "orgmem_1"
    assert await ask.clerk.membership("orgmem_other", **ends) is None
    for lost in ({"organization": "org_gone"}, {"user": "user_1"}, {"user": "user_gone"}):
        assert await ask.clerk.membership("orgmem_1", **(ends | lost)) is None


def error(**fields: object) -> bytes:
    said = {
        "code": "resource_not_found",
        "message": "not found",
        "long_message": "No user",
        **fields,
    }
    return clerk_api.bytes_of({"errors": [said]})


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>no such page</html>", b"", b"{}", b'{"errors": []}', b'{"errors": [1]}'),
        *(error(code=code) for code in (None, 404, 0, "", "host_invalid", "route_not_found")),
        *(error(code=code) for code in ("RESOURCE_NOT_FOUND", "resource_not_found ", ["x"])),
        error(code="organization_not_found_or_unauthorized"),
        *(error(message=None), error(long_message=None)),
        b'{"errors": [{"code": "resource_not_found"}]}',
        b'{"errors": {"code": "resource_not_found"}}',
        b'[{"code": "resource_not_found"}]',
        clerk_api.bytes_of({"code": "resource_not_found", "message": "not found"}),
        error()[:-2] + b',{"code":"host_invalid","message":"","long_message":""}]}',
    ],
)
async def test_only_clerk_can_say_that_something_is_not_there(ask: Asking, body: bytes) -> None:
    """A proxy's 404, or another address's, would delete everybody."""
    ask.api.faults.append(clerk_api.failing(404, body=body, times=100))
    ends = {"organization": "org_1", "user": "user_3"}
    looks: list[Callable[[], Awaitable[object]]] = [
        lambda: ask.clerk.one("user", "user_1"),
        lambda: ask.clerk.one("organization", "org_1"),
        lambda: ask.clerk.membership("orgmem_1", **ends),
    ]
    for look in looks:
        with pytest.raises(DeletionUnconfirmed):
            await look()


@pytest.mark.parametrize("status", [400, 405, 410, 422, 451])
async def test_another_status_is_no_word_for_it(ask: Asking, status: int) -> None:
    ask.api.faults.append(clerk_api.failing(status, body=error(), times=3))
    with pytest.raises(DeletionUnconfirmed):
        await ask.clerk.one("user", "user_1")
    with pytest.raises(DeletionUnconfirmed):
        await ask.clerk.one("organization", "org_1")
    with pytest.raises(DeletionUnconfirmed):
        await ask.clerk.membership("orgmem_1", organization="org_1", user="user_3")


@pytest.mark.parametrize(
    "body",
    [
        *(b"[]", b"1", b"null", b'{"id": "user_2"}', b'{"status": "maintenance"}'),
        *(error(), b'{"data": {"object": "user", "id": "user_1"}}', b'{"id": "user_1"}'),
        *(b'{"object": "user", "id": "USER_1"}', b'{"object": "User", "id": "user_1"}'),
        b'{"object": "session", "id": "user_1", "deleted": true}',
    ],
)
async def test_one_object_is_the_one_that_was_asked_for(ask: Asking, body: bytes) -> None:
    ask.api.faults.append(clerk_api.failing(200, body=body, path="/v1/users/"))
    with pytest.raises(DeletionUnconfirmed, match="CLERK_API_URL"):
        await ask.clerk.one("user", "user_1")
    body = body.replace(b"user_1", b"org_1").replace(b"USER_1", b"ORG_1")
    body = body.replace(b'"user"', b'"organization"').replace(b'"User"', b'"Organization"')
    ask.api.faults.append(clerk_api.failing(200, body=body, path="/v1/organizations/"))
    with pytest.raises(DeletionUnconfirmed, match="CLERK_API_URL"):
        await ask.clerk.one("organization", "org_1")


async def test_an_organization_of_this_slug_is_another_one(ask: Asking) -> None:
    ask.api.put_organization("org_2", slug="org_gone")
    with pytest.raises(DeletionUnconfirmed):
        await ask.clerk.one("organization", "org_gone")


ANOTHERS: Final = {
    "object": "organization_membership",
    "id": "orgmem_2",
    "organization": {"id": "org_1"},
    "public_user_data": {"user_id": "user_2"},
}
REJOINED: Final = ANOTHERS | {"public_user_data": {"user_id": "user_3"}}


@pytest.mark.parametrize(
    "answer",
    [
        *({"data": []}, {"data": [], "total_count": 1}, {"data": [], "total_count": None}),
        *({"data": {}, "total_count": 0}, {"errors": [], "total_count": 0}, []),
        # Somebody else's: whoever answers did not look at whose were asked for.
        *({"data": [ANOTHERS], "total_count": 1}, {"data": [ANOTHERS], "total_count": 700}),
        {"data": [ANOTHERS, REJOINED], "total_count": 2},
        {"data": [REJOINED | {"organization": None}], "total_count": 1},
        {"data": [REJOINED], "total_count": 2},
        {"data": [REJOINED | {"object": "user", "id": "orgmem_1"}], "total_count": 2},
    ],
)
async def test_a_membership_is_gone_only_by_a_list_that_is_whole(
    ask: Asking, answer: object
) -> None:
    body = clerk_api.bytes_of(answer)
    ask.api.faults.append(clerk_api.failing(200, body=body, path="/v1/organizations/"))
    with pytest.raises(DeletionUnconfirmed):
        await ask.clerk.membership("orgmem_1", organization="org_1", user="user_3")


async def test_a_membership_of_who_joined_again_is_gone(ask: Asking) -> None:
    body = clerk_api.bytes_of({"data": [REJOINED], "total_count": 1})
    ask.api.faults.append(clerk_api.failing(200, body=body, path="/v1/organizations/"))
    assert await ask.clerk.membership("orgmem_1", organization="org_1", user="user_3") is None


@pytest.mark.parametrize("count", [-1, True, None, "3", 1.5, 10**13])
async def test_a_count_is_a_number_of_objects(ask: Asking, count: object) -> None:
    body = clerk_api.bytes_of({"data": [], "total_count": count})
    ask.api.faults.append(clerk_api.failing(200, body=body, times=9))
    with pytest.raises(ClerkUnavailable, match="total_count"):
        await ask.clerk.count("user")
    with pytest.raises(ClerkUnavailable, match="total_count"):
        await ask.clerk.listed("organization", 0)


async def test_the_instance_of_a_key_is_told_if_at_all(ask: Asking) -> None:
    assert await ask.clerk.instance() == ask.api.instance_id
    for fault in (
        clerk_api.failing(404),
        clerk_api.failing(403),
        *(clerk_api.failing(200, body=body) for body in (b"{}", b"[]", b'{"id": 3}')),
    ):
        ask.api.faults[:] = [fault]
        assert await ask.clerk.instance() is None


async def test_a_list_that_is_not_there_is_refused(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.failing(404, times=2))
    with pytest.raises(ClerkRefused):
        await ask.users()
    with pytest.raises(ClerkRefused):
        await ask.clerk.listed("organization", 0)


# What is refused


async def test_a_wrong_key_is_told_with_what_to_do(ask: Asking) -> None:
    ask.key = "sk_test_wrong"
    with pytest.raises(ClerkRefused, match=r"401.*CLERK_SECRET_KEY") as refused:
        await ask.users()
    assert refused.value.status == 401
    assert refused.value.code == "clerk_key_invalid"
    assert not refused.value.switched_off
    assert "sk_test_wrong" not in str(refused.value)
    assert len(ask.api.asked) == 1


async def test_a_key_that_is_quoted_back_is_not_told(ask: Asking) -> None:
    body = clerk_api.bytes_of({"errors": [{"code": "x", "message": f"{ask.key} is no key"}]})
    ask.api.faults.append(clerk_api.failing(401, body=body))
    with pytest.raises(ClerkRefused) as refused:
        await ask.users()
    assert ask.key not in str(refused.value)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"errors": {}}', b'{"errors": [1]}', b"\xff"]
)
async def test_a_refusal_may_say_nothing(ask: Asking, body: bytes) -> None:
    ask.api.faults.append(clerk_api.failing(400, body=body))
    with pytest.raises(ClerkRefused, match="400") as refused:
        await ask.users()
    assert (refused.value.status, refused.value.code) == (400, "")


async def test_organizations_may_be_switched_off(ask: Asking) -> None:
    ask.api.organizations_enabled = False
    clerk = ask.clerk
    looks: list[Callable[[], Awaitable[object]]] = [
        lambda: clerk.count("organization"),
        lambda: clerk.listed("organization", 0),
        lambda: clerk.count("organizationMembership"),
        lambda: clerk.listed("organizationMembership", 0),
        lambda: clerk.one("organization", "org_1"),
        lambda: clerk.membership("orgmem_1", organization="org_1", user="user_3"),
    ]
    for look in looks:
        with pytest.raises(ClerkRefused) as refused:
            await look()
        assert refused.value.switched_off
        assert "CLERK_SECRET_KEY" not in str(refused.value)


async def test_another_403_is_not_for_want_of_organizations(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.failing(403))
    with pytest.raises(ClerkRefused, match="CLERK_SECRET_KEY") as refused:
        await ask.clerk.count("organization")
    assert not refused.value.switched_off


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(ask: Asking, status: int) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers)
        return web.json_response([])

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app) as elsewhere:
        to = {"Location": str(elsewhere.make_url("/v1/users"))}
        ask.api.faults.append(clerk_api.failing(status, headers=to))
        with pytest.raises(ClerkRefused, match="CLERK_API_URL"):
            await ask.users()
    assert not asked


@pytest.mark.parametrize("body", [b"{}", b"[1]", b"null", b'"users"', b'{"total_count": "3"}'])
async def test_what_is_not_clerk_is_said_to_be_so(ask: Asking, body: bytes) -> None:
    ask.api.faults.append(clerk_api.failing(200, body=body, times=5))
    ends = {"organization": "org_1", "user": "user_3"}
    looks: list[Callable[[], Awaitable[object]]] = [
        ask.users,
        lambda: ask.clerk.count("user"),
        lambda: ask.clerk.count_users(0, 1),
        lambda: ask.clerk.listed("organization", 0),
        lambda: ask.clerk.membership("orgmem_1", **ends),
    ]
    for look in looks:
        with pytest.raises(ClerkUnavailable, match="CLERK_API_URL"):
            await look()


# What is asked again


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (clerk_api.failing(500), {"5xx": 1}),
        (clerk_api.failing(502, body=b"<html>", times=3), {"5xx": 3}),
        (clerk_api.failing(503, times=ATTEMPTS - 1), {"5xx": ATTEMPTS - 1}),
        (clerk_api.failing(529), {"5xx": 1}),
        (clerk_api.reset(times=6), {"none": 3}),
        (clerk_api.truncated(times=2), {"none": 2}),
        (clerk_api.not_json(), {"200": 1}),
        (clerk_api.failing(200, body=b""), {"200": 1}),
    ],
)
async def test_a_failure_is_asked_again(
    ask: Asking, unhurried: None, fault: clerk_api.Fault, counted: dict[str, int]
) -> None:
    ask.api.faults.append(fault)
    assert await ask.users() == ["user_1", "user_2", "user_3"]
    assert ask.requests == {**counted, "200": counted.get("200", 0) + 1}


@pytest.mark.parametrize(
    "fault",
    [clerk_api.failing(503, times=100), clerk_api.not_json(times=100), clerk_api.reset(times=100)],
)
async def test_what_fails_again_and_again_is_given_up(
    ask: Asking, unhurried: None, fault: clerk_api.Fault
) -> None:
    ask.api.faults.append(fault)
    with structlog.testing.capture_logs() as told, pytest.raises(ClerkUnavailable) as given_up:
        await ask.users()
    assert "/v1/users" in str(given_up.value)
    assert clerk_api.KEY not in f"{given_up.value} {told}"
    assert sum(ask.requests.values()) == ATTEMPTS
    # aiohttp itself asks once more where a connection was reset.
    assert len(ask.api.asked) == ATTEMPTS * (2 if fault.cut else 1)


async def test_nobody_there_is_given_up(ask: Asking, unhurried: None) -> None:
    async with aiohttp.ClientSession() as session:
        for url in ("http://127.0.0.1:1/v1", "http://clerk.invalid/v1"):
            clerk = Clerk(session, url, lambda: "sk_test_x", share=1, metrics=ask.metrics)
            with pytest.raises(ClerkUnavailable):
                await clerk.count("user")
    assert ask.requests == {"none": 2 * ATTEMPTS}


@pytest.mark.parametrize("url", ["", "api.clerk.com/v1", "http://[/v1", "http://a:b/v1", "ftp://a"])
async def test_an_address_that_is_none_is_said_to_be_so(
    ask: Asking, unhurried: None, url: str
) -> None:
    async with aiohttp.ClientSession() as session:
        clerk = Clerk(session, url, lambda: "sk_test_x", share=1, metrics=ask.metrics)
        with pytest.raises((ClerkUnavailable, ClerkRefused)):
            await clerk.count("user")


async def test_a_failure_is_not_asked_again_at_once(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.failing(503))
    await ask.users()
    failed, succeeded = ask.api.asked
    assert 0.2 < succeeded.at - failed.at < 2


async def test_a_request_that_is_cancelled_is_not_asked_again(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.hanging())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await ask.users()
    assert await ask.users() == ["user_1", "user_2", "user_3"]
    assert len(ask.api.asked) == 2


# How often


async def test_nothing_is_sent_while_clerk_says_to_wait(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.too_many("1"))
    first = asyncio.create_task(ask.users())
    await ask.answered()
    looks: list[Awaitable[Any]] = [
        ask.clerk.one("user", "user_1"),
        ask.clerk.count("organization"),
        ask.users(),
    ]
    await asyncio.gather(first, *looks)
    told, *others = ask.api.asked
    assert told.status == 429
    assert len(others) == 4
    assert 1 <= min(asked.at for asked in others) - told.at < 1.5
    assert ask.requests == {"429": 1, "200": 4}
    assert 0.9 < ask.metric("wait_seconds_total") < 1.5


@pytest.mark.parametrize("retry_after", ["soon", "Wed, 21 Oct 2026 07:28:00 GMT", "-1", "1.5"])
async def test_a_wait_that_cannot_be_read_is_a_second(ask: Asking, retry_after: str) -> None:
    ask.api.faults.append(clerk_api.too_many(retry_after))
    begun = time.monotonic()
    reading = asyncio.create_task(ask.users())
    await ask.answered()
    await asyncio.sleep(0.1)
    assert 0.9 < ask.metric("wait_seconds_total") <= 1
    assert time.monotonic() - begun < 1
    assert len(ask.api.asked) == 1
    reading.cancel()


async def test_429_without_end_is_given_up_and_burns_no_requests() -> None:
    async with asking(clerk_api.ClerkApi(), patience=4) as ask:
        ask.api.faults.append(clerk_api.too_many("0", times=1000))
        with pytest.raises(ClerkRateLimited, match="429") as busy:
            await ask.users()
        first, second, third = ask.api.asked
        assert second.at - first.at >= 1
        assert third.at - second.at >= 2
        assert 0 < busy.value.seconds <= 4


def in_seconds(seconds: int) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("how", ["seconds", "date"])
async def test_a_wait_of_a_day_is_a_minute_and_is_said_at_once(
    how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has no such patience hears how long it takes, now and for as long as it holds."""
    async with asking(clerk_api.ClerkApi(), patience=10) as ask:
        day = "86400" if how == "seconds" else in_seconds(86_400)
        ask.api.faults.append(clerk_api.too_many(day))
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(ClerkRateLimited) as busy:
                await ask.users()
            assert time.monotonic() - begun < 0.5
            assert 58 < busy.value.seconds <= LONGEST_PAUSE == 60
        assert len(ask.api.asked) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "clerk_rate_limited" in line]
    assert len(lines) == 1
    assert re.search(r"pause=60 +seconds=(86400|86399)", lines[0])


async def test_a_date_to_wait_for_is_waited_for(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.too_many(in_seconds(3)))
    begun = time.monotonic()
    await ask.users()
    assert 1.5 < time.monotonic() - begun < 4


async def test_the_log_tells_once_of_many_long_waits(
    ask: Asking, capsys: pytest.CaptureFixture[str]
) -> None:
    ask.api.faults.append(clerk_api.too_many("5", times=2))
    await asyncio.gather(ask.users(), ask.users())
    assert capsys.readouterr().out.count("clerk_rate_limited") == 1


async def test_a_share_of_the_rate_is_kept() -> None:
    async with asking(clerk_api.ClerkApi(rate=clerk_api.Rate(3)), share=0.03) as ask:
        begun = time.monotonic()
        await asyncio.gather(*(ask.users() for _ in range(6)))
        took = time.monotonic() - begun
        assert ask.api.most_in(10) == 3
        assert ask.requests == {"200": 6}
        assert 10 < took < 11.5
        assert 9.5 < ask.metric("wait_seconds_total") < 11.5


async def test_a_small_share_is_one_at_least() -> None:
    waits: list[float] = []
    rate = Rate(0, waits.append)
    await asyncio.wait_for(rate.turn(), 0.1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rate.turn(), 0.05)
    assert len(waits) == 1


async def timed(work: Callable[[], Awaitable[None]]) -> float:
    begun = time.monotonic()
    await work()
    return time.monotonic() - begun


async def test_of_two_pauses_the_later_end_counts() -> None:
    rate = Rate(10, lambda _: None)
    rate.pause(0.2)
    rate.pause(0.05)
    assert 0.2 <= await timed(rate.turn) < 0.4
    assert await timed(rate.turn) < 0.1


async def test_who_waits_already_waits_for_a_new_pause() -> None:
    rate = Rate(10, lambda _: None)
    rate.pause(0.1)
    waiting = asyncio.create_task(timed(rate.turn))
    await asyncio.sleep(0.05)
    rate.pause(0.2)
    assert 0.24 <= await waiting < 0.5


async def test_who_gives_up_waiting_takes_no_turn() -> None:
    rate = Rate(1, lambda _: None)
    rate.pause(0.1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rate.turn(), 0.02)
    assert await timed(rate.turn) < 0.5


@pytest.mark.parametrize(
    ("key", "limit"), [("sk_test_x", 100), ("sk_live_x", 1000), ("live_x", 1000), ("", 1000)]
)
def test_a_keys_form_tells_its_rate(key: str, limit: int) -> None:
    assert rate_limit(key) == limit


# The key


async def test_the_next_request_has_the_new_key(ask: Asking) -> None:
    await ask.users()
    ask.key = ask.api.key = "sk_test_rotated"
    assert await ask.users()
    sent = [asked.headers["Authorization"] for asked in ask.api.asked]
    assert sent == [f"Bearer {clerk_api.KEY}", "Bearer sk_test_rotated"]


async def test_who_waited_for_a_turn_has_the_new_key(ask: Asking) -> None:
    ask.api.faults.append(clerk_api.too_many("1"))
    reading = asyncio.create_task(ask.users())
    await ask.answered()
    await asyncio.sleep(0.05)
    ask.key = ask.api.key = "sk_test_rotated"
    assert await reading
    assert ask.requests == {"429": 1, "200": 1}
