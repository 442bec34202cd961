"""What crashes in the middle of everything: the service, the database, both at their busiest.

After each: what was answered 2xx is in the tables and the ledger; all else, sent again, ends there.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests import deliveries
from tests.deliveries import Load, event, patiently, rows
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tools.servers import Managed

USERS, TURNS = 120, 12


async def taken(load: Load, count: int) -> None:
    async def look() -> int:
        return len(load.taken)

    await until(look, lambda seen: seen >= count, seconds=20)


async def whole(load: Load, url: str) -> None:
    """Check that all of the histories is there, each event once."""
    await load.check(url)
    assert not load.untaken
    assert set(await deliveries.ledger(url)) == set(load.taken)
    assert await deliveries.turns(url) == {sent.clerk_id: TURNS - 1 for sent in load.taken.values()}


async def test_service_killed_under_load(mysql_server: Managed, tmp_path: Path) -> None:
    url = mysql_server.create_database("clerk_sync_killed")
    await deliveries.migrate(url)
    load = Load(deliveries.histories(USERS, TURNS))
    for goal in (150, 450):
        async with deliveries.process(tmp_path, url) as (process, at):
            await at.until_ready()
            load.stopped = False
            running = asyncio.create_task(load.run(at))
            await taken(load, goal)
            process.signal(signal.SIGKILL)
            load.stopped = True
            await asyncio.wait_for(running, 5)
        assert load.untaken
        await load.check(url)
    async with deliveries.process(tmp_path, url) as (_, at):
        await at.until_ready()
        await load.sent_again(at)
        assert (await at.metrics())("errors_total") == 0
    assert set(load.statuses) <= {200, None}
    await whole(load, url)


async def test_database_killed_and_started_under_load(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_crashed")
    load = Load(deliveries.histories(USERS, TURNS))
    async with deliveries.served(url) as at:
        running = asyncio.create_task(load.run(at))
        await taken(load, 200)
        await asyncio.to_thread(mysql_server.kill)
        await asyncio.sleep(0.3)
        before = len(load.taken)
        await asyncio.to_thread(mysql_server.start)
        await at.until_ready()
        load.waiting, load.untaken = [*load.untaken, *load.waiting], []
        await asyncio.wait_for(running, 30)
        await load.check(url)
        await load.sent_again(at)
        assert len(load.taken) > before
        assert (await at.metrics())("errors_total") == 0
    assert set(load.statuses) == {200, 503}
    assert load.slowest < 4  # its deadline, and a little
    await whole(load, url)


async def test_frozen_database_under_load(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_stopped")
    load = Load(deliveries.histories(USERS, TURNS))
    async with deliveries.served(url, CLERK_SYNC_DEADLINE_SECONDS=1) as at:
        running = asyncio.create_task(load.run(at))
        await taken(load, 200)
        mysql_server.freeze()
        await asyncio.sleep(1.5)
        mysql_server.thaw()
        await asyncio.wait_for(running, 30)
        await load.sent_again(at)
        assert (await at.metrics())("errors_total") == 0
    assert set(load.statuses) == {200, 503}
    assert load.slowest < 2
    await whole(load, url)


async def test_connections_killed_under_load_cost_nothing(mysql_server: Managed) -> None:
    """As a proxy or an administrator does: the service connects anew, and nobody notices."""
    url = mysql_server.create_database("clerk_sync_cut")
    load = Load(deliveries.histories(USERS, TURNS))
    async with deliveries.served(url) as at:
        running = asyncio.create_task(load.run(at))
        for goal in (100, 400, 700):
            await taken(load, goal)
            await asyncio.to_thread(cut_connections, mysql_server, "clerk_sync_cut")
        await asyncio.wait_for(running, 30)
        assert (await at.metrics())("errors_total") == 0
    assert set(load.statuses) == {200}
    await whole(load, url)


def cut_connections(server: Managed, database: str) -> None:
    found = server.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{database}'")
    assert found
    for (number,) in found:
        try:
            server.execute(f"KILL {number}")
        except Exception as error:  # noqa: BLE001 -- it may have ended by itself
            assert "1094" in str(error)  # noqa: PT017


async def test_an_idle_connection_that_was_cut_costs_no_event(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_idle")
    async with deliveries.served(url) as at:
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"
        await asyncio.to_thread(cut_connections, mysql_server, "clerk_sync_idle")
        for turn in range(4):
            made = event("user.updated", "user_a", first_name=f"turn {turn}")
            assert (await at.post(made)).outcome == "applied"
            assert (await at.inside("/profiles")).status == 200


async def test_a_locked_row_costs_its_own_events_only_a_retry(mysql_server: Managed) -> None:
    """The app holds a lock on a user's row: others get through, and it is in time afterwards."""
    url = mysql_server.create_database("clerk_sync_locks")
    async with deliveries.served(url, CLERK_SYNC_DEADLINE_SECONDS=2) as at:
        await at.post(event("user.created", "user_held"))
        holder: Callable[..., Any] = mysql_server.execute
        lock = asyncio.create_task(
            asyncio.to_thread(
                holder,
                "SELECT SLEEP(1.2) FROM clerk_sync_locks.clerk_users"
                " WHERE clerk_id = 'user_held' FOR UPDATE",
            )
        )
        await asyncio.sleep(0.2)
        begun = time.perf_counter()
        held = asyncio.create_task(at.post(event("user.updated", "user_held")))
        await asyncio.sleep(0.1)
        others = [await at.post(event("user.created", f"user_{n}")) for n in range(5)]
        assert time.perf_counter() - begun < 0.9
        assert {reply.outcome for reply in others} == {"applied"}
        assert (await held).outcome == "applied"
        await lock


async def test_two_services_give_each_event_one_effect(database_url: str, tmp_path: Path) -> None:
    """Both get every event, shuffled and some twice, at the same time."""
    await deliveries.migrate(database_url)
    sent = deliveries.histories(40, 5)
    gone = [
        deliveries.Sent(deliveries.new_id(), one.clerk_id, 9, event("user.deleted", one.clerk_id))
        for one in sent[:10]
    ]
    async with (
        deliveries.process(tmp_path, database_url) as (_, one),
        deliveries.process(tmp_path, database_url) as (_, two),
    ):
        loads = []
        for seed, at in enumerate((one, two)):
            await at.until_ready()
            mixed = [*sent, *gone, *random.Random(seed).sample(sent, 50)]
            random.Random(seed + 7).shuffle(mixed)
            loads.append(Load(mixed))
        await asyncio.gather(loads[0].run(one, posters=16), loads[1].run(two, posters=16))
        for load, at in zip(loads, (one, two), strict=True):
            await load.sent_again(at)
        effects: Counter[str] = Counter()
        for at in (one, two):
            metrics = await at.metrics()
            assert metrics("errors_total") == 0
            for type_ in ("user.created", "user.updated", "user.deleted"):
                for outcome in ("applied", "stale", "duplicate"):
                    effects[outcome] += int(metrics("outcomes_total", type=type_, outcome=outcome))
    recorded = await deliveries.ledger(database_url)
    assert recorded.keys() == {one.svix_id for one in [*sent, *gone]}
    # Once applied or stale, and a duplicate each other time, over both services together.
    assert Counter(recorded.values()) == {
        outcome: effects[outcome] for outcome in ("applied", "stale")
    }
    assert sum(effects.values()) == 2 * (len(sent) + len(gone) + 50)
    deleted = {one.clerk_id for one in gone}
    expected = {one.clerk_id: 4 for one in sent if one.clerk_id not in deleted}
    assert await patiently(lambda: deliveries.turns(database_url)) == expected
    tombs = "SELECT clerk_id FROM clerk_sync_entities WHERE deleted_at IS NOT NULL"
    assert {clerk_id for (clerk_id,) in await rows(database_url, tombs)} == deleted
