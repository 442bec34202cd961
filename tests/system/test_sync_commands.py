"""reconcile and ensure, as people type them: what they say, what they change, how they exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from clerk_sync.cli import cli
from tests import clerk_api, deliveries
from tests.system.test_backfill import KEY, Site, people, site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.clerk_api import ClerkApi

NOTHING = "0 missing, 0 outdated, 0 drifted, 0 deleted; Clerk {0}, table {0}"


@pytest.fixture
def embedded_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/clerk-sync.db"


@asynccontextmanager
async def filled(api: ClerkApi, url: str, folder: Path) -> AsyncIterator[Site]:
    """Begin with tables that are in step, a while ago already."""
    async with site(api, url, folder) as here:
        assert (await here.run("backfill")).code == 0
        await here.rows("UPDATE clerk_sync_entities SET synced_at = '2026-01-01 00:00:00.000000'")
        yield here


async def first_names(here: Site) -> dict[str, str]:
    return dict(await here.rows("SELECT clerk_id, first_name FROM clerk_users"))


async def everything(here: Site) -> list[object]:
    """Return all that a dry run could have changed."""
    names = ("users", "organizations", "organization_memberships")
    tables = [f"clerk_{name}" for name in names]
    tables += [f"clerk_sync_{name}" for name in ("entities", "runs", "leases", "cursors")]
    return [sorted(map(repr, await here.rows(f"SELECT * FROM {table}"))) for table in tables]


async def drift(here: Site) -> None:
    """Let there be one user of each kind of drift, of whom webhooks did not tell."""
    here.api.put_user("user_new", first_name="New")
    here.api.update("user_00001", first_name="Secret")
    here.api.delete("user_00002")
    await here.rows("UPDATE clerk_users SET last_name = 'hers' WHERE clerk_id = 'user_00003'")


# reconcile


async def test_reconcile_mends_and_tells_by_its_exit_code(
    database_url: str, tmp_path: Path
) -> None:
    async with filled(people(8, 2, 9), database_url, tmp_path) as here:
        fine = await here.run("reconcile")
        assert (fine.code, fine.err) == (0, "")
        assert fine.out.splitlines() == [
            f"{kind}: {NOTHING.format(number)}"
            for kind, number in (("user", 8), ("organization", 2), ("organizationMembership", 9))
        ]
        await drift(here)
        mended = await here.run("reconcile")
        assert mended.code == 2, mended.err
        assert mended.out.splitlines()[0] == (
            "user: 1 missing, 1 outdated, 1 drifted, 1 deleted; Clerk 8, table 8"
        )
        await here.in_step()
        assert await first_names(here) == {
            one["id"]: one["first_name"] for one in here.api.users.values()
        }
        last_names = "SELECT last_name FROM clerk_users WHERE clerk_id = 'user_00003'"
        ((last_name,),) = await here.rows(last_names)
        assert last_name == here.api.users["user_00003"]["last_name"]
        again = await here.run("reconcile")
        assert (again.code, again.out) == (0, fine.out.replace("9, table 9", "8, table 8"))


async def test_a_dry_run_tells_and_writes_nothing(database_url: str, tmp_path: Path) -> None:
    async with filled(people(8, 2, 9), database_url, tmp_path) as here:
        await drift(here)
        before = await everything(here)
        looked = await here.run("reconcile", "--dry-run")
        assert (looked.code, looked.err) == (2, "")
        *told, users, organizations, memberships = looked.out.splitlines()
        user_lines = [line for line in told if line.startswith("user ")]
        assert sorted(user_lines) == [
            "user user_00001 outdated: first_name, full_name, updated_at",
            "user user_00002 deleted",
            "user user_00003 drifted: last_name",
            "user user_new missing",
        ]
        # Her memberships went with her, in Clerk.
        assert sorted(line for line in told if line not in user_lines) == [
            "organization org_00000 drifted: members_count",
            *(
                f"organizationMembership {clerk_id} deleted"
                for clerk_id in sorted(await here.ids("clerk_organization_memberships"))
                if clerk_id not in here.api.memberships
            ),
        ]
        assert users.startswith("user: 1 missing, 1 outdated, 1 drifted, 1 deleted; Clerk 8")
        assert organizations.startswith("organization: 0 missing, 0 outdated, 1 drifted, 0 deleted")
        assert memberships.startswith("organizationMembership: 0 missing, 0 outdated, 0 drifted, 1")
        assert "Secret" not in looked.out
        assert "hers" not in looked.out
        assert await everything(here) == before

        shown = await here.run("reconcile", "--dry-run", "--show-values")
        assert shown.code == 2
        assert "  first_name: 'name 1' -> 'Secret'\n" in shown.out
        assert "  last_name: 'hers' -> " in shown.out
        assert await everything(here) == before


async def test_show_values_is_for_looking_only(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(1), embedded_url, tmp_path) as here:
        done = await here.run("reconcile", "--show-values")
        assert (done.code, done.out) == (1, "")
        assert done.err == "clerk-sync: --show-values needs --dry-run\n"
        assert here.api.asked == []


async def test_a_cron_job_is_told_only_of_what_stays(embedded_url: str, tmp_path: Path) -> None:
    async with filled(people(3), embedded_url, tmp_path) as here:
        await drift(here)
        mended = await here.run("reconcile", "--mended-ok")
        assert (mended.code, mended.err) == (0, "")
        await here.in_step()
        here.api.put_user("user_long", first_name="x" * 300)
        assert (await here.run("reconcile", "--mended-ok")).code == 2
        refused = await here.run("reconcile", "--mended-ok", "--dry-run")
        assert (refused.code, refused.out) == (1, "")
        assert "--dry-run, which repairs nothing" in refused.err


async def test_the_breaker_keeps_what_is_too_much(embedded_url: str, tmp_path: Path) -> None:
    async with filled(people(100), embedded_url, tmp_path) as here:
        for number in range(12):
            here.api.delete(f"user_{number:05}")
        for arguments in ((), ("--dry-run",), ("--breaker", "12")):
            stopped = await here.run("reconcile", *arguments)
            assert stopped.code == 1, arguments
            assert stopped.err.startswith(
                "clerk-sync: 12 of 100 users are no longer in Clerk, which the deletion guard ("
                + ("12" if "--breaker" in arguments else "5")
            )
            assert "run it again with --breaker 100" in stopped.err
        assert len(await here.ids("clerk_users")) == 100
        by_setting = await here.run("reconcile", "--dry-run", CLERK_SYNC_BREAKER_PERCENT="50")
        assert by_setting.code == 2
        assert by_setting.out.count(" deleted\n") == 12
        done = await here.run("reconcile", "--breaker", "100")
        assert done.code == 2
        assert "12 deleted; Clerk 88, table 88" in done.out
        await here.in_step()


@pytest.mark.parametrize("percent", ["-1", "101", "much"])
def test_a_breaker_that_is_none(percent: str) -> None:
    done = CliRunner().invoke(cli, ["reconcile", "--breaker", percent])
    assert done.exit_code == 2
    assert "Invalid value for '--breaker'" in done.stderr


async def test_reconcile_tells_what_is_wrong(embedded_url: str, tmp_path: Path) -> None:
    async with filled(people(5), embedded_url, tmp_path) as here:
        here.api.delete("user_00001")
        for arguments in ((), ("--dry-run",)):
            wrong = await here.run("reconcile", *arguments, CLERK_SECRET_KEY="sk_live_hunter2")
            assert (wrong.code, wrong.out) == (1, "")
            assert wrong.err.startswith("clerk-sync: Clerk answers 401 to /v1/users/count: ")
            assert "hunter2" not in wrong.err
            without = await here.run("reconcile", *arguments, CLERK_SECRET_KEY="")
            assert (without.code, without.out) == (1, "")
            assert without.err.startswith("clerk-sync: CLERK_SECRET_KEY: is not set")
        assert len(await here.ids("clerk_users")) == 5
        assert await here.expires_ms() == 0


async def test_reconcile_cannot_write_all(embedded_url: str, tmp_path: Path) -> None:
    async with filled(people(5), embedded_url, tmp_path) as here:
        here.api.update("user_00001", first_name="x" * 300)
        done = await here.run("reconcile")
        assert done.code == 2
        assert "0 deleted, 1 that the table cannot store; Clerk 5" in done.out
        assert [line["clerk_id"] for line in done.logged("invalid_value")] == ["user_00001"]


async def test_counts_that_differ_are_no_success(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3, 3, 2), embedded_url, tmp_path) as here:
        here.api.lies["organization"] = clerk_api.Lies(count=lambda number: number + 1)
        doubt = "Clerk counts 4 organizations, `clerk_organizations` has 3 of them: "
        for arguments, code in (
            (("backfill",), 1),
            (("reconcile",), 2),
            (("reconcile", "--mended-ok"), 2),
            (("reconcile", "--dry-run"), 2),
        ):
            done = await here.run(*arguments)
            assert done.code == code, arguments
            assert f"clerk-sync: {doubt}" in done.err
            assert "Clerk 4, table 3" in done.out
        here.api.lies.clear()
        for arguments in (("backfill",), ("reconcile",), ("reconcile", "--dry-run")):
            assert (await here.run(*arguments)).code == 0
        await here.in_step()


async def test_rows_of_the_apps_own_are_told_and_left(embedded_url: str, tmp_path: Path) -> None:
    async with filled(people(3), embedded_url, tmp_path) as here:
        await here.rows("INSERT INTO clerk_users (clerk_id) VALUES ('admin'), ('root')")
        done = await here.run("reconcile")
        assert (done.code, done.err) == (0, "")
        assert "user: 2 unmanaged rows stay: their keys are not Clerk ids" in done.out
        assert {"admin", "root"} <= await here.ids("clerk_users")
        assert (await here.run("reconcile", "--dry-run")).code == 0


# ensure


async def test_ensure_writes_the_row_and_prints_it(database_url: str, tmp_path: Path) -> None:
    async with site(people(3), database_url, tmp_path) as here:
        done = await here.run("ensure", "user_00001")
        assert (done.code, done.err) == (0, "")
        row = json.loads(done.out)
        assert (row["clerk_id"], row["first_name"]) == ("user_00001", "name 1")
        assert done.out.count("\n") == 1
        assert await first_names(here) == {"user_00001": "name 1"}
        assert [asked.path for asked in here.api.asked] == ["/v1/users/user_00001"]


async def test_ensure_says_why_there_is_none(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3), embedded_url, tmp_path) as here:
        here.api.update("user_00002", first_name="x" * 300)
        unknown = await here.run("ensure", "user_nobody")
        assert (unknown.code, unknown.out) == (1, "")
        assert unknown.err == "clerk-sync: user_nobody: Clerk has no such user, or it was deleted\n"
        unfit = await here.run("ensure", "user_00002")
        assert (unfit.code, unfit.out) == (1, "")
        assert "clerk-sync: user_00002: quarantined: too_long\n" in unfit.err
        async with deliveries.served(embedded_url) as service:
            await service.post(deliveries.event("user.deleted", "user_00001"))
        deleted = await here.run("ensure", "user_00001")
        assert (deleted.code, deleted.out) == (1, "")
        assert "user_00001: Clerk has no such user, or it was deleted" in deleted.err
        wrong = await here.run("ensure", "user_00000", CLERK_SECRET_KEY="sk_live_hunter2")
        assert (wrong.code, wrong.out) == (1, "")
        assert wrong.err.startswith("clerk-sync: Clerk answers 401 to /v1/users/user_00000: ")
        assert "hunter2" not in wrong.err
        without = await here.run("ensure", "user_00000", CLERK_SECRET_KEY="")
        assert without.err.startswith("clerk-sync: CLERK_SECRET_KEY: is not set")
        assert await first_names(here) == {}
        here.api.faults.append(clerk_api.failing(200, body=b"{}", path="/v1/users/user_00000"))
        odd = await here.run("ensure", "user_00000")
        assert (odd.code, odd.out) == (1, "")


# The shell


def shell(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "clerk_sync", *arguments],
        cwd=folder,
        env=kept | {"PYTHONPATH": os.pathsep.join(sys.path), "CLERK_SECRET_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("arguments", [("backfill",), ("reconcile",), ("erase", "user_a")])
def test_who_named_no_database_is_told_which_one_it_was(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = shell(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "table clerk_sync_entities is missing" in done.stderr
    last = "DATABASE_URL: is not set, so this was sqlite:///clerk-sync.db of this folder\n"
    assert done.stderr.endswith(f"clerk-sync: {last}")


def test_help_lists_the_commands() -> None:
    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert {"backfill", "reconcile", "ensure", "erase"} <= listed
