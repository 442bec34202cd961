"""`POST /ensure/{user_id}`: a user who is in the app before the webhook is here."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import yarl

from clerk_sync.mapping import loader
from clerk_sync.settings import Secret
from tests import clerk_api, deliveries
from tests.clerk_api import ClerkApi
from tests.deliveries import Reply, event, rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from clerk_sync.mapping.model import Mapping
    from tests.deliveries import At
    from tools.servers import Managed

KEY: Final = "sk_live_bm90IHRvIGJlIHNlZW4gaW4gYW55IGFuc3dlcg"
ADA: Final = "/v1/users/user_ada"


@pytest.fixture
def embedded_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/clerk-sync.db"


@pytest.fixture
async def api() -> AsyncIterator[ClerkApi]:
    """Return a Clerk with one user."""
    async with clerk_api.running(key=KEY) as running:
        running.put_user("user_ada", first_name="Ada")
        yield running


@asynccontextmanager
async def served(
    url: str, api: ClerkApi, mapping: Mapping | None = None, **more: Any
) -> AsyncIterator[At]:
    """Run the service on this database, with a key of this Clerk."""
    options = {
        "CLERK_SECRET_KEY": Secret("CLERK_SECRET_KEY", value=KEY),
        "CLERK_API_URL": f"{api.url}/v1",
        "CLERK_SYNC_CLERK_SHARE": 1,
        **more,
    }
    async with deliveries.served(url, mapping, **options) as at:
        yield at
        assert (await at.metrics())("errors_total") == 0


async def ensure(at: At, user_id: str = "user_ada") -> Reply:
    return await at.request("POST", f"{at.internal_url}/ensure/{user_id}")


async def names(url: str) -> dict[str, str]:
    return dict(await rows(url, "SELECT clerk_id, first_name FROM clerk_users"))


async def post(at: At, what: deliveries.Event) -> None:
    assert (await at.post(what)).outcome == "applied"


async def test_it_writes_the_row_and_answers_it(database_url: str, api: ClerkApi) -> None:
    user = api.users["user_ada"]
    async with served(database_url, api) as at:
        reply = await ensure(at)
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("application/json")
        assert reply.json["clerk_id"] == "user_ada"
        assert reply.json["first_name"] == "Ada"
        assert reply.json["username"] == user["username"]
        assert reply.json["created_at"].startswith("20")
        assert await names(database_url) == {"user_ada": "Ada"}
        profile = await at.inside("/profiles", params={"username": user["username"]})
        assert reply.json.items() <= profile.json.items()

        # It asks anew each time, and the row is what Clerk says.
        api.update("user_ada", first_name="Augusta")
        assert (await ensure(at)).json["first_name"] == "Augusta"
        assert len(api.asked_for(ADA)) == len(api.asked) == 2
        assert (await at.metrics())("clerk_requests_total", status="200") == 2
        # The webhook of the same change is late, or the first to tell, and either is fine.
        assert (await at.post(api.events[-1])).status == 200
        assert await names(database_url) == {"user_ada": "Augusta"}


async def test_twenty_callers_share_one_request(database_url: str, api: ClerkApi) -> None:
    everybody = asyncio.Event()
    api.before_read(1, everybody.wait, path=ADA)
    async with served(database_url, api) as at:
        calls = [asyncio.create_task(ensure(at)) for _ in range(20)]
        other = asyncio.create_task(ensure(at, "user_nobody"))
        await asyncio.sleep(0.3)
        # One of them gives up, and so does the one who asked first.
        for quitter in (calls[0], calls[7]):
            quitter.cancel()
        await asyncio.sleep(0.1)
        everybody.set()
        replies = await asyncio.gather(*(call for call in calls if not call.cancelled()))
        assert [(reply.status, reply.json["first_name"]) for reply in replies] == [
            (200, "Ada")
        ] * 18
        assert len(api.asked_for(ADA)) == 1
        assert (await other).status == 404
        assert (await ensure(at)).status == 200
        assert len(api.asked_for(ADA)) == 2


async def test_a_user_whom_clerk_does_not_know_is_no_tombstone(
    database_url: str, api: ClerkApi
) -> None:
    """Who asks may be ahead of Clerk's own API: the user may come any moment."""
    async with served(database_url, api) as at:
        reply = await ensure(at, "user_soon")
        assert reply.status == 404
        assert reply.json == {"error": "Clerk has no such user, or it was deleted"}
        assert await rows(database_url, "SELECT * FROM clerk_sync_entities") == []
        await post(at, api.put_user("user_soon", first_name="Bea"))
        assert await names(database_url) == {"user_soon": "Bea"}
        assert (await ensure(at, "user_soon")).json["first_name"] == "Bea"


async def test_a_user_who_was_deleted_here_stays_so(database_url: str, api: ClerkApi) -> None:
    """Clerk's API may lag behind its webhooks."""
    async with served(database_url, api) as at:
        await post(at, event("user.deleted", "user_ada"))
        reply = await ensure(at)
        assert (reply.status, reply.json) == (
            404,
            {"error": "Clerk has no such user, or it was deleted"},
        )
        assert await names(database_url) == {}


async def test_one_who_is_deleted_while_clerk_is_asked(database_url: str, api: ClerkApi) -> None:
    async with served(database_url, api) as at:
        api.before_send(1, lambda: post(at, api.delete("user_ada")), path=ADA)
        assert (await ensure(at)).status == 404
        assert await names(database_url) == {}
        assert (await ensure(at)).status == 404


async def test_a_marked_user_is_none(embedded_url: str, api: ClerkApi) -> None:
    mapping = loader.read(
        "tables: {user: {table: people, key: clerk_id, create: true, on_delete: {mark: gone_at},"
        " columns: {first_name: {value: first_name, type: text}}}}",
        source="m.yaml",
    )
    async with served(embedded_url, api, mapping) as at:
        assert (await ensure(at)).json["first_name"] == "Ada"
        await post(at, event("user.deleted", "user_ada"))
        assert (await ensure(at)).status == 404
        marked = "SELECT COUNT(*) FROM people WHERE gone_at IS NOT NULL"
        assert await rows(embedded_url, marked) == [(1,)]


async def test_a_newer_webhook_is_not_overwritten(database_url: str, api: ClerkApi) -> None:
    async with served(database_url, api) as at:
        await post(at, api.events[-1])
        newer = api.update("user_ada", first_name="newer")
        api.update("user_ada", first_name="newest")

        async def meanwhile() -> None:
            await post(at, api.events[-1])

        api.users["user_ada"] |= {"first_name": "newer", "updated_at": newer["data"]["updated_at"]}
        api.before_send(1, meanwhile, path=ADA)
        reply = await ensure(at)
        assert (reply.status, reply.json["first_name"]) == (200, "newest")
        assert await names(database_url) == {"user_ada": "newest"}


async def test_what_the_table_cannot_take_is_told(database_url: str, api: ClerkApi) -> None:
    api.put_user("user_long", first_name="x" * 300)
    async with served(database_url, api) as at:
        reply = await ensure(at, "user_long")
        assert (reply.status, reply.json) == (
            422,
            {"error": "the row cannot be written", "reason": "too_long"},
        )
        assert await names(database_url) == {}


async def test_half_a_character_is_told_where_it_matters(database_url: str, api: ClerkApi) -> None:
    api.update("user_ada", last_name="cut \ud83d", unsafe_metadata={"\ud83d": "\ud83d"})
    async with served(database_url, api) as at:
        reply = await ensure(at)
        assert (reply.status, reply.json["reason"]) == (422, "wrong_type")
        assert (await at.post(api.events[-1])).said == (200, "quarantined", "wrong_type")
        api.update("user_ada", last_name="whole")
        reply = await ensure(at)
        assert (reply.status, reply.json["last_name"]) == (200, "whole")


async def test_without_a_key_it_is_not_there(embedded_url: str, api: ClerkApi) -> None:
    async with served(embedded_url, api, CLERK_SECRET_KEY=None) as at:
        reply = await ensure(at)
        assert (reply.status, reply.json) == (501, {"error": "CLERK_SECRET_KEY is not set"})
        assert api.asked == []


async def test_a_wrong_key_is_told_and_not_shown(embedded_url: str, api: ClerkApi) -> None:
    api.key = "sk_live_another"
    async with served(embedded_url, api) as at:
        reply = await ensure(at)
        assert reply.status == 502
        assert reply.json["error"].startswith(f"Clerk answers 401 to {ADA}: The provided Clerk")
        assert "CLERK_SECRET_KEY" in reply.json["error"]
        assert "sk_live" not in reply.text
        api.key = KEY
        assert (await ensure(at)).status == 200


async def test_a_key_that_cannot_be_read_is_for_later(
    embedded_url: str, tmp_path: Path, api: ClerkApi
) -> None:
    path = tmp_path / "key"
    secret = Secret("CLERK_SECRET_KEY", path=path)
    async with served(embedded_url, api, CLERK_SECRET_KEY=secret) as at:
        reply = await ensure(at)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert api.asked == []
        path.write_text(KEY)
        assert (await ensure(at)).status == 200


async def test_a_short_failure_of_clerk_costs_nothing(embedded_url: str, api: ClerkApi) -> None:
    api.faults += [clerk_api.reset(path=ADA), clerk_api.failing(500, path=ADA)]
    async with served(embedded_url, api) as at:
        assert (await ensure(at)).status == 200
        assert (await at.metrics())("clerk_requests_total", status="5xx") == 1


async def test_clerk_hangs(embedded_url: str, api: ClerkApi) -> None:
    """The app waits with a person in front of it: ten seconds, and no longer."""
    api.faults.append(clerk_api.slow(10.4, path=ADA))
    async with served(embedded_url, api) as at:
        first = asyncio.create_task(ensure(at))
        await asyncio.sleep(0.8)
        second = asyncio.create_task(ensure(at))
        # Others are not in its way.
        api.put_user("user_bea", first_name="Bea")
        assert (await ensure(at, "user_bea")).status == 200
        reply = await first
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert reply.json == {"error": "Clerk or the database is not reachable"}
        # Who gave up has not taken the answer from who did not.
        assert (await second).status == 200
        assert len(api.asked_for(ADA)) == 1


async def test_while_clerk_says_to_wait_it_says_so_at_once(
    embedded_url: str, api: ClerkApi
) -> None:
    api.faults.append(clerk_api.too_many("86400", path=ADA))
    async with served(embedded_url, api) as at:
        for _ in range(3):
            begun = time.monotonic()
            reply = await ensure(at)
            assert time.monotonic() - begun < 1
            assert reply.status == 503
            assert 50 < int(reply.headers["Retry-After"]) <= 60
            assert "429" in reply.json["error"]
        assert len(api.asked_for(ADA)) == 1


async def test_a_short_wait_is_waited_for(embedded_url: str, api: ClerkApi) -> None:
    api.faults.append(clerk_api.too_many("0", path=ADA, times=2))
    async with served(embedded_url, api) as at:
        assert (await ensure(at)).status == 200
        assert len(api.asked_for(ADA)) == 3


async def test_the_database_goes_while_clerk_is_asked(mysql_server: Managed, api: ClerkApi) -> None:
    url = mysql_server.create_database("clerk_sync_ensure_away")
    async with served(url, api) as at:
        api.before_send(1, lambda: asyncio.to_thread(mysql_server.kill), path=ADA)
        reply = await ensure(at)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        await at.until_ready(ready=False)
        asked = len(api.asked)
        reply = await ensure(at)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert len(api.asked) == asked  # Clerk is not asked for what cannot be written
        await asyncio.to_thread(mysql_server.start)
        await at.until_ready()
        assert (await ensure(at)).status == 200
    mysql_server.drop_database("clerk_sync_ensure_away")


async def test_a_schema_that_is_not_there_is_for_later(embedded_url: str, api: ClerkApi) -> None:
    settings = deliveries.settings_of(
        embedded_url,
        CLERK_SECRET_KEY=Secret("CLERK_SECRET_KEY", value=KEY),
        CLERK_API_URL=f"{api.url}/v1",
    )
    async with deliveries.serving(settings) as at:
        reply = await ensure(at)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
        assert "clerk-sync migrate" in reply.json["error"]
        assert api.asked == []


async def test_a_mapping_without_users_has_none(embedded_url: str, api: ClerkApi) -> None:
    mapping = loader.read(
        "tables: {organization: {table: groups_, key: clerk_id, create: true, columns: {name:"
        " {value: name, type: text}}}}",
        source="m.yaml",
    )
    async with served(embedded_url, api, mapping) as at:
        reply = await ensure(at)
        assert (reply.status, reply.json) == (
            404,
            {"error": "the mapping names no table for `user`"},
        )
        assert api.asked == []


async def test_odd_ids_are_ids_of_nobody(embedded_url: str, api: ClerkApi) -> None:
    async with served(embedded_url, api) as at:
        for segment in (
            *("count", ".", "%2e%2e", "..%2Fusers", "user_ada%2F..%2Fuser_ada", "USER_ADA"),
            *("user_ada%2Forganization_memberships", "user_ada%3Flimit=1", "user_ada%23x"),
            *("user%20ada", "%20user_ada", "user_ada%00", "user_ada%0d%0aX-Y:%20z", "%25", "%FF"),
            *("%C3%A9%F0%9F%A6%8A", "'%20OR%201=1--", "u" * 5000),
        ):
            url = yarl.URL(f"{at.internal_url}/ensure/{segment}", encoded=True)
            async with at.http.post(url) as response:
                text = await response.text()
            # There is something at `count`, which is not a user.
            assert response.status in ((404, 503) if segment == "count" else (404,)), (
                segment,
                text,
            )
        # One segment below users, whatever it is made of.
        assert api.asked
        for asked in api.asked:
            assert asked.target.partition("?")[0].count("/") == 3, asked.target
            assert asked.target.startswith("/v1/users/")
            assert dict(asked.query) == {}
        assert await names(embedded_url) == {}
        assert await rows(embedded_url, "SELECT * FROM clerk_sync_entities") == []


async def test_only_by_post_and_only_inside(embedded_url: str, api: ClerkApi) -> None:
    async with served(embedded_url, api) as at:
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            reply = await at.request(method, f"{at.internal_url}/ensure/user_ada")
            assert reply.status == 405
        assert (await at.request("POST", f"{at.internal_url}/ensure/")).status == 404
        assert (await at.request("POST", f"{at.internal_url}/ensure")).status == 404
        outside = await at.request("POST", f"{at.url}/ensure/user_ada")
        assert outside.status == 404
        assert api.asked == []
