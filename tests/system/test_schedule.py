"""`serve` that reconciles by itself: when, on which replica, and what its metrics say of it."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.settings import Secret
from tests import clerk_api, deliveries
from tests.deliveries import rows
from tests.system.test_backfill import KEY, Site, people, site
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.deliveries import At, Metrics

ENDINGS: Final = ("in_step", "mended", "unmended", "stopped", "failed")


@pytest.fixture
def embedded_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/clerk-sync.db"


@asynccontextmanager
async def replica(here: Site, interval: int | None = 1, **more: Any) -> AsyncIterator[At]:
    """Run the service in this process, with an interval in seconds."""
    options = {
        "CLERK_SECRET_KEY": Secret("CLERK_SECRET_KEY", value=KEY),
        "CLERK_API_URL": f"{here.api.url}/v1",
        "CLERK_SYNC_CLERK_SHARE": 1,
        "CLERK_SYNC_RECONCILE_INTERVAL": interval,
        **more,
    }
    async with deliveries.serving(deliveries.settings_of(here.url, **options)) as at:
        yield at


def ending(metrics: Metrics) -> str:
    """Return how the last reconcile ended by its metric, which names one at most."""
    (found,) = [one for one in ENDINGS if metrics("reconcile_result", result=one)] or [""]
    return found


async def ended(at: At, *, after: float = 0) -> Metrics:
    """Wait for the end of a reconcile after this time."""
    metrics: Metrics = await until(
        at.metrics,
        lambda seen: seen("reconcile_finished_timestamp_seconds") > after,
        seconds=15,
    )
    return metrics


def pages(here: Site) -> int:
    """Count the pages of users that were asked for: each reconcile here takes two."""
    return sum(asked.query.get("limit") == "500" for asked in here.api.asked_for("/v1/users"))


async def test_it_mends_by_itself_and_says_so(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(20, 2, 30), embedded_url, tmp_path) as here:
        release = asyncio.Event()
        here.api.before_read(1, release.wait)
        async with replica(here) as at:
            during = await until(at.metrics, lambda seen: seen("lease_held") == 1, seconds=15)
            assert ending(during) == ""
            release.set()
            first = await ended(at)
            assert ending(first) == "mended"
            assert abs(first("reconcile_finished_timestamp_seconds") - time.time()) < 2
            assert 0 < first("reconcile_seconds") < 10
            await here.in_step()
            for kind, number in (("user", 20), ("organization", 2), ("organizationMembership", 30)):
                assert first("reconcile_drift_entities", kind=kind, drift="missing") == number
                assert first("reconcile_drift_entities", kind=kind, drift="outdated") == 0

            second = await ended(at, after=first("reconcile_finished_timestamp_seconds"))
            assert ending(second) == "in_step"
            for kind, number in (("user", 20), ("organization", 2), ("organizationMembership", 30)):
                assert second("reconcile_drift_entities", kind=kind, drift="missing") == 0
                assert second("clerk_entities", kind=kind) == number
                assert second("table_entities", kind=kind) == number

            # What webhooks did not tell: one is new, one is other, one is gone, one was altered.
            before = second("reconcile_finished_timestamp_seconds")
            here.api.put_user("user_new")
            here.api.update("user_00001", first_name="other")
            here.api.delete("user_00002")
            altered = "UPDATE clerk_users SET first_name = 'altered' WHERE clerk_id = 'user_00003'"
            await rows(here.url, altered)
            while ending(third := await ended(at, after=before)) != "mended":
                before = third("reconcile_finished_timestamp_seconds")
            drift = {
                name: third("reconcile_drift_entities", kind="user", drift=name)
                for name in ("missing", "outdated", "drifted", "deleted")
            }
            assert drift in (
                {"missing": 1, "outdated": 1, "drifted": 1, "deleted": 1},
                # That one was altered while its page was on its way.
                {"missing": 1, "outdated": 1, "drifted": 0, "deleted": 1},
            )
            names = dict(await rows(here.url, "SELECT clerk_id, first_name FROM clerk_users"))
            assert names == {one["id"]: one["first_name"] for one in here.api.users.values()}

            last = await at.metrics()
            assert last("errors_total") == 0
            assert last("clerk_requests_total", status="200") > 20
            for status in ("429", "4xx", "5xx", "none", "other"):
                assert last("clerk_requests_total", status=status) == 0
            assert (await at.inside("/readyz")).status == 200
        answered = [asked for asked in here.api.asked if asked.status == 404]
        assert {asked.path for asked in answered} == {"/v1/users/user_00002"}
        assert await here.expires_ms() == 0


async def test_of_two_replicas_one_walks_and_both_tell(database_url: str, tmp_path: Path) -> None:
    async with site(people(5), database_url, tmp_path) as here:
        release = asyncio.Event()
        here.api.before_read(1, release.wait)
        async with replica(here) as one, replica(here) as two:

            async def held() -> float:
                return sum([(await at.metrics())("lease_held") for at in (one, two)])

            async def asked() -> int:
                return pages(here)

            await until(held, lambda seen: seen > 0, seconds=15)
            await until(asked, lambda seen: seen > 0, seconds=15)
            for _ in range(5):  # longer than both of their intervals
                await asyncio.sleep(0.3)
                assert await held() == 1
                assert pages(here) == 1
            release.set()
            first, second = await ended(one), await ended(two)
            for metrics in (first, second):
                assert ending(metrics) == "mended"
                assert metrics("reconcile_drift_entities", kind="user", drift="missing") == 5
            name = "reconcile_finished_timestamp_seconds"
            assert first(name) == second(name)
        await here.in_step()


async def test_one_that_died_in_the_middle_is_followed(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(5), embedded_url, tmp_path) as here:
        forever = asyncio.Event()
        here.api.before_read(1, forever.wait)
        environment = here.environment(CLERK_SYNC_RECONCILE_INTERVAL="1s")
        async with deliveries.process(tmp_path, **environment) as (process, at):
            await until(at.metrics, lambda _: pages(here) == 1, seconds=15)
            process.signal(signal.SIGKILL)
            await process.ended(seconds=5)
        await here.expire()  # instead of 15 seconds
        async with replica(here) as heir:
            assert ending(await ended(heir)) == "mended"
        forever.set()
        await here.in_step()


async def test_a_run_by_the_command_is_shown(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(12), embedded_url, tmp_path) as here:
        assert (await here.run("reconcile")).code == 2
        finished = time.time()
        asked = len(here.api.asked)
        # Also by a replica that has no interval, and one without a key.
        for key in (Secret("CLERK_SECRET_KEY", value=KEY), None):
            async with replica(here, None, CLERK_SECRET_KEY=key) as at:
                shown = await ended(at)
                assert ending(shown) == "mended"
                assert shown("reconcile_drift_entities", kind="user", drift="missing") == 12
                assert abs(shown("reconcile_finished_timestamp_seconds") - finished) < 3
                assert shown("lease_held") == 0
                assert shown("clerk_entities", kind="user") == 12
                assert shown("table_entities", kind="user") == 12
        assert len(here.api.asked) == asked  # what it counted is fresh


async def test_a_run_that_was_too_long_ago_is_no_reason_to_wait(
    embedded_url: str, tmp_path: Path
) -> None:
    """When the last one was is in the database: a restart neither forgets nor hurries it."""
    async with site(people(2), embedded_url, tmp_path) as here:
        assert (await here.run("reconcile")).code == 2
        seen = pages(here)
        async with replica(here, 3600) as at:
            await ended(at)
            await asyncio.sleep(0.5)
            assert pages(here) == seen
        await rows(here.url, "UPDATE clerk_sync_runs SET started_at = '2020-01-01 00:00:00.000000'")
        await rows(here.url, "UPDATE clerk_sync_runs SET finished_at = started_at")
        async with replica(here, 3600) as at:
            assert ending(await ended(at, after=time.time() - 60)) == "in_step"
        assert pages(here) == 2 * seen


def counts(metrics: Metrics) -> list[tuple[float, float]]:
    """Return what both sides count, by kind."""
    return [
        (metrics("clerk_entities", kind=kind), metrics("table_entities", kind=kind))
        for kind in ("user", "organization", "organizationMembership")
    ]


@pytest.mark.parametrize(
    ("result", "minutes", "again"),
    [("failed", 16, True), ("failed", 14, False), ("mended", 16, False), ("stopped", 16, False)],
)
async def test_one_that_failed_is_tried_again_before_its_time(
    embedded_url: str, tmp_path: Path, result: str, minutes: int, *, again: bool
) -> None:
    async with site(people(2), embedded_url, tmp_path) as here:
        then = f"STRFTIME('%Y-%m-%d %H:%M:%f', 'now', '-{minutes} minutes')"
        await rows(
            here.url,
            "INSERT INTO clerk_sync_runs (name, started_at, finished_at, result, report)"
            f" VALUES ('reconcile', {then}, {then}, '{result}', '{{}}')",
        )
        async with replica(here, 3600) as at:
            if again:
                assert ending(await ended(at, after=time.time() - 60)) == "mended"
            else:
                await ended(at)
                await asyncio.sleep(0.3)
                assert pages(here) == 0


async def test_without_a_key_nothing_is_asked_of_clerk(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(2), embedded_url, tmp_path) as here:
        async with replica(here, CLERK_SECRET_KEY=None) as at:
            await at.until_ready()
            await asyncio.sleep(1.6)
            metrics = await at.metrics()
        assert here.api.asked == []
        assert ending(metrics) == ""
        assert metrics("reconcile_finished_timestamp_seconds") == 0
        assert counts(metrics) == [(0, 0)] * 3
        assert await rows(here.url, "SELECT * FROM clerk_sync_runs") == []


async def test_without_an_interval_one_of_all_counts_and_all_tell(
    database_url: str, tmp_path: Path
) -> None:
    async with site(people(9, 2, 12), database_url, tmp_path) as here:
        assert (await here.run("reconcile")).code == 2
        await rows(here.url, "DELETE FROM clerk_users WHERE clerk_id = 'user_00003'")
        here.api.put_user("user_new")
        await rows(here.url, "DELETE FROM clerk_sync_runs")
        here.api.asked.clear()
        seen = [(10, 8), (2, 2), (12, 12)]
        async with replica(here, None) as one, replica(here, None) as two:

            async def both() -> list[list[tuple[float, float]]]:
                return [counts(await at.metrics()) for at in (one, two)]

            await until(both, lambda found: seen in found)
            assert ending(await one.metrics()) == ""
        async with replica(here, None) as later:
            shown = await until(later.metrics, lambda found: counts(found)[0] != (0, 0))
            assert counts(shown) == seen
        # Each kind once, by whichever was first; and nothing else is asked, or written.
        assert len(here.api.asked) == 3
        assert [name for (name,) in await rows(here.url, "SELECT name FROM clerk_sync_runs")] == [
            "count"
        ]
        # Five minutes later it is time again, and Clerk is away: what is known stays.
        for column in ("started_at", "finished_at"):
            old = f"UPDATE clerk_sync_runs SET {column} = '2020-01-01 00:00:00.000000'"
            await rows(here.url, old)
        here.api.faults.append(clerk_api.failing(403, path="/v1/", times=1000))
        async with replica(here, None) as at:
            await until(at.metrics, lambda found: found("clerk_requests_total", status="4xx") > 0)
            assert counts(await at.metrics()) == seen
            assert (await at.inside("/readyz")).status == 200


async def test_clerk_is_away_and_comes_back(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(5), embedded_url, tmp_path) as here:
        here.api.faults.append(clerk_api.failing(403, path="/v1/", times=1000))
        environment = here.environment(CLERK_SYNC_RECONCILE_INTERVAL="1s")
        async with deliveries.process(tmp_path, **environment) as (process, at):
            first = await ended(at)
            assert ending(first) == "failed"
            again = await ended(at, after=first("reconcile_finished_timestamp_seconds"))
            assert ending(again) == "failed"
            assert again("clerk_requests_total", status="4xx") >= 2
            assert (await at.inside("/readyz")).status == 200
            taken = await at.post(deliveries.event("user.created", "user_live"))
            assert taken.outcome == "applied"
            (failed, *_) = [one for one in process.lines() if one["event"] == "reconcile_failed"]
            assert failed["error"].startswith("Clerk answers 403 to /v1/users/count: Oops")
            assert failed["level"] == "error"

            here.api.put_user("user_live")
            here.api.faults.clear()
            await until(at.metrics, lambda seen: ending(seen) != "failed")
            assert ending(await at.metrics()) in ("mended", "in_step")
            assert KEY not in process.log
            assert "Traceback" not in process.log
        assert await here.ids("clerk_users") == here.api.users.keys()


async def test_too_much_is_gone_and_nothing_is_deleted(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(30), embedded_url, tmp_path) as here:
        assert (await here.run("backfill")).code == 0
        for number in range(12):
            here.api.delete(f"user_{number:05}")
        async with replica(here) as at:
            assert ending(await ended(at)) == "stopped"
            assert len(await here.ids("clerk_users")) == 30
            assert (await at.inside("/readyz")).status == 200
        async with replica(here, CLERK_SYNC_BREAKER_PERCENT=100) as at:
            await until(at.metrics, lambda seen: ending(seen) in ("mended", "in_step"), seconds=15)
        assert await here.ids("clerk_users") == here.api.users.keys()


async def test_told_to_stop_while_it_reconciles(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(5), embedded_url, tmp_path) as here:
        forever = asyncio.Event()
        here.api.before_read(1, forever.wait)
        environment = here.environment(CLERK_SYNC_RECONCILE_INTERVAL="1s")
        async with deliveries.process(tmp_path, **environment) as (process, at):
            await until(at.metrics, lambda m: m("lease_held") == 1, seconds=15)
            begun = time.monotonic()
            process.signal(signal.SIGTERM)
            assert await process.ended(seconds=5) == 0
            assert time.monotonic() - begun < 3
            assert process.lines()[-1]["event"] == "stopped"
            assert "Traceback" not in process.log
        assert await here.expires_ms() == 0
        forever.set()
        stopped = time.time()
        async with replica(here) as at:
            assert ending(await ended(at, after=stopped)) == "mended"
        await here.in_step()
