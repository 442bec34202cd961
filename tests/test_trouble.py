"""Trouble as the person on call meets it: what is said, who is hurt, and that it passes."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import time
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import pytest

from clerk_sync import probe, signature, webhook
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, SECRET, rows, served, serving, settings_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Managed


async def test_a_server_that_turned_read_only_is_not_ready_until_it_is_writable(
    mysql_server: Managed,
) -> None:
    name, login = "clerk_sync_failover", "writer"
    admin = mysql_server.create_database(name)
    await deliveries.migrate(admin)
    mysql_server.execute(f"DROP USER IF EXISTS {login}")
    mysql_server.execute(f"CREATE USER {login} IDENTIFIED BY 'plain'")
    mysql_server.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.* TO {login}")
    address = urlsplit(admin)
    url = f"mysql://{login}:{quote('plain')}@{address.hostname}:{address.port}/{name}"
    async with serving(settings_of(url)) as at:
        await at.until_ready()
        assert (await at.post(deliveries.event("user.created", "user_a"))).status == 200
        mysql_server.execute("SET GLOBAL read_only = 1")
        try:
            reply = await at.post(deliveries.event("user.updated", "user_a"))
            assert reply.said == (503, "unavailable", "database")
            signers = signature.signers(SECRET)
            probed = await probe.probe(probe.address(at.url + PATH), signers, seconds=1)
            assert "is away, or takes no writes" in probed.text
            unready = await at.until_ready(ready=False)
            assert "read-only" in unready.json["detail"] or "1290" in unready.json["detail"]
        finally:
            mysql_server.execute("SET GLOBAL read_only = 0")
        await at.until_ready()
        assert (await at.post(deliveries.event("user.updated", "user_a"))).status == 200
    mysql_server.execute(f"DROP USER {login}")


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
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "CONNECTION_LIMIT", 20)
    monkeypatch.setattr(webhook, "SILENT_SECONDS", 1.0)
    async with served(database_url) as at:
        where = urlsplit(at.url)
        silent = [socket.create_connection((where.hostname, where.port)) for _ in range(20)]
        replies = [await at.post(deliveries.event("user.created", f"user_{n}")) for n in range(3)]
        assert [reply.status for reply in replies] == [200] * 3
        await asyncio.sleep(1.5)
        for connection in silent:
            connection.settimeout(1)
            try:
                assert connection.recv(1) == b""
            except ConnectionError:
                pass
            finally:
                connection.close()


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
