"""The running service, over real HTTP: its answers, probes, metrics, log, read side and end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync import app
from clerk_sync.clerk import catalog
from clerk_sync.mapping import loader
from clerk_sync.settings import InvalidSettings, Settings
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, SECRET, Load, event, new_id, rows
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.deliveries import At, Reply
    from tools.servers import Managed

INSTANCE: Final = "ins_expected"


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[At]:
    """Return a service on the embedded database."""
    url = f"sqlite:///{tmp_path}/embedded.db"
    async with deliveries.served(url, CLERK_INSTANCE_ID=INSTANCE) as running:
        yield running


def ours(type_: str, clerk_id: str, **data: Any) -> dict[str, Any]:
    return {**event(type_, clerk_id, **data), "instance_id": INSTANCE}


# --- The answers -------------------------------------------------------------------------------


async def test_effects_are_answered_200_each_with_its_outcome(database_url: str) -> None:
    first, last = new_id(), deliveries.now_ms()
    async with deliveries.served(database_url) as at:
        created = await at.post(event("user.created", "user_a", version=last), svix_id=first)
        assert (created.status, created.text) == (200, '{"outcome": "applied"}')
        assert created.headers["Content-Type"].startswith("application/json")
        assert "Retry-After" not in created.headers
        assert "webhook-delivery" not in created.headers
        again = await at.post(event("user.created", "user_a", version=last), svix_id=first)
        assert again.said == (200, "duplicate", None)
        late = await at.post(event("user.updated", "user_a", version=last - 5))
        assert late.said == (200, "stale", None)
        deleted = await at.post(event("user.deleted", "user_a"))
        assert deleted.said == (200, "applied", None)
        risen = await at.post(event("user.updated", "user_a", version=last + 5))
        assert risen.said == (200, "stale", None)
        assert await rows(database_url, "SELECT * FROM clerk_users") == []


async def test_success_is_answered_only_when_others_can_see_it(database_url: str) -> None:
    async with deliveries.served(database_url) as at:
        for turn, type_ in enumerate(["user.created", "user.updated"]):
            svix_id = new_id()
            reply = await at.post(
                event(type_, "user_a", first_name=f"turn {turn}"), svix_id=svix_id
            )
            assert reply.outcome == "applied"
            assert await deliveries.turns(database_url) == {"user_a": turn}
            assert (await deliveries.ledger(database_url))[svix_id] == "applied"


@pytest.mark.parametrize("type_", ["session.created", "email.created", "sms.created", "no.such"])
async def test_what_no_table_wants_is_ignored_with_200(at: At, type_: str) -> None:
    known = type_ if type_ in catalog.TYPES else "session.created"
    made = {**ours(known, "x_1"), "type": type_}
    assert (await at.post(made)).said == (200, "ignored", None)


UNUSABLE: Final[list[tuple[Any, str]]] = [
    (lambda _: b"{", "bad_json"),
    (lambda _: b"", "bad_json"),
    (lambda _: b"[]", "bad_envelope"),
    (lambda e: {**e, "type": 7}, "bad_envelope"),
    (lambda e: {**e, "data": []}, "bad_envelope"),
    (lambda e: {**e, "data": {**e["data"], "id": None}}, "bad_id"),
    (lambda e: {**e, "data": {**e["data"], "id": "user\u00e9"}}, "bad_id"),
    (lambda e: {**e, "timestamp": "yesterday"}, "bad_version"),
    (lambda e: {**e, "timestamp": 253_402_300_800_000}, "bad_version"),
    (lambda e: {**e, "data": {**e["data"], "updated_at": -1}}, "bad_version"),
    (lambda e: {**e, "data": {**e["data"], "username": "x" * 256}}, "too_long"),
    (lambda e: {**e, "data": {**e["data"], "banned": "perhaps"}}, "wrong_type"),
    (lambda e: {**e, "data": {**e["data"], "banned": 2}}, "out_of_range"),
]


async def test_verified_but_unusable_is_quarantined_with_200(at: At) -> None:
    before = await at.metrics()
    for change, reason in UNUSABLE:
        reply = await at.post(change(ours("user.created", "user_q")))
        assert reply.said == (200, "quarantined", reason)
    grown = (await at.metrics()).grown_since(before, but=("received_total", "outcomes_total"))
    counts = Counter(reason for _, reason in UNUSABLE)
    assert grown == {f"quarantined{{reason={reason}}}": n for reason, n in counts.items()}


async def test_signatures_that_do_not_hold_are_answered_401(at: At) -> None:
    body = deliveries.bytes_of(ours("user.created", "user_x"))
    now = int(time.time())

    async def posted(**changed: str | None) -> tuple[int, str, str | None]:
        headers = {**deliveries.signed(body), **changed}
        sent = {name.replace("_", "-"): value for name, value in headers.items() if value}
        return (await at.request("POST", at.url + PATH, data=body, headers=sent)).said

    for part in ("svix-id", "svix-timestamp", "svix-signature"):
        assert await posted(**{part: None}) == (401, "rejected", "missing")
    assert await posted(**{"svix-id": "a.b"}) == (401, "rejected", "malformed")
    assert await posted(**{"svix-timestamp": "1_0.5"}) == (401, "rejected", "malformed")
    assert await posted(**{"svix-timestamp": "9" * 12}) == (401, "rejected", "malformed")
    assert await posted(**{"svix-signature": "rubbish"}) == (401, "rejected", "malformed")
    assert await posted(**{"svix-signature": "v1,AAAA"}) == (401, "rejected", "wrong")
    assert await posted(**{"svix-id": new_id()}) == (401, "rejected", "wrong")
    assert (await at.post(body, secret=OTHER_SECRET)).said == (401, "rejected", "wrong")
    assert (await at.post(body, sent_at=now - 310)).said == (401, "rejected", "expired")
    assert (await at.post(body, sent_at=now + 310)).said == (401, "rejected", "expired")
    assert (await at.post(b"\xff", secret=SECRET)).said == (401, "rejected", "malformed")
    assert (await at.post(body, sent_at=now - 290)).outcome == "applied"


async def test_the_standard_names_of_the_headers_are_as_good(at: At) -> None:
    made = ours("user.created", "user_std")
    assert (await at.post(made, family="webhook")).outcome == "applied"


async def test_no_body_is_looked_at_before_its_signature(at: At) -> None:
    """An unverified body decides nothing: neither its JSON nor its instance nor its type."""
    elsewhere = {**ours("user.created", "user_x"), "instance_id": "ins_other"}
    for body in (b"{", b"", elsewhere, ours("email.created", "ema_1")):
        assert (await at.post(body, secret=OTHER_SECRET)).said == (401, "rejected", "wrong")


async def test_another_instance_is_told_never_to_send_it_again(at: At) -> None:
    reply = await at.post({**ours("user.created", "user_x"), "instance_id": "ins_other"})
    assert reply.said == (403, "rejected", "instance")
    assert reply.headers["webhook-delivery"] == "abort-message"
    without = ours("user.created", "user_y")
    del without["instance_id"]
    assert (await at.post(without)).outcome == "applied"


async def test_wrong_path_method_and_size(at: At) -> None:
    for path in ("/", "/webhooks", PATH + "//", "//webhooks/clerk", "/webhooks/Clerk"):
        assert (await at.post(b"{}", path=path)).said == (404, "rejected", "path")
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        reply = await at.request(method, at.url + PATH)
        assert reply.said == (405, "rejected", "method")
        assert reply.headers["Allow"] == "POST"
    assert (await at.post(b"x" * (2**21 + 1))).said == (413, "rejected", "too_large")


async def test_each_listener_has_its_own_paths_only(at: At) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/profiles"):
        assert (await at.inside(path)).status == 200
        assert (await at.request("GET", at.url + path)).said == (404, "rejected", "path")
    body = deliveries.bytes_of(ours("user.created", "user_x"))
    inside = await at.request(
        "POST", at.internal_url + PATH, data=body, headers=deliveries.signed(body)
    )
    assert inside.status == 404
    assert (await at.inside("/metrics")).status == 200
    assert (await at.request("POST", at.internal_url + "/profiles")).status == 405


@pytest.mark.parametrize(
    ("configured", "takes", "takes_not"),
    [
        (PATH, (PATH, PATH + "/", PATH + "/?x=1"), (PATH + "//", PATH + "/x")),
        ("/in/here", ("/in/here", "/in/here/"), (PATH, "/in", "/in/")),
        ("/in/here/", ("/in/here", "/in/here/"), ("/in/here//",)),
        ("/", ("/", ""), ("//", PATH)),
    ],
)
async def test_the_webhook_s_path_with_and_without_a_slash_behind_it(
    tmp_path: Path, configured: str, takes: tuple[str, ...], takes_not: tuple[str, ...]
) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    async with deliveries.served(url, CLERK_SYNC_WEBHOOK_PATH=configured) as at:
        for path in takes:
            assert (await at.post(event("user.created", "user_a"), path=path)).status == 200
        for path in takes_not:
            assert (await at.post(event("user.created", "user_a"), path=path)).status == 404


async def test_without_a_secret_it_refuses_to_start(tmp_path: Path) -> None:
    settings = deliveries.settings_of(f"sqlite:///{tmp_path}/x.db")
    bare = Settings.model_construct(**{**dict(settings), "signing_secret": None})
    with pytest.raises(InvalidSettings, match="CLERK_WEBHOOK_SIGNING_SECRET"):
        async with app.running(bare, loader.load("mirror")):
            raise AssertionError("it listens")


async def test_queue_full_and_deadline_are_quick_503s(mysql_server: Managed) -> None:
    """A row that the app holds a lock on keeps its writers busy; the rest is told to come later."""
    url = mysql_server.create_database("clerk_sync_locked")
    limits: dict[str, Any] = {
        "CLERK_SYNC_WRITERS": 1,
        "CLERK_SYNC_QUEUE_LIMIT": 2,
        "CLERK_SYNC_DEADLINE_SECONDS": 1,
    }
    async with deliveries.served(url, **limits) as at:
        await at.post(event("user.created", "user_a"))
        mysql_server.freeze()
        begun = time.perf_counter()
        held = [asyncio.create_task(at.post(event("user.updated", "user_a"))) for _ in range(3)]
        await asyncio.sleep(0.2)
        quick = [await at.post(event("user.updated", "user_a")) for _ in range(2)]
        assert time.perf_counter() - begun < 0.8
        late = await asyncio.gather(*held)
        assert 0.8 < time.perf_counter() - begun < 2
        mysql_server.thaw()
    replies = [*quick, *late]
    assert {reply.headers["Retry-After"] for reply in replies} == {"5"}
    assert {reply.said for reply in late} <= {
        (503, "unavailable", "deadline"),
        (503, "unavailable", "database"),
        (503, "unavailable", "queue_full"),
    }
    assert (503, "unavailable", "queue_full") in {reply.said for reply in quick}
    assert (503, "unavailable", "deadline") in {reply.said for reply in late}


# --- Probes ------------------------------------------------------------------------------------


def unready(metrics: deliveries.Metrics) -> set[str]:
    """Return why no deliveries are taken, by the metrics; which say of one thing the same twice."""
    reasons = ("database", "schema", "draining")
    found = {reason for reason in reasons if metrics("unready", reason=reason)}
    assert metrics("ready") == (not found)
    return found


async def test_missing_schema_is_live_and_not_ready_until_it_arrives(database_url: str) -> None:
    async with deliveries.serving(deliveries.settings_of(database_url)) as at:
        live, ready = await at.inside("/livez"), await at.inside("/readyz")
        assert (live.status, live.json) == (200, {"live": True})
        assert (ready.status, ready.json["ready"], ready.json["reason"]) == (503, False, "schema")
        assert "clerk-sync migrate" in ready.json["detail"]
        assert unready(await at.metrics()) == {"schema"}
        refused = await at.post(event("user.created", "user_a"))
        assert refused.said == (503, "unavailable", "schema")
        assert refused.headers["Retry-After"] == "5"
        assert (await at.inside("/profiles")).status == 503
        assert (await at.inside("/readyz")).json["reason"] == "schema"  # it made nothing itself
        environment = {
            **os.environ,
            "DATABASE_URL": database_url,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "clerk_sync", "migrate"],
            env=environment,
            check=True,
            capture_output=True,
        )
        assert (await at.until_ready()).json == {"ready": True}
        assert unready(await at.metrics()) == set()
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"


async def test_a_table_that_goes_while_it_serves_is_noticed(database_url: str) -> None:
    async with deliveries.served(database_url) as at:
        await rows(database_url, "DROP TABLE clerk_users")
        reply = await at.post(event("user.created", "user_a"))
        assert reply.said == (503, "unavailable", "schema")
        assert (await at.until_ready(ready=False)).json["reason"] == "schema"
        assert (await at.inside("/livez")).status == 200
        await deliveries.migrate(database_url)
        await at.until_ready()
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"


async def test_database_away_is_live_not_ready_and_back(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_away")
    async with deliveries.served(url) as at:
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"
        mysql_server.kill()
        begun = time.perf_counter()
        reply = await at.post(event("user.created", "user_b"))
        assert reply.said == (503, "unavailable", "database")
        assert reply.headers["Retry-After"] == "5"
        assert time.perf_counter() - begun < 1
        away = await at.until_ready(ready=False)
        assert away.json["reason"] == "database"
        assert (await at.inside("/livez")).status == 200
        assert (await at.inside("/profiles")).status == 503
        await asyncio.to_thread(mysql_server.start)
        await at.until_ready()
        await at.until_taken(event("user.created", "user_b"), seconds=2)
        assert len((await at.inside("/profiles")).json) == 2


async def test_a_frozen_database_holds_nobody_longer_than_the_deadline(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_frozen")
    async with deliveries.served(url, CLERK_SYNC_DEADLINE_SECONDS=1) as at:
        await at.post(event("user.created", "user_a"))
        mysql_server.freeze()
        begun = time.perf_counter()
        replies = await asyncio.gather(
            *(at.post(event("user.created", f"user_{n}")) for n in range(20)),
            *(at.inside("/profiles") for _ in range(10)),
            at.inside("/livez"),
        )
        assert time.perf_counter() - begun < 5
        assert [reply.status for reply in replies] == [503] * 30 + [200]
        await at.until_ready(ready=False)
        mysql_server.thaw()
        await at.until_ready()
        await at.until_taken(event("user.created", "user_b"), seconds=2)
        assert (await at.inside("/profiles")).status == 200


async def test_with_no_database_at_the_start_it_waits_for_one(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_later")
    await deliveries.migrate(url)
    mysql_server.kill()
    async with deliveries.serving(deliveries.settings_of(url)) as at:
        assert (await at.inside("/livez")).status == 200
        assert (await at.inside("/readyz")).json["reason"] == "database"
        assert (await at.post(event("user.created", "user_a"))).status == 503
        await asyncio.to_thread(mysql_server.start)
        await at.until_ready()
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"


# --- Metrics and the log -----------------------------------------------------------------------


async def test_metrics_speak_both_formats(at: At) -> None:
    plain = await at.inside("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain")
    assert "\nclerk_sync_received_total 0.0\n" in plain.text
    modern = await at.inside("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_every_series_is_there_from_the_start(at: At) -> None:
    metrics = await at.metrics()
    for type_ in (*catalog.TYPES, "clerk-sync.probe", "other"):
        for outcome in ("applied", "stale", "duplicate", "ignored", "quarantined"):
            assert metrics("outcomes_total", type=type_, outcome=outcome) == 0
    for reason in ("missing", "malformed", "wrong", "expired", "instance", "too_large"):
        assert metrics("rejected_total", reason=reason) == 0
    for reason in ("queue_full", "database", "schema", "deadline", "draining"):
        assert metrics("unavailable_total", reason=reason) == 0
    assert metrics("errors_total") == 0
    assert metrics("last_success_timestamp_seconds") == 0
    assert unready(metrics) == set()


async def test_each_outcome_moves_its_own_counters(at: At) -> None:
    first, version = new_id(), deliveries.now_ms()

    async def moved(post: Any) -> dict[str, float]:
        before = await at.metrics()
        await post
        after = await at.metrics()
        assert after("request_seconds_count") == before("request_seconds_count") + 1
        grown = after.grown_since(before)
        assert grown.pop("received") == 1
        return grown

    user = ours("user.created", "user_a", version=version)
    applied = {"outcomes{outcome=applied,type=user.created}": 1}
    assert await moved(at.post(user, svix_id=first)) == applied
    duplicate = {"outcomes{outcome=duplicate,type=user.created}": 1}
    assert await moved(at.post(user, svix_id=first)) == duplicate
    stale = {"outcomes{outcome=stale,type=user.updated}": 1}
    late = ours("user.updated", "user_a", version=version - 1)
    assert await moved(at.post(late)) == stale
    ignored = {"outcomes{outcome=ignored,type=other}": 1}
    assert await moved(at.post({**user, "type": "made.up"})) == ignored
    ignored = {"outcomes{outcome=ignored,type=sms.created}": 1}
    assert await moved(at.post(ours("sms.created", "sms_1"))) == ignored
    assert await moved(at.post(ours("user.updated", "user_a", username="x" * 300))) == {
        "outcomes{outcome=quarantined,type=user.updated}": 1,
        "quarantined{reason=too_long}": 1,
    }
    assert await moved(at.post(b"{}")) == {
        "outcomes{outcome=quarantined,type=other}": 1,
        "quarantined{reason=bad_envelope}": 1,
    }
    wrong = {"rejected{reason=wrong}": 1}
    assert await moved(at.post(user, secret=OTHER_SECRET)) == wrong
    path = {"rejected{reason=path}": 1}
    assert await moved(at.post(user, path="/else")) == path
    instance = {"rejected{reason=instance}": 1}
    assert await moved(at.post({**user, "instance_id": "ins_x"})) == instance


async def test_metrics_tell_age_batches_depth_and_last_success(at: At) -> None:
    before = await at.metrics()
    aged, svix_id = ours("user.created", "user_a", at_ms=deliveries.now_ms() - 7_000), new_id()
    await at.post(aged, svix_id=svix_id)
    after = await at.metrics()
    assert 7 <= after("event_age_seconds_sum") - before("event_age_seconds_sum") < 9
    assert after("event_age_seconds_count") == 1
    assert after("queue_limit") == 1000
    assert after("batch_events_count") == after("batch_events_sum") == 1
    assert after("apply_seconds_count") == 1
    assert 0 < after("apply_seconds_sum") < 1
    assert abs(after("last_success_timestamp_seconds") - time.time()) < 5
    assert after("queue_depth") == 0
    await at.post(ours("user.created", "user_b"), secret=OTHER_SECRET)
    last = await at.metrics()
    assert last("last_success_timestamp_seconds") == after("last_success_timestamp_seconds")
    await asyncio.gather(*(at.post(ours("user.created", f"user_{n}")) for n in range(40)))
    many = await at.metrics()
    assert many("batch_events_sum") == 41
    assert many("batch_events_count") < 41  # some shared a transaction
    assert (await at.post(aged, svix_id=svix_id)).outcome == "duplicate"
    assert (await at.metrics())("event_age_seconds_count") == 41


async def test_queue_depth_tells_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "held.db"
    async with deliveries.served(f"sqlite:///{path}") as at:
        await at.post(event("user.created", "user_0"))
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        held = [asyncio.create_task(at.post(event("user.created", "user_0")))]
        # The writer has to have this one, so that the others wait in the queue.
        await until(at.metrics, lambda metrics: metrics("received_total") >= 2)
        await asyncio.sleep(0.1)
        held += [
            asyncio.create_task(at.post(event("user.created", f"user_{n}"))) for n in range(1, 9)
        ]
        depth = await until(at.metrics, lambda metrics: metrics("queue_depth") > 0)
        assert depth("queue_depth") == 8
        holder.execute("ROLLBACK")
        holder.close()
        assert {(await one).outcome for one in held} == {"applied"}
        assert (await at.metrics())("queue_depth") == 0


async def test_one_line_of_json_tells_of_each_delivery(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    ids = [new_id() for _ in range(3)]
    async with deliveries.process(tmp_path, url, CLERK_INSTANCE_ID=INSTANCE) as (process, at):
        await at.until_ready()
        await at.post(ours("user.created", "user_a"), svix_id=ids[0])
        await at.post(ours("user.updated", "user_a", username="x" * 300), svix_id=ids[1])
        await at.post(ours("session.created", "sess_a"), svix_id=ids[2])
        await at.post(ours("user.created", "user_b"), secret=OTHER_SECRET)
        await at.request("GET", at.url + "/nowhere")
        lines = process.lines()
    told = [line for line in lines if line["event"] == "delivery"]
    for line in told:
        assert 0 <= line.pop("ms") < 5000
        assert line.pop("timestamp").endswith("Z")
        assert line.pop("level") == "info"
        assert line.pop("event") == "delivery"

    def line_of(*values: object) -> dict[str, object]:
        names = ("svix_id", "type", "clerk_id", "outcome", "reason", "status")
        return dict(zip(names, values, strict=True))

    assert told == [
        line_of(ids[0], "user.created", "user_a", "applied", None, 200),
        line_of(ids[1], "user.updated", "user_a", "quarantined", "too_long", 200),
        line_of(ids[2], "session.created", None, "ignored", None, 200),
        line_of(None, None, None, "rejected", "wrong", 401),
        line_of(None, None, None, "rejected", "path", 404),
    ]


def words_of(value: Any) -> set[str]:
    """Return every e-mail address and the like in it."""
    if isinstance(value, dict):
        return set().union(*(words_of(one) for one in value.values()))
    if isinstance(value, list):
        return set().union(*(words_of(one) for one in value))
    return {value} if isinstance(value, str) and "@" in value else set()


def private_posts() -> list[Any]:
    """Every type of Clerk's, types that are made up, and what a table or a parser refuses."""
    posts: list[Any] = []
    for number, type_ in enumerate(catalog.TYPES):
        one = event(type_, f"id_{number}")
        if not type_.endswith(".deleted"):
            one["data"] |= {"first_name": "SECRET name", "username": f"SECRET u{number}"}
        posts += [one, {**one, "type": type_ + ".made_up"}]
    changes: list[dict[str, Any]] = [
        {"username": "SECRET u0"},  # of another user: a duplicate key
        {"username": "SECRET" * 100},
        {"public_metadata": {"SECRET": "SECRET@x"}, "first_name": {"SECRET": 1}},
        {"first_name": "SECRET\x00name", "banned": "SECRET"},
        {"email_addresses": "SECRET@x"},
    ]
    posts += [event("user.created", "user_bad", **change) for change in changes]
    posts += [event("organization.created", "org_x", name="SECRET check")]
    return [*posts, b'{"SECRET": "SECRET@x"', b'"SECRET@x"', b'{"type": "SECRET@ x"}']


async def strange_requests(at: At) -> AsyncIterator[Reply]:
    """Requests that say something private where a log might repeat it."""
    yield await at.request("GET", at.url + "/SECRET@x?SECRET@x")
    strange = {"svix-id": "SECRET@x", "svix-timestamp": "SECRET", "svix-signature": "v1,SECRET"}
    yield await at.request("POST", at.url + PATH, headers=strange, data=b"SECRET")
    async with deliveries.raw(at) as broken:
        await broken.send(b"POST /SECRET@x HTTP/1.1\r\nSECRET@x\r\n\r\n")
        answer = await broken.reply()
        assert answer is not None
        assert answer.status == 400


async def test_nothing_private_leaks_anywhere(mysql_server: Managed, tmp_path: Path) -> None:
    """All types, all refusals, a database that goes, a wrong password: then grep everything."""
    url = mysql_server.create_database("clerk_sync_private")
    await deliveries.migrate(url)
    # A duplicate key, a constraint, a truncation: the server's messages quote people's data.
    await rows(url, "CREATE UNIQUE INDEX one_name ON clerk_users (username)")
    await rows(url, "ALTER TABLE clerk_organizations ADD CHECK (name <> 'SECRET check')")
    private = {SECRET, SECRET.removeprefix("whsec_"), "p@ss:w/rd", "p%40ss"}
    answers = []
    async with deliveries.process(tmp_path, url) as (process, at):
        await at.until_ready()
        for post in private_posts():
            private |= words_of(post)
            answers.append(await at.post(post))
            answers.append(await at.post(post, secret=OTHER_SECRET))
        answers += [reply async for reply in strange_requests(at)]
        mysql_server.kill()
        answers.append(await at.post(event("user.created", "user_c", first_name="SECRET name")))
        answers.append(await at.until_ready(ready=False))
        await asyncio.to_thread(mysql_server.start)
        await at.until_ready()
        outcomes = {reply.json.get("outcome") for reply in answers}
        assert outcomes >= {"applied", "ignored", "quarantined", "rejected", "unavailable"}
        metrics = await at.metrics()
        assert metrics("quarantined_total", reason="conflict") == 1
        assert metrics("quarantined_total", reason="refused") == 1
        assert metrics("errors_total") == 0
        answers.append(await at.inside("/metrics"))
        log = process.log
    wrong = url.replace("p%40ss%3Aw%2Frd", "SECRET-password")
    assert wrong != url
    async with deliveries.process(tmp_path, wrong) as (process, at):
        answers += [await at.inside("/readyz"), await at.inside("/profiles")]
        answers.append(await at.post(event("user.created", "user_d", first_name="SECRET name")))
        assert {reply.status for reply in answers[-3:]} == {503}
        process.signal(signal.SIGTERM)
        await process.ended(seconds=10)
        log += process.log
    shown = log + "".join(reply.text + repr(reply.headers) for reply in answers)
    assert len(private) > 20
    assert [word for word in sorted(private) if word in shown] == []
    assert "SECRET" not in shown


# --- The read side -----------------------------------------------------------------------------

TUTORIAL: Final = """
CREATE TABLE users (id INTEGER PRIMARY KEY {auto}, username VARCHAR(191) NOT NULL,
  tagline VARCHAR(191), display_name VARCHAR(191), img_url VARCHAR(400));
CREATE TABLE blocks (id INTEGER PRIMARY KEY {auto}, url VARCHAR(191),
  type INTEGER NOT NULL DEFAULT 0, user_id INTEGER NOT NULL, label VARCHAR(191))
"""


async def test_profiles_are_as_the_tutorials_function_gave_them(database_url: str) -> None:
    orbytal = loader.load("orbytal")
    auto = "" if database_url.startswith("sqlite") else "AUTO_INCREMENT"
    for ddl in TUTORIAL.split(";"):
        await rows(database_url, ddl.format(auto=auto))
    await rows(
        database_url, "INSERT INTO users (id, username, tagline) VALUES (7, 'ada', 'hi \u2615')"
    )
    await rows(database_url, "INSERT INTO blocks (url, user_id, label) VALUES ('u', 7, 'L')")
    async with deliveries.served(database_url, orbytal) as at:
        ada = event("user.updated", "user_a", username="ada", first_name="Ada", last_name="L.")
        assert (await at.post(ada)).outcome == "applied"
        found = (await at.inside("/profiles?username=ada")).json
        assert found == {
            "id": 7,
            "username": "ada",
            "tagline": "hi \u2615",
            "display_name": "Ada L.",
            "img_url": ada["data"]["image_url"],
            "clerk_id": "user_a",
            "blocks": [{"id": 1, "url": "u", "type": 0, "user_id": 7, "label": "L"}],
        }
        unknown = await at.inside("/profiles?username=nobody")
        assert (unknown.status, unknown.text) == (200, "null")
        assert (await at.inside("/profiles", params={"username": "' OR 1=1 -- "})).text == "null"
        assert (await at.inside("/profiles?username=")).text == "null"
        for number in range(40):
            name = f"name{number}"
            await at.post(event("user.created", f"user_{number}", username=name))
        listed = (await at.inside("/profiles")).json
        assert len(listed) == 30
        assert listed[0].keys() == found.keys() - {"blocks"} or listed[0] == found
        assert (await at.post(event("user.deleted", "user_a"))).outcome == "applied"
        assert (await at.inside("/profiles?username=ada")).text == "null"


MARKED: Final = """
tables:
  user:
    table: people
    create: true
    key: clerk_id
    columns:
      {name}: {{value: {value}, type: string(64)}}
      seen: {{value: last_sign_in_at, type: time}}
      extra: {{value: public_metadata, type: json}}
    on_delete: {{mark: gone_at}}
"""


async def test_profiles_hide_the_users_that_are_marked_deleted(database_url: str) -> None:
    marking = loader.read(MARKED.format(name="login", value="username"), source="test")
    async with deliveries.served(database_url, marking) as at:
        for name in ("ada", "bob"):
            seen: dict[str, Any] = {
                "last_sign_in_at": 1_700_000_000_123,
                "public_metadata": {"k": [1, None]},
            }
            await at.post(event("user.created", f"user_{name}", username=name, **seen))
        await at.post(event("user.deleted", "user_ada"))
        assert len(await rows(database_url, "SELECT * FROM people")) == 2
        assert (await at.inside("/profiles?username=ada")).text == "null"
        (bob,) = (await at.inside("/profiles")).json
        assert (await at.inside("/profiles?username=bob")).json == bob
        assert (bob["clerk_id"], bob["login"], bob["gone_at"]) == ("user_bob", "bob", None)
        assert bob["seen"].startswith("2023-11-14T22:13:20.123")
        extra = bob["extra"]
        assert (json.loads(extra) if isinstance(extra, str) else extra) == {"k": [1, None]}


async def test_profiles_give_back_half_a_character_of_the_apps_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    marking = loader.read(MARKED.format(name="login", value="username"), source="test")
    async with deliveries.served(url, marking) as at:
        await at.post(event("user.created", "user_ada", username="ada"))
        await rows(url, """UPDATE people SET extra = '"caf\u00e9 \\ud83d"'""")
        reply = await at.inside("/profiles?username=ada")
        assert reply.json["extra"] == "caf\u00e9 \ud83d"
        assert "caf\u00e9" in reply.text


async def test_profiles_without_a_username_column_are_a_400(tmp_path: Path) -> None:
    nameless = loader.read(MARKED.format(name="first", value="first_name"), source="test")
    async with deliveries.served(f"sqlite:///{tmp_path}/x.db", nameless) as at:
        reply = await at.inside("/profiles?username=ada")
        assert reply.status == 400
        assert "username" in reply.json["error"]
        assert (await at.inside("/profiles")).json == []


async def test_profiles_without_a_users_table_are_a_404(tmp_path: Path) -> None:
    text = MARKED.format(name="n", value="name").replace("user:", "organization:", 1)
    userless = loader.read(text.replace("last_sign_in_at", "created_at"), source="test")
    async with deliveries.served(f"sqlite:///{tmp_path}/x.db", userless) as at:
        reply = await at.inside("/profiles")
        assert (reply.status, "user" in reply.json["error"]) == (404, True)


# --- The end -----------------------------------------------------------------------------------


async def test_sigterm_under_load_loses_nothing_and_hangs_nobody(
    database_url: str, tmp_path: Path
) -> None:
    await deliveries.migrate(database_url)
    load = Load(deliveries.histories(400, 8))
    async with deliveries.process(tmp_path, database_url) as (process, at):
        await at.until_ready()
        running = asyncio.create_task(load.run(at))
        await until(lambda: _length(load.taken), lambda taken: taken > 200)
        process.signal(signal.SIGTERM)
        begun = time.perf_counter()
        await asyncio.sleep(0.01)
        if process.process.poll() is None:
            process.signal(signal.SIGTERM)
        assert await process.ended(seconds=8) == 0
        assert time.perf_counter() - begun < 5
        load.stopped = True
        await asyncio.wait_for(running, 5)
        events = [line["event"] for line in process.lines()]
    # An answer is a 200, or a 503 to one that came too late; or the door was closed already.
    assert set(load.statuses) <= {200, 503, None}
    assert load.slowest < 4
    assert events.index("draining") < events.index("stopped")
    assert events[-1] == "stopped"
    assert "internal_error" not in events
    await load.check(database_url)
    async with deliveries.process(tmp_path, database_url) as (_, at):
        await at.until_ready()
        load.waiting = load.waiting[:300]
        await load.sent_again(at)
        await load.check(database_url)


async def _length(items: Any) -> int:
    return len(items)


async def test_what_is_in_flight_is_committed_and_answered_while_it_drains(tmp_path: Path) -> None:
    """A writer that has to wait: the answers come when it is done, and then the process ends."""
    path = tmp_path / "held.db"
    url = f"sqlite:///{path}"
    await deliveries.migrate(url)
    async with deliveries.process(tmp_path, url) as (process, at):
        await at.until_ready()
        await at.post(event("user.created", "user_0"))
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        held = [asyncio.create_task(at.post(event("user.created", "user_0")))]
        # The writer has to have this one, so that the others wait in the queue.
        await until(at.metrics, lambda metrics: metrics("received_total") >= 2)
        await asyncio.sleep(0.1)
        held += [
            asyncio.create_task(at.post(event("user.created", f"user_{n}"))) for n in range(1, 9)
        ]
        async with deliveries.raw(at) as unfinished, deliveries.raw(at) as silent:
            body = deliveries.bytes_of(event("user.created", "user_slow"))
            whole = deliveries.request(body)
            await unfinished.send(whole[:-5])
            await until(
                at.metrics,
                lambda metrics: metrics("received_total") >= 11 and metrics("queue_depth") > 0,
            )
            process.signal(signal.SIGTERM)
            await at.until_ready(ready=False)
            draining = await at.inside("/readyz")
            assert draining.json["reason"] == "draining"
            assert (await at.inside("/livez")).status == 200
            assert unready(await at.metrics()) == {"draining"}
            assert await silent.rest(seconds=2) == b""  # an idle connection is closed at once
            assert not any(one.done() for one in held)
            await unfinished.send(whole[-5:])
            holder.execute("ROLLBACK")
            holder.close()
            assert {(await one).outcome for one in held} == {"applied"}
            late = await unfinished.reply()
            assert late is not None
            assert late.status in {200, 503}
            assert late.headers["connection"] == "close"
        assert await process.ended(seconds=5) == 0
    assert len(await deliveries.ledger(url)) == 10 + (late.status == 200)


async def test_a_sender_that_never_finishes_does_not_hold_up_the_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    quick = {"CLERK_SYNC_DEADLINE_SECONDS": "1"}
    async with deliveries.process(tmp_path, url, **quick) as (process, at):
        await at.until_ready()
        async with deliveries.raw(at) as dripping, deliveries.raw(at) as deaf:
            await dripping.send(deliveries.request(b"x" * 1000)[:-500])
            get = deliveries.request(b"", {}, start="GET / HTTP/1.1")
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined] # noqa: SLF001
            deaf.writer.write(get * 40_000)  # and reads none of the answers
            await asyncio.sleep(0.2)
            process.signal(signal.SIGTERM)
            assert await process.ended(seconds=8) == 0
            answer = await dripping.reply()
            assert answer is not None
            assert answer.said == (503, "unavailable", "deadline")


async def test_interrupt_ends_it_as_well(tmp_path: Path) -> None:
    async with deliveries.process(tmp_path, f"sqlite:///{tmp_path}/x.db") as (process, _):
        process.signal(signal.SIGINT)
        assert await process.ended(seconds=5) == 0
