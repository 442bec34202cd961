"""The development overlay's example, run for real: its settings, its secrets, its app, MySQL."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import aiohttp

from clerk_sync.clerk import signature
from clerk_sync.database.url import target_of
from tests import deliveries
from tests.chart import rules
from tests.k8s.generate import K8S
from tests.k8s.kustomize import build
from tests.waiting import until
from tools import servers as database_servers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.chart.helm import Object
    from tests.conftest import Servers

DEVELOPMENT: Final = K8S / "overlays" / "development"


def secret(name: str) -> dict[str, str]:
    """Return what is in the Secret of this name."""
    found = rules.the(build(DEVELOPMENT), "Secret", name)
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


def container(pod: str, name: str) -> Object:
    (found,) = (
        one
        for each in rules.pods(build(DEVELOPMENT))
        if each.name == pod
        for one in each.containers
        if one["name"] == name
    )
    return dict(found)


def test_the_secrets_fit_the_database_and_each_other() -> None:
    database, mysql = target_of(secret("clerk-sync")["url"]), secret("mysql")
    assert (database.username, database.password, database.name) == (
        mysql["MYSQL_USER"],
        mysql["MYSQL_PASSWORD"],
        mysql["MYSQL_DATABASE"],
    )
    assert database.tls is None
    (port,) = rules.the(build(DEVELOPMENT), "Service", "mysql")["spec"]["ports"]
    assert (database.host, database.port) == ("mysql", port["port"])
    assert signature.signers(secret("clerk-sync")["signing-secret"])


def test_the_secrets_say_that_they_are_no_secrets() -> None:
    for file in DEVELOPMENT.glob("*.env"):
        assert file.read_text("utf-8").startswith("# FOR DEVELOPMENT ONLY.")
    told = [*secret("clerk-sync").values(), *secret("mysql").values()]
    hidden = [base64.b64decode(one[6:]).decode() for one in told if one.startswith("whsec_")]
    passwords = [one for key, one in secret("mysql").items() if key.endswith("PASSWORD")]
    assert all("development-only" in one for one in [*hidden, *passwords])


def test_another_secret_changes_no_job(tmp_path: Path) -> None:
    """A Job cannot be changed: applying the overlay again, with Clerk's own secret, would fail."""
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    copied = tmp_path / DEVELOPMENT.relative_to(K8S)
    settings = copied / "clerk-sync-development.env"
    settings.write_text(settings.read_text("utf-8").replace("whsec_Z", "whsec_Y"), "utf-8")
    before, after = build(DEVELOPMENT), build(copied)
    assert rules.the(before, "Secret", "clerk-sync") != rules.the(after, "Secret", "clerk-sync")
    assert rules.the(before, "Job") == rules.the(after, "Job")


def test_the_image_of_mysql_is_the_same_everywhere() -> None:
    server = container("StatefulSet mysql", "mysql")
    assert server["image"] == container("Job clerk-sync-migrate", "wait")["image"]


async def test_the_example_shows_a_user_that_an_event_brought(
    servers: Servers, tmp_path: Path
) -> None:
    """As in the README: apply, trigger, look. Addresses are others, which are free here."""
    flavour = database_servers.available()[0].flavour
    url = servers[flavour].create_database(f"clerk_sync_example_{os.getpid()}")
    told = secret("clerk-sync") | {"url": f"{url}?tls=disable"}
    migrating = environment("Job clerk-sync-migrate", "migrate", told, tmp_path)
    await command("migrate", migrating)
    elsewhere = {"CLERK_SYNC_PORT": "0", "CLERK_SYNC_INTERNAL_PORT": "0"}
    serving = environment("Deployment shop", "clerk-sync", told, tmp_path) | elsewhere
    async with deliveries.process(tmp_path, **serving) as (_, at):
        await at.until_ready()
        webhook = f"{at.url}{serving['CLERK_SYNC_WEBHOOK_PATH']}"
        answer = await command("trigger", serving, "user.created", "--url", webhook)
        assert '200 {"outcome": "applied"}' in answer
        with shop(at.internal_url) as port:
            page = await until(lambda: shown(at, port), bool)
    assert re.fullmatch(r"Users: 1\nuser_\w+ Ada Lovelace ada\S*@\S+\n", page)
    servers[flavour].drop_database(f"clerk_sync_example_{os.getpid()}")


def environment(pod: str, name: str, told: dict[str, str], folder: Path) -> dict[str, str]:
    """Return a container's variables, with the files of its Secret in a folder."""
    made = {one["name"]: one["value"] for one in container(pod, name)["env"]}
    for variable, path in made.items():
        if variable.endswith("_FILE"):
            file = folder / path.rpartition("/")[2]
            file.write_text(told[file.name], "utf-8")
            made[variable] = str(file)
    return made


async def command(name: str, settings: dict[str, str], *arguments: str) -> str:
    done = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clerk_sync", name, *arguments),
        env=kept() | settings,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(done.communicate(), 30)
    assert done.returncode == 0, said
    return said.decode()


def kept() -> dict[str, str]:
    """Return what a process needs of this one's variables: no setting is among them."""
    needed = ("PATH", "HOME")
    paths = os.pathsep.join(sys.path)
    return {name: os.environ[name] for name in needed if name in os.environ} | {"PYTHONPATH": paths}


@contextmanager
def shop(clerk_sync: str) -> Iterator[int]:
    """Run the example's app, and yield its port."""
    port = database_servers.free_port()
    running = subprocess.Popen(
        [sys.executable, DEVELOPMENT / "shop.py"],
        env=kept() | {"PORT": str(port), "CLERK_SYNC_URL": clerk_sync},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        running.kill()
        running.wait()


async def shown(at: deliveries.At, port: int) -> str:
    try:
        reply = await at.request("GET", f"http://127.0.0.1:{port}/")
    except aiohttp.ClientConnectionError:
        return ""
    assert reply.status == 200, reply
    return reply.text
