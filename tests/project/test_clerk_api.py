"""The stand-in for Clerk's API has to be right, or every test that talks to it is worthless."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from clerk_sync.clerk import events, signature
from tests import clerk_api
from tests.deliveries import Reply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from tests.clerk_api import ClerkApi

NOW = 1_700_000_000_000
BEARER = {"Authorization": f"Bearer {clerk_api.KEY}"}


class Asker:
    """Asks one API with the right key."""

    def __init__(self, api: ClerkApi, http: aiohttp.ClientSession) -> None:
        self.api = api
        self._http = http

    async def __call__(
        self, target: str, *, headers: Mapping[str, str] = BEARER, method: str = "GET"
    ) -> Reply:
        async with self._http.request(method, self.api.url + target, headers=headers) as response:
            return Reply(response.status, response.headers, await response.text())

    async def ids(self, target: str) -> str:
        """Return the last letters of the ids in a list."""
        found = (await self(target)).json
        return "".join(
            one["id"][-1] for one in (found if isinstance(found, list) else found["data"])
        )

    async def refusal(self, target: str, **how: Any) -> tuple[int, str]:
        reply = await self(target, **how)
        assert set(reply.json) == {"errors", "clerk_trace_id"}
        (error,) = reply.json["errors"]
        assert set(error) == {"message", "long_message", "code", "meta"}
        return reply.status, error["code"]


@asynccontextmanager
async def asking(api: ClerkApi) -> AsyncIterator[Asker]:
    async with api.serving(), aiohttp.ClientSession() as http:
        yield Asker(api, http)


@pytest.fixture
async def ask() -> AsyncIterator[Asker]:
    """Five users, two of them of one moment; two organizations; three memberships."""
    api = clerk_api.ClerkApi(now_ms=NOW, tick_ms=1)
    for name, born in (("a", 10), ("b", 20), ("d", 30), ("c", 30), ("e", 40)):
        api.put_user(f"user_{name}", created_at=NOW + born, username=f"u{name}", first_name=None)
    api.now_ms += 100
    for name in "xy":
        api.put_organization(f"org_{name}", name=name.upper(), slug=f"slug-{name}")
    for name, user, organization in (("1", "a", "x"), ("2", "b", "x"), ("3", "a", "y")):
        api.put_membership(f"orgmem_{name}", f"user_{user}", f"org_{organization}")
    async with asking(api) as ask:
        yield ask


async def test_a_user_is_shown_as_its_event_tells(ask: Asker) -> None:
    event = ask.api.put_user("user_f", first_name="F")
    assert (await ask("/v1/users/user_f")).json == event["data"]
    assert (await ask("/v1/users?limit=500")).json[0] == ask.api.users["user_f"]


@pytest.mark.parametrize(
    ("target", "ids"),
    [
        ("/v1/users", "edcba"),
        ("/v1/users?order_by=created_at", "abcde"),
        ("/v1/users?order_by=%2Bcreated_at", "abcde"),
        ("/v1/users?order_by=-username", "edcba"),
        ("/v1/users?order_by=username&order_by=-created_at", "abcde"),
        ("/v1/users?order_by=first_name", "abcde"),
        ("/v1/users?order_by=email_address", "abcde"),
        ("/v1/users?limit=2", "ed"),
        ("/v1/users?limit=2&offset=1", "dc"),
        ("/v1/users?offset=9", ""),
        ("/v1/users?limit=2&starting_after=user_d", "cb"),
        ("/v1/users?starting_after=user_c&offset=0", "ba"),
        ("/v1/users?starting_after=user_a", ""),
        ("/v1/users?order_by=%2Bcreated_at&starting_after=user_c", "de"),
        (f"/v1/users?created_at_after={NOW + 20}", "edc"),
        (f"/v1/users?created_at_before={NOW + 30}", "ba"),
        (f"/v1/users?created_at_after={NOW + 10}&starting_after=user_c", "b"),
        ("/v1/users?user_id=user_a&user_id=user_gone&user_id=%2Buser_d", "da"),
        ("/v1/users?user_id=-user_a&user_id=-user_b", "edc"),
        ("/v1/users?user_id=user_a&user_id=user_d&starting_after=user_c", "a"),
        ("/v1/organizations", "yx"),
        ("/v1/organizations?order_by=name", "xy"),
        ("/v1/organizations?order_by=-members_count", "xy"),
        ("/v1/organizations?starting_after=org_y", "yx"),
        ("/v1/organizations?limit=1&offset=1", "x"),
        ("/v1/organization_memberships", "321"),
        ("/v1/organization_memberships?order_by=%2Bcreated_at&limit=2", "12"),
        ("/v1/organization_memberships?order_by=-username&limit=1", "2"),
        ("/v1/organizations/org_x/memberships", "21"),
        ("/v1/organizations/org_x/memberships?user_id=user_a", "1"),
        ("/v1/organizations/org_x/memberships?user_id=user_c", ""),
        ("/v1/users/user_a/organization_memberships", "31"),
    ],
)
async def test_a_list_is_what_was_asked_for(ask: Asker, target: str, ids: str) -> None:
    assert await ask.ids(target) == ids


@pytest.mark.parametrize(
    ("limit", "length"),
    [("", 10), ("&limit=500", 12), ("&limit=501", 10), ("&limit=0", 10), ("&limit=-1", 10)],
)
async def test_a_limit_out_of_range_is_the_default(ask: Asker, limit: str, length: int) -> None:
    for number in range(7):
        ask.api.put_user(f"user_{number}")
    assert len(await ask.ids(f"/v1/users?offset=0{limit}")) == length


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("", 5),
        ("?limit=2&offset=1", 5),
        (f"?created_at_after={NOW + 20}", 3),
        (f"?created_at_after={NOW + 10}&created_at_before={NOW + 30}", 1),
        ("?user_id=user_a&user_id=user_gone", 1),
    ],
)
async def test_users_are_counted(ask: Asker, query: str, count: int) -> None:
    reply = await ask(f"/v1/users/count{query}")
    assert reply.json == {"object": "total_count", "total_count": count}


@pytest.mark.parametrize(
    "query",
    [
        "order_by=+created_at",  # a bare + is a space
        "order_by=id",
        "limit=ten",
        "offset=-1",
        "created_at_after=today",
        "starting_after=user_a&order_by=-updated_at",
        "starting_after=user_a&offset=1",
        "starting_after=user_gone",
        "&".join(f"user_id=user_{number}" for number in range(101)),
    ],
)
async def test_a_bad_parameter_is_refused(ask: Asker, query: str) -> None:
    assert await ask.refusal(f"/v1/users?{query}") == (422, "form_param_value_invalid")


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/users/user_gone", "/v1/users/user_gone/organization_memberships"),
        *("/v1/organizations/org_gone", "/v1/organizations/org_gone/memberships", "/v1/else"),
    ],
)
async def test_what_is_not_there_is_not_found(ask: Asker, path: str) -> None:
    assert await ask.refusal(path) == (404, "resource_not_found")


@pytest.mark.parametrize("query", ["?query=ada", "?email_address=a@example.com", "?banned=true"])
async def test_what_is_not_built_is_not_ignored(ask: Asker, query: str) -> None:
    assert await ask.refusal(f"/v1/users{query}") == (501, "not_in_stand_in")


@pytest.mark.parametrize(
    ("headers", "query", "refusal"),
    [
        ({}, "", (401, "authorization_header_format_invalid")),
        ({"Authorization": "Bearer sk_test_other"}, "", (401, "clerk_key_invalid")),
        (BEARER | {"Clerk-API-Version": "2026-05-13"}, "", (400, "api_version_invalid")),
        (BEARER, "?__clerk_api_version=1", (400, "api_version_invalid")),
        (
            BEARER | {"Clerk-API-Version": "2026-05-12"},
            "?__clerk_api_version=2026-05-12",
            (400, "api_version_invalid"),
        ),
    ],
)
async def test_key_and_version_are_checked(
    ask: Asker, headers: dict[str, str], query: str, refusal: tuple[int, str]
) -> None:
    assert await ask.refusal(f"/v1/users{query}", headers=headers) == refusal
    assert (await ask("/v1/users", headers=BEARER | {"Clerk-API-Version": "2026-05-12"})).json


@pytest.mark.parametrize(
    ("lost_cursor", "deleted", "unknown"),
    [("refused", None, None), ("kept", "ba", None), ("empty", "", ""), ("first", "edba", "edba")],
)
async def test_a_lost_cursor_has_a_switch(
    ask: Asker, lost_cursor: clerk_api.LostCursor, deleted: str | None, unknown: str | None
) -> None:
    ask.api.lost_cursor = lost_cursor
    ask.api.delete("user_c")
    for cursor, ids in (("user_c", deleted), ("user_gone", unknown)):
        target = f"/v1/users?starting_after={cursor}"
        if ids is None:
            assert (await ask(target)).status == 422
        else:
            assert await ask.ids(target) == ids


async def test_lists_of_organizations_tell_the_total(ask: Asker) -> None:
    for path, total in (
        ("/v1/organizations?limit=1", 2),
        ("/v1/organization_memberships?limit=1", 3),
        ("/v1/users/user_a/organization_memberships?limit=1", 2),
    ):
        found = (await ask(path)).json
        assert (len(found["data"]), found["total_count"]) == (1, total)


async def test_members_are_counted_when_asked(ask: Asker) -> None:
    assert "members_count" not in (await ask("/v1/organizations/org_x")).json
    counted = await ask("/v1/organizations?include_members_count=true&order_by=name")
    assert [one["members_count"] for one in counted.json["data"]] == [2, 1]
    found = await ask("/v1/organizations/slug-x?include_members_count=true")
    assert (found.json["id"], found.json["members_count"]) == ("org_x", 2)


async def test_a_membership_shows_its_user_and_organization_as_they_are(ask: Asker) -> None:
    ask.api.update("org_y", name="New")
    ask.api.update("user_a", first_name="New")
    newest = (await ask("/v1/organization_memberships?limit=1")).json["data"][0]
    shown = newest["organization"]["name"], newest["public_user_data"]["first_name"]
    assert shown == ("New", "New")
    assert newest["public_user_data"]["user_id"] == "user_a"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/organizations",
        "/v1/organization_memberships",
        "/v1/users/user_a/organization_memberships",
    ],
)
async def test_organizations_may_be_disabled(ask: Asker, path: str) -> None:
    ask.api.organizations_enabled = False
    assert await ask.refusal(path) == (403, "organization_not_enabled_in_instance")
    assert (await ask("/v1/users")).status == 200


async def test_changes_make_events(ask: Asker) -> None:
    api = ask.api
    before = api.users["user_a"]["updated_at"]
    updated = api.update("user_a", first_name="New")
    assert before < updated["data"]["updated_at"] < updated["timestamp"]
    deleted = api.delete("user_a")
    kept = {name: updated["data"][name] for name in ("id", "object", "external_id")}
    assert deleted["data"] == {"deleted": True, **kept}
    assert list(api.memberships) == ["orgmem_2"]
    assert await ask.ids("/v1/users/user_b/organization_memberships") == "2"
    api.tells_of_cascades = True
    api.delete("org_x")
    assert [(event["type"], event["data"]["id"]) for event in api.events[-4:]] == [
        ("user.updated", "user_a"),
        ("user.deleted", "user_a"),
        ("organizationMembership.deleted", "orgmem_2"),
        ("organization.deleted", "org_x"),
    ]
    for event in api.events:
        parsed = events.parse(signature.Delivery("msg_1", 0, json.dumps(event)))
        assert isinstance(parsed, events.Event)
        assert (parsed.type, parsed.clerk_id) == (event["type"], event["data"]["id"])


@pytest.mark.parametrize(
    ("fault", "status", "headers"),
    [
        (clerk_api.failing(500), 500, {}),
        (clerk_api.failing(502, body=b"<html>"), 502, {}),
        (clerk_api.too_many("3"), 429, {"Retry-After": "3"}),
        (clerk_api.slow(0.2), 200, {}),
        (clerk_api.failing(200, body=b"<html>"), 200, {}),
    ],
)
async def test_a_fault_befalls_one_request(
    ask: Asker, fault: clerk_api.Fault, status: int, headers: dict[str, str]
) -> None:
    ask.api.faults.append(fault)
    begun = time.monotonic()
    reply = await ask("/v1/users")
    assert (reply.status, {**reply.headers, **headers}) == (status, dict(reply.headers))
    assert time.monotonic() - begun >= fault.seconds
    assert fault.body in (b"", reply.text.encode())
    assert not ask.api.faults
    assert await ask.ids("/v1/users") == "edcba"
    assert [asked.status for asked in ask.api.asked] == [status, 200]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (clerk_api.reset(times=2), aiohttp.ClientConnectionError),  # aiohttp asks again
        (clerk_api.truncated(), aiohttp.ClientPayloadError),
        (clerk_api.not_json(), UnicodeDecodeError),
        (clerk_api.hanging(), TimeoutError),
    ],
)
async def test_a_connection_may_fail(
    ask: Asker, fault: clerk_api.Fault, error: type[Exception]
) -> None:
    ask.api.faults.append(fault)
    with pytest.raises(error):
        async with asyncio.timeout(0.5):
            await ask("/v1/users")
    assert await ask.ids("/v1/users") == "edcba"


async def test_a_fault_chooses_its_requests(ask: Asker) -> None:
    where: dict[str, Any] = {"path": "/v1/users", "query": "limit=2", "skip": 1, "times": 2}
    ask.api.faults.append(clerk_api.failing(503, **where))
    targets = ["/v1/organizations?limit=2", "/v1/users", *["/v1/users?limit=2"] * 4]
    assert [(await ask(target)).status for target in targets] == [200, 200, 200, 503, 503, 200]
    assert ask.api.repeated == {"/v1/users?limit=2": 2}


async def test_the_rate_is_limited(ask: Asker) -> None:
    ask.api.rate = clerk_api.Rate(3, seconds=0.5)
    replies = await asyncio.gather(*(ask("/v1/users?limit=1") for _ in range(5)))
    assert sorted(reply.status for reply in replies) == [200, 200, 200, 429, 429]
    assert {reply.headers.get("Retry-After") for reply in replies} == {None, "1"}
    await asyncio.sleep(0.5)
    assert (await ask("/v1/users")).status == 200
    assert (ask.api.most_in(0.4), ask.api.most_in(60)) == (5, 6)


async def test_things_change_between_pages(ask: Asker) -> None:
    async def late() -> None:
        await asyncio.sleep(0.01)
        ask.api.delete("user_a")

    ask.api.before_read(2, late)
    ask.api.before_send(2, lambda: ask.api.put_user("user_f"))
    target = "/v1/users?order_by=created_at&limit=2"
    seen = [await ask.ids(target) for _ in range(3)]
    assert seen == ["ab", "bc", "bc"]
    assert await ask.ids("/v1/users?limit=1") == "f"


async def test_requests_in_flight_are_counted(ask: Asker) -> None:
    ask.api.faults.append(clerk_api.slow(0.2, times=4))
    await asyncio.gather(*(ask("/v1/users") for _ in range(4)))
    await ask("/v1/users")
    assert ask.api.most_at_once == 4
    assert len(ask.api.asked_for("/v1/users")) == 5


def told(reply: Reply) -> tuple[int, Any]:
    """The status, and users as they are or else the ids and the count."""
    match reply.json:
        case {"data": found, "total_count": total}:
            return reply.status, ([one["id"] for one in found], total)
        case {"errors": _}:
            return reply.status, None
        case found:
            return reply.status, found


@pytest.mark.parametrize("ties", [1, 3])
async def test_a_crowd_answers_as_if_it_were_held(ties: int) -> None:
    crowd = clerk_api.crowd(30, organizations=4, memberships=50, ties=ties)
    held = clerk_api.ClerkApi()
    async with asking(crowd) as of_crowd, asking(held) as of_held:
        for one in (await of_crowd("/v1/users?limit=500")).json:
            held.put_user(one["id"], **one)
        for one in (await of_crowd("/v1/organizations?limit=500")).json["data"]:
            held.put_organization(one["id"], **one)
        for one in (await of_crowd("/v1/organization_memberships?limit=500")).json["data"]:
            ends = one.pop("public_user_data")["user_id"], one.pop("organization")["id"]
            held.put_membership(one["id"], *ends, **one)
        moment = clerk_api.created_at(12, ties=ties)
        tenth, third = clerk_api.user_id(10), clerk_api.user_id(3)
        organization = next(iter(held.organizations))
        for target in (
            "users?limit=7",
            "users?limit=7&offset=27&order_by=%2Bcreated_at",
            f"users?limit=7&starting_after={tenth}",
            f"users?limit=7&order_by=%2Bcreated_at&starting_after={tenth}",
            f"users?limit=7&order_by=created_at&starting_after={tenth}&created_at_after={moment}",
            f"users?created_at_before={moment}&created_at_after={moment - 60_001}",
            f"users?created_at_before={moment}&starting_after={clerk_api.user_id(29)}",
            f"users?created_at_before={moment}&created_at_after={moment}",
            f"users?starting_after={clerk_api.user_id(30)}",
            f"users?user_id={third}&user_id=user_gone&user_id={tenth}",
            f"users/count?created_at_before={moment + 1}",
            f"users/{clerk_api.user_id(29)}",
            f"users/{clerk_api.user_id(30)}",
            f"users/{third}/organization_memberships",
            "organizations?order_by=created_at&limit=2&offset=1",
            "organization_memberships?limit=20&offset=15",
            f"organizations/{organization}/memberships?limit=20&order_by=created_at",
            "organizations/org_gone/memberships",
        ):
            assert told(await of_crowd(f"/v1/{target}")) == told(await of_held(f"/v1/{target}"))


@pytest.mark.parametrize(("small", "size"), [(False, 2700), (True, 2100)])
async def test_a_user_of_a_crowd_is_of_clerks_size(small: bool, size: int) -> None:  # noqa: FBT001
    async with asking(clerk_api.crowd(9, small=small)) as ask:
        assert size * 0.9 < len((await ask(f"/v1/users/{clerk_api.user_id(8)}")).text) < size


async def test_a_crowd_runs_as_a_process() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.clerk_api", "--users", "1000000", "--rate", "2"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        said = json.loads(await process.stdout.readline())
        headers = {"Authorization": f"Bearer {said['key']}"}
        async with aiohttp.ClientSession(said["url"], headers=headers) as http:
            async with http.get("/v1/users/count") as response:
                assert (await response.json())["total_count"] == 1_000_000
            half = clerk_api.user_id(500_000)
            async with http.get(f"/v1/users?limit=500&starting_after={half}") as response:
                found = await response.json()
            assert found[-1]["id"] == clerk_api.user_id(499_500)
            async with http.get("/v1/users") as response:
                assert response.status == 429
    finally:
        process.terminate()
        await process.wait()
