"""Trouble as the person on call meets it: what is said, who is hurt, and that it passes."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from clerk_sync.clerk import signature
from clerk_sync.cli import check, cli, probe
from clerk_sync.http import connections
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, SECRET, rows, served, serving, settings_of
from tools import servers

if TYPE_CHECKING:
    from pathlib import Path

    from tools.servers import Managed


PLAIN: Final = "plain"


def login_of(server: Managed, name: str, *, may: str) -> str:
    """Return the URL of a user who has these rights on the database and no others."""
    server.execute(f"DROP USER IF EXISTS {name}")
    server.execute(f"CREATE USER {name} IDENTIFIED BY '{PLAIN}'")
    server.execute(f"GRANT {may} ON {name}.* TO {name}")
    return servers.url_of((name, PLAIN), server.host, server.port, name)


async def found_by_check(url: str) -> list[str]:
    """Return what `clerk-sync check` finds wrong."""
    looked = check.findings(settings_of(url), [], [])
    return [str(one) async for one in looked if one.verdict == "FAIL"]


@pytest.mark.parametrize("lacking", ["INSERT", "UPDATE", "DELETE"])
async def test_check_finds_a_right_that_serving_needs_and_its_user_lacks(
    mysql_server: Managed, lacking: str
) -> None:
    name = "clerk_sync_rights"
    await deliveries.migrate(mysql_server.create_database(name))
    rights = [right for right in ("SELECT", "INSERT", "UPDATE", "DELETE") if right != lacking]
    (found,) = await found_by_check(login_of(mysql_server, name, may=", ".join(rights)))
    assert f"{lacking} command denied" in found
    assert "needs the privileges SELECT, INSERT, UPDATE, DELETE" in found
    mysql_server.execute(f"DROP USER {name}")


@pytest.mark.parametrize("lacking", ["INSERT", "DELETE"])
async def test_check_finds_a_right_that_is_missing_for_one_table(
    mysql_server: Managed, lacking: str
) -> None:
    name = "clerk_sync_table_rights"
    await deliveries.migrate(mysql_server.create_database(name))
    rights = [right for right in ("SELECT", "INSERT", "UPDATE", "DELETE") if right != lacking]
    url = login_of(mysql_server, name, may=", ".join(rights))
    for (table,) in mysql_server.execute("SHOW TABLES", name):
        if table != "clerk_users":
            mysql_server.execute(f"GRANT {lacking} ON {name}.{table} TO {name}")
    (found,) = await found_by_check(url)
    assert f"FAIL database  mysql 127.0.0.1:{mysql_server.port}/{name}: `clerk_users`: " in found
    assert f"{lacking} command denied" in found
    mysql_server.execute(f"DROP USER {name}")


async def test_a_migration_that_may_not_says_what_it_lacks_and_where(mysql_server: Managed) -> None:
    name = "clerk_sync_ddl"
    mysql_server.create_database(name)
    url = login_of(mysql_server, name, may="SELECT, INSERT, UPDATE, DELETE")
    address = f"clerk-sync: mysql {mysql_server.host}:{mysql_server.port}/{name}: "
    for wrong, told in (
        ({}, "`migrate` CREATE, ALTER, INDEX as well; `clerk-sync migrate --print` prints"),
        ({"DATABASE_URL": url.replace(PLAIN, "other")}, "the password is wrong"),
        ({"DATABASE_URL": f"{url}?tls=verify"}, "or DATABASE_TLS_CA; if TLS is not meant"),
    ):
        environment = {"DATABASE_URL": url, **wrong}
        done = await asyncio.to_thread(CliRunner().invoke, cli, ["migrate"], env=environment)
        assert done.exit_code == 1
        assert done.stderr.startswith(address), done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    mysql_server.execute(f"DROP USER {name}")


async def test_a_server_that_turned_read_only_is_not_ready_until_it_is_writable(
    mysql_server: Managed,
) -> None:
    name = "clerk_sync_failover"
    await deliveries.migrate(mysql_server.create_database(name))
    url = login_of(mysql_server, name, may="SELECT, INSERT, UPDATE, DELETE")
    async with serving(settings_of(url)) as at:
        await at.until_ready()
        assert (await at.post(deliveries.event("user.created", "user_a"))).status == 200
        mysql_server.execute("SET GLOBAL read_only = 1")
        try:
            reply = await at.post(deliveries.event("user.updated", "user_a"))
            assert reply.said == (503, "unavailable", "database")
            signers = signature.signers(SECRET)
            probed = await probe.send(probe.address(at.url + PATH), signers, seconds=1)
            assert "is down, or accepts no writes" in probed.text
            unready = await at.until_ready(ready=False)
            assert "has to lead to the primary" in unready.json["detail"]
            (found,) = await found_by_check(url)
            assert "has to lead to the primary" in found
        finally:
            mysql_server.execute("SET GLOBAL read_only = 0")
        await at.until_ready()
        assert (await at.post(deliveries.event("user.updated", "user_a"))).status == 200
    mysql_server.execute(f"DROP USER {name}")


@pytest.mark.past_vitess
async def test_one_table_s_broken_trigger_stops_no_other_table(database_url: str) -> None:
    async with served(database_url) as at:
        trigger = (
            "CREATE TRIGGER broken BEFORE INSERT ON clerk_organizations FOR EACH ROW {}"
            " INSERT INTO no_such_table VALUES (1){}"
        )
        sqlite = database_url.startswith("sqlite")
        await rows(database_url, trigger.format(*(("BEGIN", "; END") if sqlite else ("", ""))))
        replies = await asyncio.gather(
            at.post(deliveries.event("organization.created", "org_1")),
            *(at.post(deliveries.event("user.created", f"user_{n}")) for n in range(20)),
        )
        assert replies[0].said == (503, "unavailable", "schema")
        assert {reply.said for reply in replies[1:]} == {(200, "applied", None)}
        await at.until_ready()
        await rows(database_url, "DROP TRIGGER broken")
        assert (await at.post(deliveries.event("organization.created", "org_1"))).status == 200


async def test_silent_connections_are_ended_and_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECTION_LIMIT", 20)
    monkeypatch.setattr(connections, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.1)
    async with served(f"sqlite:///{tmp_path}/x.db") as at:
        where = urlsplit(at.url)
        silent = [socket.create_connection((where.hostname, where.port)) for _ in range(20)]
        replies = [await at.post(deliveries.event("user.created", f"user_{n}")) for n in range(3)]
        assert [reply.status for reply in replies] == [200] * 3
        for connection in silent:
            connection.settimeout(0)
            with connection, contextlib.suppress(ConnectionError):
                async with asyncio.timeout(5):
                    assert await asyncio.get_running_loop().sock_recv(connection, 1) == b""
        # Whoever has signed may be silent for longer.
        assert (await at.post(deliveries.event("user.created", "user_x"))).status == 200


async def test_a_clock_that_is_off_is_told_with_the_delivery(
    database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(database_url) as at:
        body = deliveries.bytes_of(deliveries.event("user.created", "user_a"))
        late = deliveries.signed(body, svix_id="msg_late", sent_at=int(time.time()) - 600)
        async with at.http.post(f"{at.url}/webhooks/clerk", data=body, headers=late) as reply:
            assert reply.status == 401
    said = capfd.readouterr().out
    assert "clock_skew" in said
    assert "age_seconds=60" in said
    assert "msg_late" in said


async def test_the_quarantine_names_the_column(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/short.db"
    async with served(url) as at:
        event = deliveries.event("user.created", "user_a", first_name="x" * 300)
        assert (await at.post(event)).said == (200, "quarantined", "too_long")
    with sqlite3.connect(tmp_path / "short.db") as connection:
        found = connection.execute("SELECT reason, detail FROM clerk_sync_quarantine").fetchall()
    connection.close()
    assert found == [("too_long", "column first_name")]


async def test_strangers_cannot_fill_the_log_and_clerk_s_lines_stay(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    user = deliveries.event("user.created", "user_a")
    late = int(time.time()) - 1000
    async with deliveries.process(tmp_path, url) as (process, at):
        await at.until_ready()
        before = await at.metrics()
        await asyncio.gather(*(at.post(user, secret=OTHER_SECRET) for _ in range(60)))
        await asyncio.gather(*(at.post(b"{}", path=f"/{n}") for n in range(12)))
        await asyncio.gather(*(at.post(user, sent_at=late, svix_id="msg_old") for _ in range(15)))
        await asyncio.gather(
            *(at.post(deliveries.event("user.created", f"user_{n}")) for n in range(20))
        )
        after = await at.metrics()
        process.signal(signal.SIGTERM)
        assert await process.ended(seconds=8) == 0
        found = process.lines()
    counted = Counter(
        (line["outcome"], line["reason"]) for line in found if line["event"] == "delivery"
    )
    assert counted == {
        ("rejected", "wrong"): 10,
        ("rejected", "path"): 10,
        ("rejected", "expired"): 10,
        ("applied", None): 20,
    }
    assert sum(line["event"] == "clock_skew" for line in found) == 10
    left_out = {line["reason"]: line["count"] for line in found if line["event"] == "unlogged"}
    assert left_out == {"wrong": 50, "path": 2, "expired": 5}
    for reason, number in (("wrong", 60), ("path", 12), ("expired", 15)):
        assert after.grown_since(before)[f"rejected{{reason={reason}}}"] == number


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
async def test_a_full_disk_under_the_embedded_database_is_not_ready(tmp_path: Path) -> None:
    """Files may not grow: as on a full disk, what is there can be read and written over."""
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    async with deliveries.process(tmp_path, url) as (process, at):
        await at.until_ready()
        created = [deliveries.event("user.created", f"user_{n}") for n in range(40)]
        for one in created:
            assert (await at.post(one)).status == 200
        limit = (tmp_path / "x.db-wal").stat().st_size
        assert limit > 2 * len(process.log)
        whole = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, whole[1]))
        reply = await at.until_ready(ready=False)
        assert reply.json["reason"] == "database"
        assert (await at.post(created[0])).said == (503, "unavailable", "database")
        # It stays so, for as long as nothing can be written.
        seen = {(await at.inside("/readyz")).status for _ in range(200)}
        assert seen == {503}
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, whole)
        await at.until_ready()
        assert (await at.post(deliveries.event("user.created", "user_new"))).outcome == "applied"
        assert await rows(url, "SELECT * FROM clerk_sync_entities WHERE kind = ''") == []
