"""The backfill, as a process of its own beside everything that may happen meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import multiprocessing.connection
import os
import pty
import re
import secrets
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa

from clerk_sync import app
from clerk_sync.clerk.api import PAGE_LIMIT
from clerk_sync.clerk.listing import OVERLAP
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.mapping import loader
from clerk_sync.sync.backfill import fingerprint
from tests import clerk_api, deliveries
from tests.waiting import until
from tests.walking import with_api
from tools import servers as database_servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from tests.clerk_api import Asked, ClerkApi
    from tests.conftest import Servers
    from tools.servers import Managed

# A thousand requests in ten seconds: nothing waits for its turn.
KEY: Final = "sk_live_bm90IHRvIGJlIHNlZW4gaW4gYW55IG91dHB1dA"
PATHS: Final = {
    "user": "/v1/users",
    "organization": "/v1/organizations",
    "organizationMembership": "/v1/organization_memberships",
}
TABLES: Final = ("clerk_users", "clerk_organizations", "clerk_organization_memberships")


# The command


def _main(
    arguments: tuple[str, ...], environment: dict[str, str], out: str, err: str
) -> None:  # in a process of its own
    os.environ.clear()
    os.environ.update(environment)
    # A shell that runs the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["clerk-sync", *arguments]
    from clerk_sync.cli import main  # noqa: PLC0415 -- only here it is looked at

    main()


# Each command is forked from a process that has imported all of it, which is most of a start.
_forks: Final = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        *("clerk_sync.cli", "clerk_sync.app", "clerk_sync.sync.reconcile", __name__, "tqdm"),
        *("uvloop", "sqlalchemy.dialects.mysql.asyncmy", "sqlalchemy.dialects.sqlite.aiosqlite"),
    ]
)


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, and what it said."""

    code: int
    out: str
    err: str

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of this event."""
        lines = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


class Command:
    """One command that runs."""

    def __init__(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        environment: dict[str, str],
        *,
        terminal: str | None = None,
    ) -> None:
        name = secrets.token_hex(4)
        self._out, self._err = folder / f"out-{name}", folder / f"err-{name}"
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self._process = _forks.Process(
            target=_main,
            args=(arguments, kept | environment, str(self._out), terminal or str(self._err)),
        )
        self._process.start()

    @property
    def said(self) -> str:
        """What it has written to stderr by now."""
        return self._err.read_text() if self._err.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, to whom it may not concern any more."""
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    async def ended(self, *, seconds: float = 30) -> Done:
        # Only this: what else asks how it is may be asked by one at a time.
        await asyncio.to_thread(multiprocessing.connection.wait, [self._process.sentinel], seconds)
        code = self._process.exitcode
        err = self._err.read_text() if self._err.exists() else ""
        assert code is not None, f"still running after {seconds} s:\n{err}"
        done = Done(code, self._out.read_text() if self._out.exists() else "", err)
        assert KEY not in done.out + done.err
        assert "Traceback" not in done.err, done.err
        return done

    def close(self) -> None:
        self._process.kill()
        self._process.join()


class Site:
    """One database and one Clerk, to run commands on."""

    def __init__(self, api: ClerkApi, url: str, folder: Path) -> None:
        self.api = api
        self.url = url
        self._folder = folder
        self._started: list[Command] = []

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "DATABASE_URL": self.url,
            "CLERK_SECRET_KEY": KEY,
            "CLERK_API_URL": f"{self.api.url}/v1",
            "CLERK_SYNC_CLERK_SHARE": "1",
            "LOG_FORMAT": "json",
            **more,
        }

    def start(self, *arguments: str, terminal: str | None = None, **environment: str) -> Command:
        environment = self.environment(**environment)
        command = Command(self._folder, arguments, environment, terminal=terminal)
        self._started.append(command)
        return command

    async def run(self, *arguments: str, seconds: float = 30, **environment: str) -> Done:
        return await self.start(*arguments, **environment).ended(seconds=seconds)

    def close(self) -> None:
        for command in self._started:
            command.close()

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = await deliveries.patiently(
            lambda: deliveries.rows(self.url, sql)
        )
        return found

    async def ids(self, table: str) -> set[str]:
        return {clerk_id for (clerk_id,) in await self.rows(f"SELECT clerk_id FROM {table}")}

    async def expires_ms(self) -> int:
        query = "SELECT expires_ms FROM clerk_sync_leases WHERE name = 'sync'"
        ((expires_ms,),) = await self.rows(query)
        return int(expires_ms)

    async def expire(self) -> None:
        """Let the lease of a process that was killed end now, instead of in 15 seconds."""
        await self.rows("UPDATE clerk_sync_leases SET expires_ms = 0")

    async def in_step(self) -> None:
        """Check that the tables have what Clerk has, by id, and the backfill knows its end."""
        api = self.api
        for table, objects in zip(
            TABLES, (api.users, api.organizations, api.memberships), strict=True
        ):
            assert await self.ids(table) == objects.keys(), table
        assert await self.rows("SELECT * FROM clerk_sync_cursors") == []
        assert await self.expires_ms() == 0


@asynccontextmanager
async def site(api: ClerkApi, url: str, folder: Path) -> AsyncIterator[Site]:
    """Serve this Clerk beside this database, which is migrated."""
    await deliveries.migrate(url)
    async with api.serving():
        made = Site(api, url, folder)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def embedded_url(tmp_path: Path) -> str:
    """Return the URL of a new, empty SQLite database: where it does not matter which it is."""
    return f"sqlite:///{tmp_path}/clerk-sync.db"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes many processes on SQLite and one server only."""
    if "crash_url" in metafunc.fixturenames:
        try:
            sources = database_servers.available()
        except database_servers.UnavailableError as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        metafunc.parametrize("crash_url", ["sqlite", sources[0].flavour], indirect=True)


@pytest.fixture
def crash_url(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/clerk-sync.db"
        return
    server = servers[request.param]
    name = f"clerk_sync_crash_{os.getpid()}_{secrets.token_hex(4)}"
    yield server.create_database(name)
    server.drop_database(name)


def people(users: int, organizations: int = 0, memberships: int = 0, **options: Any) -> ClerkApi:
    """Make a Clerk with so many objects, each of which may change."""
    api = clerk_api.ClerkApi(key=KEY, **options)
    samples = clerk_api.ClerkApi()
    samples.put_user("user_")
    samples.put_organization("org_")
    samples.put_membership("orgmem_", "user_", "org_")
    originals = samples.users | samples.organizations | samples.memberships
    begun = api.now_ms - 10 * max(users, memberships)

    def put(objects: dict[str, Any], prefix: str, number: int, **fields: Any) -> None:
        sample = originals[prefix]
        clerk_id = f"{prefix}{number:05}"
        times = dict.fromkeys(("created_at", "updated_at"), begun + 10 * number)
        objects[clerk_id] = {**sample, "id": clerk_id, **times, **fields}

    for number in range(users):
        put(api.users, "user_", number, first_name=f"name {number}", username=f"u{number}")
    for number in range(organizations):
        put(api.organizations, "org_", number, slug=f"slug-{number}")
    for number in range(memberships):
        ends = {"organization": {"id": f"org_{number // users:05}"}}
        ends["public_user_data"] = {"user_id": f"user_{number % users:05}"}
        put(api.memberships, "orgmem_", number, **ends)
    return api


def reached(api: ClerkApi, clerk_id: str) -> int:
    """Return the time after which a walk asks that has come to this user."""
    return int(api.users[clerk_id]["created_at"]) - 1


def at(time_ms: int | None) -> str | None:
    """Write a time of Clerk's as the tables hold it."""
    if time_ms is None:
        return None
    moment = datetime.fromtimestamp(time_ms / 1000, UTC).replace(tzinfo=None)
    return moment.isoformat(sep=" ", timespec="milliseconds")


def as_text(value: object) -> object:
    """SQLite gives times as text, others as times."""
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds")
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", value):
        return value[:-3]
    return value


# What it writes


async def test_all_that_clerk_has_is_written_once(database_url: str, tmp_path: Path) -> None:
    api = people(1_030, 3, 1_040)
    api.update("user_00007", first_name="Zoë 🦊", public_metadata={"plan": "pro"}, banned=True)
    async with site(api, database_url, tmp_path) as here:
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert done.out.splitlines() == [
            f"{kind}: read {n}, wrote {n}, unchanged 0, failed 0; Clerk {n}, table {n}"
            for kind, n in (
                ("user", 1_030),
                ("organization", 3),
                ("organizationMembership", 1_040),
            )
        ]
        await here.in_step()
        users = await here.rows(
            "SELECT clerk_id, username, first_name, banned, created_at, updated_at FROM clerk_users"
        )
        assert {tuple(map(as_text, row)) for row in users} == {
            (
                *(one[name] for name in ("id", "username", "first_name", "banned")),
                at(one["created_at"]),
                at(one["updated_at"]),
            )
            for one in api.users.values()
        }
        metadata = "SELECT public_metadata FROM clerk_users WHERE clerk_id = 'user_00007'"
        assert json.loads((await here.rows(metadata))[0][0]) == {"plan": "pro"}
        organizations = "SELECT clerk_id, slug, members_count FROM clerk_organizations"
        assert sorted(await here.rows(organizations)) == [
            ("org_00000", "slug-0", 1_030),
            ("org_00001", "slug-1", 10),
            ("org_00002", "slug-2", 0),
        ]
        memberships = (
            "SELECT clerk_id, user_id, organization_id, role FROM clerk_organization_memberships"
        )
        assert set(await here.rows(memberships)) == {
            (
                one["id"],
                one["public_user_data"]["user_id"],
                one["organization"]["id"],
                one["role"],
            )
            for one in api.memberships.values()
        }

        written = "SELECT kind, clerk_id, synced_at FROM clerk_sync_entities"
        before = sorted(await here.rows(written))
        assert len(before) == 1_030 + 3 + 1_040
        again = await here.run("backfill")
        assert again.code == 0
        assert again.out == re.sub(r"wrote (\d+), unchanged 0", r"wrote 0, unchanged \1", done.out)
        assert sorted(await here.rows(written)) == before


async def test_the_real_command_from_the_shell(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3), embedded_url, tmp_path) as here:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error::ResourceWarning", "-m", "clerk_sync", "backfill"],
            env=kept | here.environment(PYTHONPATH=os.pathsep.join(sys.path)),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("user: read 3, wrote 3, unchanged 0")
        await here.in_step()


async def test_beside_live_webhooks_what_is_newer_stays(database_url: str, tmp_path: Path) -> None:
    """Clerk's pages are on their way while its webhooks tell what they do not know yet."""
    api = people(1_020, 3, 1_030)
    async with (
        site(api, database_url, tmp_path) as here,
        deliveries.served(database_url) as service,
    ):

        async def tell(*events: deliveries.Event) -> None:
            for event in events:
                assert (await service.post(event)).outcome == "applied"

        async def in_page_1() -> None:
            await tell(
                api.update("user_00003", first_name="newer"),
                api.delete("user_00004"),
                api.put_user("user_late"),
            )

        async def in_page_2() -> None:
            await tell(
                # One whose page is committed already, one that is the cursor, one to come.
                api.update("user_00001", first_name="newest"),
                api.delete("user_00499"),
                api.delete("user_00600"),
                api.update("user_01019", first_name="early"),
            )

        async def in_organizations() -> None:
            await tell(api.update("org_00000", name="newer"), api.delete("org_00001"))

        async def in_memberships() -> None:
            await tell(api.update("orgmem_00005", role="org:owner"), api.delete("orgmem_00006"))

        api.before_send(1, in_page_1)
        api.before_send(2, in_page_2)
        # The first one of these paths counts.
        api.before_send(2, in_organizations, path=PATHS["organization"])
        api.before_send(2, in_memberships, path=PATHS["organizationMembership"])
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert len(api.events) == 11  # every hook was run
        await here.in_step()
        names = dict(await here.rows("SELECT clerk_id, first_name FROM clerk_users"))
        assert names == {one["id"]: one["first_name"] for one in api.users.values()}
        roles = dict(await here.rows("SELECT clerk_id, role FROM clerk_organization_memberships"))
        assert roles == {one["id"]: one["role"] for one in api.memberships.values()}
        (name,) = await here.rows(
            "SELECT name FROM clerk_organizations WHERE clerk_id = 'org_00000'"
        )
        assert name == ("newer",)
        # A webhook that comes late is still told what it is.
        late = deliveries.event("user.updated", "user_00004")
        assert (await service.post(late)).outcome == "stale"
        assert (await service.metrics())("errors_total") == 0


async def test_what_does_not_fit_is_told_and_the_rest_is_written(
    database_url: str, tmp_path: Path
) -> None:
    api = people(20, 1, 3)
    api.update("user_00003", first_name="x" * 300)
    api.update("orgmem_00001", role="r" * 300)
    api.users["user_00005"]["updated_at"] = "yesterday"
    async with site(api, database_url, tmp_path) as here:
        done = await here.run("backfill")
        assert done.code == 1
        assert "user: read 20, wrote 18, unchanged 0, failed 2" in (done.out)
        told = {line["clerk_id"]: line["reason"] for line in done.logged("invalid_value")}
        assert told == {
            "user_00003": "too_long",
            "user_00005": "bad_version",
            "orgmem_00001": "too_long",
        }
        assert "x" * 20 not in done.out + done.err
        assert len(await here.ids("clerk_users")) == 18
        assert await here.ids("clerk_organization_memberships") == {"orgmem_00000", "orgmem_00002"}
        # It is done all the same: the next one begins anew, and finds the rest once it fits.
        assert await here.rows("SELECT * FROM clerk_sync_cursors") == []
        for clerk_id in ("user_00003", "user_00005"):
            api.users[clerk_id] |= {"first_name": "short", "updated_at": api.now_ms}
        api.update("orgmem_00001", role="org:member")
        assert (await here.run("backfill")).code == 0
        await here.in_step()


async def test_who_comes_back_with_the_name_of_a_deleted_one_is_written(
    database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(
        """
tables:
  user:
    table: people
    create: true
    key: clerk_id
    columns:
      username: {value: username, type: string(64)}
    on_delete: {mark: deleted_at, set: {username: null}}
"""
    )
    api = people(3)
    name = api.users["user_00001"]["username"]
    async with site(api, database_url, tmp_path) as here:

        async def run(*arguments: str) -> int:
            return (await here.run(*arguments, CLERK_SYNC_CONFIG=str(file))).code

        assert await run("migrate") == 0
        await here.rows("CREATE UNIQUE INDEX people_username ON people (username)")
        assert await run("backfill") == 0
        api.delete("user_00001")
        assert await run("reconcile", "--mended-ok") == 0
        api.put_user("user_back", username=name)
        assert await run("backfill", "--restart") == 0
        found = await here.rows("SELECT clerk_id, username FROM people WHERE clerk_id <> 'x'")
        assert dict(found) == {
            "user_00000": api.users["user_00000"]["username"],
            "user_00001": None,
            "user_00002": api.users["user_00002"]["username"],
            "user_back": name,
        }


async def test_half_a_character_stops_no_walk(database_url: str, tmp_path: Path) -> None:
    """As a name is that was cut in the middle of an emoji."""
    api = people(20, 1, 3)
    api.users["user_00003"]["first_name"] = "cut \ud83d"
    api.users["user_00004"]["unsafe_metadata"] = {"cut \ud83d": "\ud83d"}
    api.users["user_00019"]["public_metadata"] = {"cut": "\ud83d"}
    async with site(api, database_url, tmp_path) as here:
        done = await here.run("backfill")
        assert (done.code, len(await here.ids("clerk_users"))) == (1, 18)
        told = {line["clerk_id"]: line["reason"] for line in done.logged("invalid_value")}
        assert told == {"user_00003": "wrong_type", "user_00019": "wrong_type"}
        for arguments in (("--dry-run", "--show-values"), ()):
            done = await here.run("reconcile", *arguments)
            assert done.code == 2, done.err
            assert {line["clerk_id"] for line in done.logged("invalid_value")} == told.keys()


async def test_an_instance_without_organizations(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3, organizations_enabled=False), embedded_url, tmp_path) as here:
        done = await here.run("backfill")
        assert done.code == 0, done.err
        switched_off = "skipped: organizations are disabled in this Clerk instance"
        assert done.out.splitlines()[1:] == [
            f"organization: {switched_off}",
            f"organizationMembership: {switched_off}",
        ]
        await here.in_step()


async def test_an_instance_with_nobody_in_it(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(0), embedded_url, tmp_path) as here:
        done = await here.run("backfill")
        assert (done.code, done.err) == (0, "")
        await here.in_step()


# Crashes


@dataclass(frozen=True)
class Cursor:
    kind: str
    from_ms: int | None
    to_ms: int | None
    after: str | None
    reached_ms: int | None
    seen: int
    finished: bool


async def cursors(here: Site) -> list[Cursor]:
    after = '"after"' if here.url.startswith("sqlite") else "`after`"
    found = await here.rows(
        f"SELECT kind, from_ms, to_ms, {after}, reached_ms, seen, finished FROM clerk_sync_cursors"
    )
    return [
        Cursor(kind, from_ms, to_ms, after, reached_ms, seen, bool(finished))
        for kind, from_ms, to_ms, after, reached_ms, seen, finished in found
    ]


def went_on(asked: Iterable[Asked], kept: list[Cursor]) -> None:
    """Check that no page was asked for which lies before what is kept as done."""
    pages = [one for one in asked if one.query.get("limit") == f"{PAGE_LIMIT}"]
    for cursor in kept:
        mine = [one for one in pages if one.path == PATHS[cursor.kind]]
        if cursor.kind == "user":
            before = None if cursor.to_ms is None else f"{cursor.to_ms}"
            mine = [one for one in mine if one.query.get("created_at_before") == before]
        if cursor.finished:
            assert mine == []
        elif mine and cursor.kind == "user" and cursor.reached_ms is not None:
            assert int(mine[0].query["created_at_after"]) + 1 >= cursor.reached_ms
        elif mine and cursor.kind != "user":
            first = min(int(one.query["offset"]) for one in mine)
            assert first >= max(0, cursor.seen - OVERLAP)


class Reaper:
    """Kills a command at each request that nobody was killed at before.

    Before it is looked up, before it is answered, and once all that came before is committed.
    """

    def __init__(self, here: Site, *, every: int = 1) -> None:
        self.deaths: list[tuple[str, str]] = []
        self._here = here
        self._every = every
        self._met: set[tuple[str, str]] = set()
        self._victim: Command | None = None
        self._dead = asyncio.Event()
        for path in (*PATHS.values(), "/v1/users/count"):
            for page in range(1, 400):
                here.api.before_read(page, lambda: self._meet("read"), path=path)
                here.api.before_send(page, lambda: self._meet("send"), path=path)

    def _meet(self, moment: str) -> object:
        if self._victim is None:
            return self._dead.wait()  # it gets nothing more
        asked = self._here.api.asked[-1]
        paged = asked.query.get("limit") == f"{PAGE_LIMIT}"
        moments = [moment] if moment == "read" or not paged else [moment, "committed"]
        for one in moments if paged or moment == "read" else []:
            place = asked.target, one
            if place not in self._met:
                self._met.add(place)
                if len(self._met) % self._every == 0:
                    return self._kill(self._victim, asked, one)
        return None

    async def _kill(self, victim: Command, asked: Asked, moment: str) -> None:
        self._victim = None
        if moment == "committed":
            await self._committed(asked)
        self.deaths.append((asked.target, moment))
        victim.signal(signal.SIGKILL)
        self._dead.set()

    async def _committed(self, asked: Asked) -> None:
        """Wait until the page before this one is."""
        after, offset = asked.query.get("created_at_after"), int(asked.query.get("offset", 0))

        async def look() -> list[Cursor]:
            return [one for one in await cursors(self._here) if PATHS[one.kind] == asked.path]

        def fine(seen: list[Cursor]) -> bool:
            if asked.path == PATHS["user"]:
                moments = [moment for one in seen for moment in (one.from_ms, one.reached_ms)]
                return after is None or int(after) + 1 in moments
            return not offset or any(one.seen > offset for one in seen)

        await until(look, fine, seconds=10)

    async def reap(self) -> Done:
        """Run the backfill until it is through."""
        here = self._here
        kept: list[Cursor] = []
        while True:
            mark = len(here.api.asked)
            self._dead.clear()
            self._victim = here.start("backfill")
            done = await self._victim.ended()
            went_on(here.api.asked[mark:], kept)
            if done.code != -signal.SIGKILL:
                return done
            kept = await cursors(here)
            await here.expire()


async def test_killed_at_every_step_it_goes_on_where_it_was(crash_url: str, tmp_path: Path) -> None:
    api = people(510, 2, 520)
    async with site(api, crash_url, tmp_path) as here:
        reaper = Reaper(here)
        done = await reaper.reap()
        assert done.code == 0, done.err
        assert done.out.startswith("resumed the backfill of 20")
        await here.in_step()
        deaths = {(re.sub(r"\d{13}", "…", target), moment) for target, moment in reaper.deaths}
        users = f"/v1/users?limit={PAGE_LIMIT}&order_by=%2Bcreated_at"
        groups = f"/v1/organizations?limit={PAGE_LIMIT}&offset"
        members = f"/v1/organization_memberships?limit={PAGE_LIMIT}&offset"
        for page in (
            *(users, f"{users}&created_at_after=…"),
            f"{groups}=0&order_by=%2Bcreated_at&include_members_count=true",
            *(f"{members}={offset}&order_by=%2Bcreated_at" for offset in (0, 480)),
        ):
            assert {(page, "read"), (page, "send"), (page, "committed")} <= deaths, page
        entities = await here.rows("SELECT kind, COUNT(*) FROM clerk_sync_entities GROUP BY kind")
        assert dict(entities) == {
            "user": 510,
            "organization": 2,
            "organizationMembership": 520,
        }


async def test_what_was_left_off_long_ago_begins_anew(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3), embedded_url, tmp_path) as here:
        await here.rows(
            "INSERT INTO clerk_sync_cursors (kind, part, seen, finished, begun_at, moved_at) VALUES"
            " ('user', 0, 3, 1, '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000')"
        )
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert "user: read 3, wrote 3" in done.out


async def test_killed_in_windows_each_goes_on_where_it_was(
    embedded_url: str, tmp_path: Path
) -> None:
    api = clerk_api.crowd(2_400, small=True, key=KEY)
    async with site(api, embedded_url, tmp_path) as here:
        # As a backfill of many more plans it.
        written = fingerprint(loader.load("mirror").tables["user"], api.instance_id)
        bounds = ["NULL", *(str(clerk_api.created_at(number)) for number in (600, 1200, 1800))]
        for number, (from_ms, to_ms) in enumerate(itertools.pairwise([*bounds, "NULL"])):
            await here.rows(
                "INSERT INTO clerk_sync_cursors (kind, part, from_ms, to_ms, seen, finished,"
                f" begun_at, moved_at, mapping) VALUES ('user', {number}, {from_ms}, {to_ms}, 0, 0,"
                f" datetime('now') || '.000000', datetime('now') || '.000000', '{written}')"
            )
        reaper = Reaper(here, every=6)
        done = await reaper.reap()
        assert done.code == 0, done.err
        assert len(reaper.deaths) >= 4
        assert "Clerk 2400, table 2400" in done.out
        assert len(await here.ids("clerk_users")) == 2_400
        windows = {one.query.get("created_at_before") for one in api.asked_for("/v1/users")}
        assert windows == {*bounds[1:], None}
        assert await cursors(here) == []


async def test_killed_between_rows_and_cursor_the_page_is_read_once_more(
    mysql_server: Managed, tmp_path: Path
) -> None:
    url = mysql_server.create_database("clerk_sync_between")
    api = people(510)
    async with site(api, url, tmp_path) as here:
        lock = None

        async def hold() -> None:
            nonlocal lock
            locking = "SELECT SLEEP(20) FROM clerk_sync_cursors WHERE kind = 'user' FOR UPDATE"
            lock = asyncio.create_task(deliveries.rows(url, locking))
            await asyncio.sleep(0.2)

        api.before_send(1, hold)
        first = here.start("backfill")
        await until(lambda: here.ids("clerk_users"), lambda ids: len(ids) >= 500, seconds=10)
        first.signal(signal.SIGKILL)
        await first.ended()
        # The cursor's way first: the server would still go it for a client that is no more.
        for way in ("UPDATE clerk_sync_cursors", "SELECT SLEEP"):
            waiting = f"SELECT id FROM information_schema.processlist WHERE info LIKE '{way}%'"
            for (number,) in mysql_server.execute(waiting):
                mysql_server.execute(f"KILL {number}")
        assert lock is not None
        await asyncio.wait([lock])
        lock.exception()
        assert [one.after for one in await cursors(here) if one.kind == "user"] == [None]
        await here.expire()
        done = await here.run("backfill")
        assert (done.code, done.err) == (0, "")
        assert "user: read 510, wrote 10, unchanged 500" in done.out
        await here.in_step()
    mysql_server.drop_database("clerk_sync_between")


@asynccontextmanager
async def held_at(here: Site, page: int, **how: Any) -> AsyncIterator[Callable[[], None]]:
    """Hold this page back until told to go on; within, the one who asks for it is waiting."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        reached.set()
        await go_on.wait()

    here.api.before_send(page, hold, **how)
    holding = asyncio.create_task(reached.wait())
    try:

        def release() -> None:
            go_on.set()

        yield release
    finally:
        holding.cancel()
        go_on.set()


async def asked_for_page(here: Site, number: int) -> None:
    """Wait until so many requests for users came, and what came before is committed."""

    async def look() -> tuple[int, list[int]]:
        seen = [one.seen for one in await cursors(here) if one.kind == "user"]
        return len(here.api.asked_for(PATHS["user"])), seen

    await until(
        look, lambda at: at[0] >= number and at[1] == [(number - 1) * PAGE_LIMIT], seconds=10
    )


async def test_the_lease_of_one_that_was_killed_is_waited_for(
    embedded_url: str, tmp_path: Path
) -> None:
    async with site(people(510), embedded_url, tmp_path) as here:
        async with held_at(here, 2):
            first = here.start("backfill")
            await asked_for_page(here, 2)
            first.signal(signal.SIGKILL)
            await first.ended()
        left = await here.expires_ms() - time.time() * 1000
        assert 9_000 < left < 16_000
        # As if it had been killed some seconds earlier.
        until_ms = time.time_ns() // 1_000_000 + 1_500
        await here.rows(f"UPDATE clerk_sync_leases SET expires_ms = {until_ms}")
        done = await here.run("backfill")
        assert time.time() * 1000 > until_ms
        assert done.code == 0, done.err
        assert "user: read 10, wrote 10" in done.out
        await here.in_step()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
async def test_told_to_stop_it_gives_its_lease_back(
    crash_url: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    async with site(people(510), crash_url, tmp_path) as here:
        async with held_at(here, 2):
            first = here.start("backfill")
            await asked_for_page(here, 2)
            begun = time.monotonic()
            first.signal(number)
            done = await first.ended(seconds=3)
            assert time.monotonic() - begun < 2
        assert (done.code, done.out, done.err) == (code, "", "")
        assert await here.expires_ms() == 0
        mark = len(here.api.asked)
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert done.out.startswith("resumed the backfill of 20")
        assert "user: read 10, wrote 10, unchanged 0" in done.out
        first_page = next(a for a in here.api.asked[mark:] if a.path == PATHS["user"])
        assert int(first_page.query["created_at_after"]) == reached(here.api, "user_00499")
        await here.in_step()


async def test_told_to_stop_while_clerk_lets_it_wait(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(3), embedded_url, tmp_path) as here:
        here.api.faults.append(clerk_api.too_many("60", path="/v1/users"))
        command = here.start("backfill")

        async def look() -> int:
            return len(here.api.asked)

        await until(look, bool)
        await asyncio.sleep(0.1)
        command.signal(signal.SIGTERM)
        assert (await command.ended(seconds=2)).code == 143
        assert await here.expires_ms() == 0


async def test_restart_begins_anew(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(510), embedded_url, tmp_path) as here:
        async with held_at(here, 2):
            first = here.start("backfill")
            await asked_for_page(here, 2)
            first.signal(signal.SIGTERM)
            await first.ended()
        mark = len(here.api.asked)
        done = await here.run("backfill", "--restart")
        assert done.code == 0, done.err
        assert done.out.startswith("user: read 510, wrote 10, unchanged 500")
        first_page = next(a for a in here.api.asked[mark:] if a.path == PATHS["user"])
        assert "created_at_after" not in first_page.query
        await here.in_step()


async def test_one_that_slept_through_its_lease_writes_nothing_more(
    crash_url: str, tmp_path: Path
) -> None:
    """Like a virtual machine that was frozen: it wakes up with a page that is old by now."""
    async with site(people(510), crash_url, tmp_path) as here:
        async with held_at(here, 2) as release:
            asleep = here.start("backfill")
            await asked_for_page(here, 2)
            asleep.signal(signal.SIGSTOP)
            await here.expire()
            done = await here.run("backfill")
            assert done.code == 0, done.err
            await here.in_step()
            # Gone, so that whoever writes it is seen.
            await here.rows("DELETE FROM clerk_users WHERE clerk_id > 'user_00500'")
            await here.rows("DELETE FROM clerk_sync_entities WHERE clerk_id > 'user_00500'")
            release()
            asleep.signal(signal.SIGCONT)
            done = await asleep.ended()
        assert done.code == 1
        assert len(await here.ids("clerk_users")) == 501
        assert await here.expires_ms() == 0
        # How the heir's run ended is not overwritten, and it is said what happened.
        assert await here.rows("SELECT result FROM clerk_sync_runs") == [("mended",)]
        assert "clerk-sync: another process has taken over the lease" in done.err


async def test_only_one_at_a_time_and_the_others_are_told_whose_turn_it_is(
    crash_url: str, tmp_path: Path
) -> None:
    async with site(people(510), crash_url, tmp_path) as here:
        async with held_at(here, 2):
            first = here.start("backfill")
            await asked_for_page(here, 2)
            asked = len(here.api.asked)
            others = [here.start("backfill"), here.start("reconcile")]
            ends = [asyncio.create_task(other.ended()) for other in others]
            while not all(end.done() for end in ends):
                # What the holder itself does every five seconds.
                await here.rows("UPDATE clerk_sync_leases SET expires_ms = expires_ms + 1")
                await asyncio.wait(ends, timeout=0.3)
            for done in await asyncio.gather(*ends):
                assert (done.code, done.out) == (1, "")
                assert re.fullmatch(
                    r"clerk-sync: backfill on .+ \(pid \d+\) is at work, .+ until "
                    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, .*\n",
                    done.err,
                )
            assert len(here.api.asked) == asked
            look = await here.run("reconcile", "--dry-run")  # that one changes nothing
            assert look.code == 2
        assert (await first.ended()).code == 0
        await here.in_step()


# What is away, and what is wrong


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_a_database_that_is_away_is_waited_for(
    mysql_server: Managed, tmp_path: Path, how: str
) -> None:
    url = mysql_server.create_database("clerk_sync_away")
    async with site(people(1_010, 1, 510), url, tmp_path) as here:

        async def away() -> None:
            # At once, while the page before this one is being written.
            if how == "freeze":
                mysql_server.freeze()
                await asyncio.sleep(1.5)
                mysql_server.thaw()
            else:
                await asyncio.to_thread(mysql_server.kill)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(mysql_server.start)

        here.api.before_send(2, away)
        done = await here.run("backfill")
        assert done.code == 0, done.err
        await here.in_step()
    mysql_server.drop_database("clerk_sync_away")


async def test_a_database_that_is_not_there_is_told_at_once_and_waited_for(tmp_path: Path) -> None:
    url = f"mysql://u:hunter2@127.0.0.1:{database_servers.free_port()}/db"
    api = people(1)
    async with api.serving():
        here = Site(api, url, tmp_path)
        command = here.start("backfill")

        async def said() -> str:
            return command.said

        await until(said, lambda text: "waiting_for_database" in text)
        command.signal(signal.SIGTERM)
        done = await command.ended(seconds=2)
        assert done.code == 143
        (told,) = done.logged("waiting_for_database")
        assert "Can't connect" in told["error"]
        assert told["seconds"] == 60
        assert "hunter2" not in done.err
        assert api.asked == []
        # For as long as later in a run.
        settings, mapping = with_api(url, api), loader.load("mirror")
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="Can't connect"):
            async with app.open_runs(settings, mapping, new_metrics(), patience=1):
                pass
        assert time.monotonic() - begun < 3


async def test_a_database_that_does_not_let_us_in_is_told_at_once(
    mysql_server: Managed, tmp_path: Path
) -> None:
    url = mysql_server.create_database("clerk_sync_denied")
    api = people(1)
    async with api.serving():
        mysql_server.execute("CREATE USER locked_out IDENTIFIED BY 'x' ACCOUNT LOCK")
        users = (_as(url, "nobody", None), _as(url, "locked_out", "x"))
        for wrong in (url.replace("clerk_sync_denied", "clerk_sync_none"), *users):
            done = await Site(api, wrong, tmp_path).run("backfill", seconds=10)
            assert (done.code, done.logged("waiting_for_database")) == (1, [])
    mysql_server.execute("DROP USER locked_out")
    mysql_server.drop_database("clerk_sync_denied")


def _as(url: str, user: str, password: str | None) -> str:
    whole = sa.make_url(url).set(username=user)
    whole = whole if password is None else whole.set(password=password)
    return whole.render_as_string(hide_password=False)


@pytest.mark.parametrize("moment", ["before", "lease"])
async def test_a_database_that_is_lost_at_the_start_is_waited_for(
    mysql_server: Managed, tmp_path: Path, moment: str
) -> None:
    url = mysql_server.create_database("clerk_sync_start")
    async with site(people(20, 1, 3), url, tmp_path) as here:
        if moment == "before":
            await asyncio.to_thread(mysql_server.kill)
        else:  # with the lease in hand, and nothing done

            async def away() -> None:
                await asyncio.to_thread(mysql_server.kill)
                await asyncio.sleep(1)
                await asyncio.to_thread(mysql_server.start)

            here.api.before_send(1, away, path="/v1/users/count")
        command = here.start("backfill")
        if moment == "before":
            await asyncio.sleep(1)
            await asyncio.to_thread(mysql_server.start)
        done = await command.ended()
        assert done.code == 0, done.err
        await here.in_step()
    mysql_server.drop_database("clerk_sync_start")


async def test_tables_that_are_not_there_are_told(embedded_url: str, tmp_path: Path) -> None:
    api = people(1)
    async with api.serving():
        done = await Site(api, embedded_url, tmp_path).run("backfill")
    assert done.code == 1
    assert "clerk-sync migrate" in done.err
    assert api.asked == []


@pytest.mark.parametrize("fault", ["reset", "truncated", "not_json", "500", "503"])
async def test_clerk_fails_now_and_then(embedded_url: str, tmp_path: Path, fault: str) -> None:
    async with site(people(510), embedded_url, tmp_path) as here:
        where: dict[str, Any] = {"path": "/v1/users", "query": "created_at_after"}
        kinds = {"reset": clerk_api.reset, "truncated": clerk_api.truncated}
        kinds["not_json"] = clerk_api.not_json
        make = kinds.get(fault)
        made = make(**where) if make else clerk_api.failing(int(fault), **where)
        here.api.faults.append(made)
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert here.api.faults == []
        await here.in_step()


async def test_clerk_fails_for_good(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(510), embedded_url, tmp_path) as here:
        refusal = clerk_api.failing(403, path="/v1/users", query="created_at_after", times=100)
        here.api.faults.append(refusal)
        done = await here.run("backfill")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("clerk-sync: Clerk answers 403 to /v1/users: Oops; copy the")
        assert done.err.count("\n") == 1
        assert await here.expires_ms() == 0
        here.api.faults.clear()
        done = await here.run("backfill")
        assert done.code == 0, done.err
        assert "user: read 10, wrote 10" in done.out
        await here.in_step()


async def test_what_is_not_clerk_is_told(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(1), embedded_url, tmp_path) as here:
        here.api.faults.append(clerk_api.failing(200, body=b"{}", path="/v1/users/count"))
        done = await here.run("backfill")
        assert done.code == 1
        assert done.err.startswith("clerk-sync: CLERK_API_URL: what answers there is not Clerk")


async def test_429_is_obeyed(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(510, 2, 3), embedded_url, tmp_path) as here:
        here.api.faults.append(clerk_api.too_many("1", path="/v1/users", query="created_at_after"))
        done = await here.run("backfill")
        assert done.code == 0, done.err
        (refused,) = [asked for asked in here.api.asked if asked.status == 429]
        later = [asked.at - refused.at for asked in here.api.asked if asked.at > refused.at]
        # What was on its way already may still come.
        assert all(seconds < 0.3 or seconds >= 1 for seconds in later)
        assert any(seconds >= 1 for seconds in later)
        await here.in_step()


async def test_it_stays_below_its_share_of_the_rate(embedded_url: str, tmp_path: Path) -> None:
    """Clerk takes 1000 requests in ten seconds; of these 12 are ours, and two do not come early."""
    async with site(people(3, 2, 2), embedded_url, tmp_path) as here:
        command = here.start("backfill", CLERK_SYNC_CLERK_SHARE="0.005")

        async def look() -> int:
            return len(here.api.asked)

        await until(look, lambda asked: asked >= 5)
        await asyncio.sleep(0.7)
        assert len(here.api.asked) == 5
        command.signal(signal.SIGTERM)
        assert (await command.ended(seconds=2)).code == 143


async def test_without_a_key_it_says_where_to_get_one(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(1), embedded_url, tmp_path) as here:
        done = await here.run("backfill", CLERK_SECRET_KEY="")
        assert (done.code, done.out) == (1, "")
        assert done.err == (
            "clerk-sync: CLERK_SECRET_KEY: is not set: copy a secret key (sk_…) from Clerk's "
            "dashboard, API keys; or set CLERK_SECRET_KEY_FILE to a file that holds it\n"
        )
        assert here.api.asked == []


async def test_a_wrong_key_is_told_and_not_shown(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(1), embedded_url, tmp_path) as here:
        done = await here.run("backfill", CLERK_SECRET_KEY="sk_live_hunter2")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("clerk-sync: Clerk answers 401 to /v1/users/count: The provided")
        assert "CLERK_SECRET_KEY" in done.err
        assert "hunter2" not in done.err
        assert len(here.api.asked) == 1
        assert await here.expires_ms() == 0


async def test_the_key_may_be_in_a_file(embedded_url: str, tmp_path: Path) -> None:
    async with site(people(1), embedded_url, tmp_path) as here:
        tmp_path.joinpath("key").write_text(f"{KEY}\n")
        path = str(tmp_path / "key")
        done = await here.run("backfill", CLERK_SECRET_KEY="", CLERK_SECRET_KEY_FILE=path)
        assert done.code == 0, done.err
        await here.in_step()


# What a person sees


async def test_a_terminal_has_a_bar_with_rate_and_time_left(
    embedded_url: str, tmp_path: Path
) -> None:
    async with site(people(1_510), embedded_url, tmp_path) as here:
        for page in (2, 3, 4):
            here.api.before_send(page, lambda: asyncio.sleep(0.15))
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        seen = b""

        def read() -> None:
            nonlocal seen
            seen += os.read(ours, 65536)

        loop = asyncio.get_running_loop()
        loop.add_reader(ours, read)
        try:
            command = here.start("backfill", terminal=os.ttyname(theirs))
            done = await command.ended()
            await asyncio.sleep(0.1)
        finally:
            loop.remove_reader(ours)
            os.close(ours)
            os.close(theirs)
        assert done.code == 0
        assert "wrote 1510" in done.out
        drawn = seen.decode()
        assert re.search(
            r" 66%\|█+\S* +\| 999/1\.51k \[00:0\d<00:0\d, [\d.]+k? objects/s, user\]", drawn
        ), drawn
        assert "100%|" in drawn
        assert KEY not in drawn
        assert "{" not in drawn  # no log line between
