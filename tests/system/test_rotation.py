"""Secrets that change while the service runs, as Kubernetes changes mounted ones."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from clerk_sync.settings import Secret
from tests import deliveries
from tests.deliveries import OTHER_SECRET, SECRET, At, event
from tests.system.test_chaos import cut_connections
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tools.servers import Managed

THIRD_SECRET = deliveries.secret_of("third")


class Mounted:
    """A Secret as the kubelet mounts it: each name a link through `..data`, swapped at once."""

    def __init__(self, folder: Path, **contents: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.write(**contents)
        for name in contents:
            (folder / name).symlink_to(f"..data/{name}")

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, **contents: str) -> None:
        made = self.folder / f"..{secrets.token_hex(8)}"
        made.mkdir()
        for name, text in contents.items():
            (made / name).write_text(text, errors="surrogateescape")
        fresh = self.folder / "..data_tmp"
        fresh.symlink_to(made.name)
        fresh.replace(self.folder / "..data")


async def statuses(at: At, *with_secrets: str) -> list[int]:
    return [
        (await at.post(event("user.updated", "user_a"), secret=one)).status for one in with_secrets
    ]


async def until_statuses(at: At, expected: list[int], *with_secrets: str) -> None:
    await until(lambda: statuses(at, *with_secrets), lambda seen: seen == expected, seconds=4)


async def test_signing_secret_is_rotated_without_a_restart(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path / "secret", signing=SECRET + "\n")
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    both = (SECRET, OTHER_SECRET)
    environment = {"CLERK_WEBHOOK_SIGNING_SECRET_FILE": mounted["signing"]}
    async with deliveries.process(tmp_path, url, **environment) as (process, at):
        await at.until_ready()
        assert await statuses(at, *both) == [200, 401]
        mounted.write(signing=f"{OTHER_SECRET} {SECRET}\n")
        await until_statuses(at, [200, 200], *both)
        mounted.write(signing=OTHER_SECRET)
        await until_statuses(at, [401, 200], *both)
        # What makes no sense, is empty, or is gone for a moment changes nothing.
        mounted.write(signing="whsec_oops!")
        await asyncio.sleep(1.2)
        assert await statuses(at, *both) == [401, 200]
        for nothing in ({"signing": ""}, {}):
            mounted.write(**nothing)
            await asyncio.sleep(1.1)
            assert await statuses(at, *both) == [401, 200]
        mounted.write(signing=f"{THIRD_SECRET},{SECRET}")
        await until_statuses(at, [200, 401, 200], *both, THIRD_SECRET)
        told = [line["event"] for line in process.lines() if "signing" in line["event"]]
        assert told.count("signing_secret_invalid") == 1
        assert "oops" not in process.log


async def owned_database(server: Managed, name: str, login: str, password: str) -> str:
    """Make a migrated database, and a user who may do all on it; the URL is the server's own."""
    url = server.create_database(name)
    await deliveries.migrate(url)
    server.execute(f"DROP USER IF EXISTS {login}")
    server.execute(f"CREATE USER {login} IDENTIFIED BY '{password}'")
    server.execute(f"GRANT ALL ON {name}.* TO {login}")
    return url


async def test_database_password_is_rotated_without_a_restart(
    mysql_server: Managed, tmp_path: Path
) -> None:
    name, login = "clerk_sync_rotated", "rotated"
    url = await owned_database(mysql_server, name, login, "first p@ss")
    mounted = Mounted(tmp_path / "secret", username=login, password="first p@ss")
    pieces = {
        "DATABASE_URL": None,
        "DATABASE_HOST": Secret("DATABASE_HOST", value=mysql_server.host),
        "DATABASE_PORT": Secret("DATABASE_PORT", value=str(mysql_server.port)),
        "DATABASE_NAME": Secret("DATABASE_NAME", value=name),
        "DATABASE_USERNAME": Secret("DATABASE_USERNAME", path=tmp_path / "secret/username"),
        "DATABASE_PASSWORD": Secret("DATABASE_PASSWORD", path=tmp_path / "secret/password"),
    }
    # One writer, as another would only connect when it is first needed.
    settings = deliveries.settings_of(url, CLERK_SYNC_WRITERS=1, **pieces)
    async with deliveries.serving(settings) as at:
        await at.until_ready()
        assert await statuses(at, SECRET) == [200]
        # The server first: connections that are cut cannot come back.
        mysql_server.execute(f"ALTER USER {login} IDENTIFIED BY 'second/:p%ss'")
        await asyncio.to_thread(cut_connections, mysql_server, name)
        reply = await at.post(event("user.updated", "user_a"))
        assert reply.said == (503, "unavailable", "database")
        unready = await at.until_ready(ready=False)
        assert unready.json["reason"] == "database"
        assert "p@ss" not in unready.text
        # Then the file, as the kubelet brings it up to a minute later.
        mounted.write(username=login, password="second/:p%ss\n")
        await at.until_ready()
        await until_statuses(at, [200], SECRET)
        # The file first, this time: nothing is lost in between either.
        mounted.write(username=login, password="third")
        await asyncio.sleep(1.1)
        assert await statuses(at, SECRET) == [200]
        mysql_server.execute(f"ALTER USER {login} IDENTIFIED BY 'third'")
        await asyncio.to_thread(cut_connections, mysql_server, name)
        assert await statuses(at, SECRET) == [200]
        assert (await at.inside("/profiles")).status == 200
    mysql_server.execute(f"DROP USER {login}")


async def test_a_password_that_no_new_connection_gets_in_with_is_told_by_readiness(
    mysql_server: Managed,
) -> None:
    name, login = "clerk_sync_outdated", "outdated"
    await owned_database(mysql_server, name, login, "first")
    mine = f"mysql://{login}:first@{mysql_server.host}:{mysql_server.port}/{name}"
    open_now = f"SELECT id FROM information_schema.processlist WHERE user = '{login}'"
    async with deliveries.served(mine, CLERK_SYNC_WRITERS=1) as at:
        await at.until_ready()
        before = set(mysql_server.execute(open_now))
        assert await statuses(at, SECRET) == [200]
        (writing,) = set(mysql_server.execute(open_now)) - before
        mysql_server.execute(f"ALTER USER {login} IDENTIFIED BY 'second'")
        mysql_server.execute(f"KILL {writing[0]}")
        assert (await at.post(event("user.updated", "user_a"))).status == 503
        unready = await at.until_ready(ready=False)
        assert "password is wrong" in unready.json["detail"]
        mysql_server.execute(f"ALTER USER {login} IDENTIFIED BY 'first'")
        await at.until_ready()
        await until_statuses(at, [200], SECRET)
    mysql_server.execute(f"DROP USER {login}")


async def test_database_url_in_a_file_moves_to_another_server_or_database(
    mysql_server: Managed, tmp_path: Path
) -> None:
    urls = [mysql_server.create_database(f"clerk_sync_moved_{n}") for n in range(2)]
    for url in urls:
        await deliveries.migrate(url)
    mounted = Mounted(tmp_path / "secret", url=urls[0])
    moving = {"DATABASE_URL": Secret("DATABASE_URL", path=tmp_path / "secret/url")}
    async with deliveries.serving(deliveries.settings_of(urls[0], **moving)) as at:
        await at.until_ready()
        assert await statuses(at, SECRET) == [200]
        mounted.write(url=quote(urls[1], safe=":/@%"))
        await asyncio.sleep(1.1)
        await asyncio.to_thread(cut_connections, mysql_server, "clerk_sync_moved_0")
        await until_statuses(at, [200], SECRET)
        assert len(await deliveries.ledger(urls[0])) == 1
        assert len(await deliveries.ledger(urls[1])) >= 1


def stale(metrics: deliveries.Metrics) -> set[str]:
    """Return the secrets whose files are of no use, as the metrics tell."""
    labels = {
        dict(labels)["secret"]: value
        for (name, labels), value in metrics.samples.items()
        if name == "clerk_sync_secret_stale"
    }
    return {name for name, value in labels.items() if value}


@pytest.mark.parametrize("how", ["gone", "empty", "blank", "binary"])
async def test_a_secret_s_file_that_is_of_no_use_is_told_once_and_when_it_is_back(
    tmp_path: Path, how: str
) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    contents = {
        "DATABASE_URL": url,
        "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
        "CLERK_SECRET_KEY": "sk_test_bm90IHRvIGJlIHNlZW4",
        "CLERK_SYNC_APP_TOKEN": "6a09e667f3bcc908b2fb1366ea957d3e",
    }
    fields = {"database_url", "signing_secret", "secret_key", "app_token"}
    mounted = Mounted(tmp_path / "secrets", **contents)
    environment = {f"{name}_FILE": mounted[name] for name in contents}
    # Nothing is there to be asked.
    environment["CLERK_API_URL"] = "http://127.0.0.1:9"
    async with deliveries.process(tmp_path, **environment) as (process, at):
        await at.until_ready()
        assert stale(await at.metrics()) == set()

        async def shows(expected: set[str]) -> None:
            await until(at.metrics, lambda seen: stale(seen) == expected)

        for turn in (1, 2):
            bad = dict.fromkeys(contents, {"empty": "", "blank": " \n"}.get(how, "\udcff"))
            mounted.write(**({} if how == "gone" else bad))
            await shows(fields)
            # The last good ones are still used.
            assert (await at.inside("/readyz")).status == 200
            assert await statuses(at, SECRET) == [200]
            mounted.write(**contents)
            await shows(set())
            lines = process.lines()
            for event_, level in (("secret_stale", "error"), ("secret_recovered", "info")):
                told = [line for line in lines if line["event"] == event_]
                assert sorted(line["name"] for line in told) == sorted([*contents] * turn)
                assert {line["level"] for line in told} == {level}
        errors = {line["error"] for line in lines if line["event"] == "secret_stale"}
        said = {"gone": "No such file or directory", "binary": "not text"}
        assert errors == {said.get(how, "is empty")}
        for text in (*contents.values(), "sk_test"):
            assert text not in process.log or text == url


async def test_a_key_that_was_never_there_is_told_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    path = tmp_path / "key"
    environment = {"CLERK_SECRET_KEY_FILE": str(path), "CLERK_API_URL": "http://127.0.0.1:9"}
    async with deliveries.process(tmp_path, url, **environment) as (process, at):
        await at.until_ready()
        await until(at.metrics, lambda seen: stale(seen) == {"secret_key"})
        path.write_text("sk_test_bm90IHRvIGJlIHNlZW4")
        await until(at.metrics, lambda seen: stale(seen) == set())
        told = [line["event"] for line in process.lines() if line["event"].startswith("secret_")]
        assert told == ["secret_stale", "secret_recovered"]


async def test_a_secret_that_makes_no_sense_is_stale_until_it_does(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    mounted = Mounted(tmp_path / "secret", signing=SECRET)
    environment = {"CLERK_WEBHOOK_SIGNING_SECRET_FILE": mounted["signing"]}
    async with deliveries.process(tmp_path, url, **environment) as (process, at):
        await at.until_ready()
        mounted.write(signing="whsec_oops!")
        # Nobody has to send anything for it to be noticed.
        await until(at.metrics, lambda seen: stale(seen) == {"signing_secret"})
        mounted.write(signing=OTHER_SECRET)
        await until(at.metrics, lambda seen: stale(seen) == set())
        assert await statuses(at, SECRET, OTHER_SECRET) == [401, 200]
        told = [line["event"] for line in process.lines() if "signing_secret" in line["event"]]
        assert told == ["signing_secret_invalid", "signing_secret_changed"]
