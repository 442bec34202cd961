"""The image as a cluster runs it: nobody's user, no rights, nothing to write to, real databases."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import textwrap
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncmy
import pytest

from clerk_sync import __version__
from tests import deliveries
from tests.image.engine import NOBODY, ROOT, Engine
from tests.waiting import until
from tools.servers import USER, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.image.engine import Container
    from tools.servers import Managed

pytestmark = pytest.mark.timeout(600)

MIB = 1024 * 1024


def inspected(engine: Engine, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine("image", "inspect", image))[0]
    return found


@pytest.fixture
def python(engine: Engine, image: str) -> Callable[..., Any]:
    """Run a script in the image, without rights, and return what it printed, as JSON."""

    def run(script: str, *, image: str = image, **how: Any) -> Any:
        done = engine.run(image, "-c", textwrap.dedent(script), entrypoint="python3", **how)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_says_what_it_is(engine: Engine, image: str) -> None:
    config = inspected(engine, image)["Config"]
    assert config["User"] == f"{NOBODY}:{NOBODY}"
    assert config["Entrypoint"] == ["clerk-sync"]
    assert config["Cmd"] == ["serve"]
    assert config["WorkingDir"] == "/data"
    assert list(config["ExposedPorts"]) == ["8080/tcp"]
    assert not config.get("Volumes")
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): text for name, text in config["Labels"].items()}
    assert labels["title"] == "clerk-sync"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["source"].startswith("https://github.com/")
    assert labels["version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}(Z|[+-][\d:]+)", labels["created"])


def test_no_secret_is_in_its_settings_or_its_history(engine: Engine, image: str) -> None:
    found = inspected(engine, image)
    variables = {one.partition("=")[0] for one in found["Config"]["Env"]}
    base = {"PATH", "LANG", "GPG_KEY", "PYTHON_VERSION", "PYTHON_SHA256", "container"}
    assert variables - base == {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    history = engine("history", "--no-trunc", image)
    assert not re.search(r"whsec_|sk_(live|test)_|mysql://|password", history, re.IGNORECASE)


def test_without_a_command_it_serves_and_with_one_it_does_that(engine: Engine, image: str) -> None:
    assert engine.run(image, "--version").stdout.strip() == f"clerk-sync, version {__version__}"
    refused = engine.run(image)
    assert refused.returncode == 1
    assert "CLERK_WEBHOOK_SIGNING_SECRET" in refused.stderr


def test_it_is_confined(python: Callable[..., Any]) -> None:
    """What the other tests run under is really in force."""
    found = python("""
        import json, os
        status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
        written = []
        for folder in ("/", "/app", "/data", "/etc", "/home", "/run", "/tmp", "/usr", "/var/tmp"):
            try:
                open(f"{folder}/written", "w")
            except OSError as error:
                pass
            else:
                written.append(folder)
        found = {name: text.split() for name, text in status.items()}
        print(json.dumps({"written": written, **found}))
    """)
    assert found["Uid"] == [str(NOBODY)] * 4
    assert found["Gid"] == [str(NOBODY)] * 4
    assert found["Groups"] in ([], [str(NOBODY)])
    assert {found[f"Cap{which}"][0] for which in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert found["NoNewPrivs"] == ["1"]
    assert found["written"] == []


def test_its_files_are_roots_and_closed(python: Callable[..., Any]) -> None:
    """Also where the root file system may be written to, its user changes nothing of it."""
    found = python(
        """
        import json, os, stat
        skipped = {"/proc", "/sys", "/dev", "/run"}
        theirs, open_, raised = [], [], []
        for folder, folders, files in os.walk("/"):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
            for name in folders + files:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                if status.st_uid == os.getuid() or status.st_gid == os.getgid():
                    theirs.append(path)
                mode = status.st_mode
                if mode & 0o2 and not stat.S_ISLNK(mode) and not mode & stat.S_ISVTX:
                    open_.append(path)
                if mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(mode):
                    raised.append(path)
        print(json.dumps([theirs, open_, raised]))
        """,
        confined=False,
        options=(f"--user={NOBODY}:{NOBODY}",),
    )
    assert found == [["/data"], [], []]


def test_nothing_in_it_builds_or_installs(python: Callable[..., Any]) -> None:
    found = python("""
        import glob, importlib.util, json, shutil, sys
        programs = "pip pip3 uv uvx gcc cc ld as make strip git curl wget".split()
        modules = "pip ensurepip setuptools hatchling uv pytest tests".split()
        sources = [f for e in ("c", "h", "pyx", "pxd", "pyi", "cpp") for f in
                   glob.glob(f"/app/**/*.{e}", recursive=True)]
        print(json.dumps([
            [name for name in programs if shutil.which(name)],
            [name for name in modules if importlib.util.find_spec(name)],
            sources,
            sorted(path.rpartition("/")[2] for path in glob.glob("/app/bin/*")),
            sys.prefix,
        ]))
    """)
    assert found == [[], [], [], ["clerk-sync", "python", "python3", "python3.13"], "/app"]


def test_everything_is_compiled_once_and_for_all(python: Callable[..., Any]) -> None:
    """Unchecked bytecode: nothing is compiled or looked at again, whatever the files' times."""
    found = python("""
        import importlib.util, json, pkgutil, sys
        import clerk_sync, clerk_sync.cli, clerk_sync.app, clerk_sync.sync.runs
        unchecked, wrong = b"\\1\\0\\0\\0", []
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            if file.endswith(".py"):
                try:
                    head = open(importlib.util.cache_from_source(file), "rb").read(8)
                except FileNotFoundError:
                    head = b""
                if head[4:] != unchecked:
                    wrong.append(name)
        print(json.dumps([len(sys.modules), wrong]))
    """)
    assert found[0] > 500
    assert found[1] == []


def test_it_is_small(
    engine: Engine, image: str, python: Callable[..., Any], told: list[str]
) -> None:
    sizes = python("""
        import json, os, sysconfig
        def size(folder):
            return sum(os.lstat(os.path.join(where, name)).st_size
                       for where, _, names in os.walk(folder) for name in names)
        site = sysconfig.get_path("purelib")
        parts = {name: size(f"{site}/{name}") for name in os.listdir(site)}
        libraries, stdlib = size("/app"), sysconfig.get_path("stdlib")
        bytecode = sum(os.lstat(os.path.join(where, name)).st_size
                       for where, _, names in os.walk(stdlib) for name in names
                       if name.endswith(".pyc"))
        print(json.dumps([libraries, bytecode, parts]))
    """)
    libraries, bytecode, parts = sizes
    told.append(f"image, unpacked: {inspected(engine, image)['Size'] / MIB:.0f} MiB, base included")
    told.append(f"  /app: {libraries / MIB:.1f} MiB; of it, in MiB:")
    largest = sorted(parts.items(), key=lambda part: -part[1])[:12]
    told.append("  " + ", ".join(f"{name} {size / MIB:.1f}" for name, size in largest))
    told.append(f"  the standard library's bytecode: {bytecode / MIB:.1f} MiB")
    assert libraries < 80 * MIB
    assert bytecode < 15 * MIB
    assert parts["clerk_sync"] < 2 * MIB


def test_only_what_is_named_gets_into_the_build(engine: Engine, image: str, tmp_path: Path) -> None:
    """With secrets, history and tests lying about, none of them is even sent to the engine."""
    for name in (".dockerignore", "LICENSE", "README.md", "pyproject.toml"):
        tmp_path.joinpath(name).write_bytes((ROOT / name).read_bytes())
    for name in ("requirements.lock", "requirements-dev.lock", "service/clerk_sync/app.py"):
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).touch()
    wanted = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    wanted.remove(".dockerignore")
    for name in (
        ".env",
        ".git/config",
        ".dev/signing-secret",
        ".venv/bin/python",
        "clerk-sync.db",
        "secret.yaml",
        "service/.env",
        "service/clerk_sync/clerk-sync.db",
        "service/clerk_sync/clerk-sync.db-wal",
        "service/clerk_sync/__pycache__/cli.pyc",
        "tests/test_a.py",
        "charts/clerk-sync/values.yaml",
    ):
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).write_text("hidden")
    recipe = tmp_path.parent / f"{tmp_path.name}.Dockerfile"
    recipe.write_text(f"FROM {image}\nCOPY . /context\n")
    name = "clerk-sync:context"
    options = [*engine.build_options, "--tag", name, "--file", str(recipe)]
    engine("build", "--pull=false", *options, str(tmp_path), timeout=300)
    script = (
        "import os; [print(os.path.relpath(os.path.join(where, name), '/context'))"
        " for where, _, names in os.walk('/context') for name in names]"
    )
    done = engine.run(name, "-c", script, entrypoint="python3")
    engine("rmi", name)
    assert set(done.stdout.split()) == wanted


@pytest.fixture
def ports() -> dict[str, str]:
    return {
        "CLERK_SYNC_HOST": "127.0.0.1",
        "CLERK_SYNC_PORT": str(free_port()),
        "CLERK_SYNC_INTERNAL_PORT": str(free_port()),
    }


@pytest.fixture
def mounted_url(mysql_server: Managed, tmp_path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return a new database's URL, and the mount of two secrets as files that only root wrote."""
    name = f"clerk_sync_image_{time.time_ns()}"
    url = mysql_server.create_database(name)
    folder = tmp_path / "secrets"
    folder.mkdir()
    folder.joinpath("url").write_text(url + "\n")
    folder.joinpath("signing").write_text(deliveries.SECRET + "\n")
    tmp_path.chmod(0o755)
    yield url, (f"--volume={folder}:/run/secrets:ro",)
    mysql_server.drop_database(name)


FILES = {
    "DATABASE_URL_FILE": "/run/secrets/url",
    "CLERK_WEBHOOK_SIGNING_SECRET_FILE": "/run/secrets/signing",
}


async def test_from_migrate_to_the_last_answer(
    engine: Engine,
    image: str,
    ports: dict[str, str],
    mounted_url: tuple[str, tuple[str, ...]],
    told: list[str],
) -> None:
    """Tables, a check, the service, an event by a second container, and the end on SIGTERM."""
    url, mount = mounted_url
    environment = {**FILES, **ports, "CLERK_SYNC_DEADLINE_SECONDS": "14"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return engine.run(image, *command, environment=environment, options=mount)

    migrated = run("migrate")
    assert migrated.returncode == 0, migrated.stderr
    assert "clerk_sync_entities" in {name for (name,) in await deliveries.rows(url, "SHOW TABLES")}
    checked = run("check")
    assert checked.returncode == 0, checked.stdout
    started = time.monotonic()
    with engine.started(image, environment=environment, options=mount) as container:
        async with deliveries.talking_to(
            f"http://127.0.0.1:{ports['CLERK_SYNC_PORT']}",
            f"http://127.0.0.1:{ports['CLERK_SYNC_INTERNAL_PORT']}",
        ) as at:
            await until_up(at, container)
            told.append(
                f"ready {time.monotonic() - started:.1f} s after `run`, the engine's part included"
            )
            assert (await at.inside("/livez")).status == 200
            assert container.execute("python3", "-c", _PID_1).split("\0")[1:] == [
                "/app/bin/clerk-sync",
                "serve",
            ]
            sent = await asyncio.to_thread(run, "trigger", "user.created", "--id", "user_ada")
            assert sent.returncode == 0, sent.stderr
            assert '200 {"outcome": "applied"}' in sent.stdout
            found = await deliveries.rows(url, "SELECT clerk_id, first_name FROM clerk_users")
            assert found == [("user_ada", "Ada")]
            await drained(at, container, url)
    assert await deliveries.rows(url, "SELECT clerk_id FROM clerk_users ORDER BY clerk_id") == [
        ("user_ada",),
        ("user_bob",),
    ]


_PID_1 = "print(open('/proc/1/cmdline').read().rstrip(chr(0)))"


async def until_up(at: deliveries.At, container: Container) -> None:
    """Wait until it is ready, and both of its ports are open."""

    async def look() -> tuple[int, int]:
        try:
            return (await at.inside("/readyz")).status, (await at.request("GET", at.url)).status
        except OSError:
            return 0, 0

    try:
        await until(look, lambda both: both == (200, 404), seconds=30)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{container.logs()}") from None


async def drained(at: deliveries.At, container: Container, url: str) -> None:
    """SIGTERM while a delivery waits for a lock: that is answered 200, and the exit code is 0."""
    before = (await at.metrics())("received_total")
    parts = urlsplit(url)
    async with asyncmy.connect(
        host=parts.hostname,
        port=parts.port,
        user=USER[0],
        password=USER[1],
        database=parts.path.strip("/"),
    ) as holder:
        async with holder.cursor() as cursor:
            await cursor.execute("LOCK TABLES clerk_sync_entities WRITE")
            event = deliveries.event("user.created", "user_bob")
            held = asyncio.create_task(at.post(event))
            await until(at.metrics, lambda now: now("received_total") > before)
            await asyncio.to_thread(container.terminate)
            await at.until_ready(ready=False)
            assert (await at.inside("/readyz")).json["reason"] == "draining"
            assert not held.done()
            await cursor.execute("UNLOCK TABLES")
        assert (await held).said == (200, "applied", None)
    assert await asyncio.to_thread(container.ended) == 0
    log = [json.loads(line) for line in container.logs().splitlines()]
    assert [line["event"] for line in log][-3:] == ["draining", "delivery", "stopped"]
    assert container.written() == []


async def test_the_embedded_database_is_in_data(
    engine: Engine, image: str, ports: dict[str, str]
) -> None:
    """A volume there, made by the engine, belongs to the user; without one nothing is kept."""
    environment = {"CLERK_WEBHOOK_SIGNING_SECRET": deliveries.SECRET, **ports}
    nowhere = engine.run(image, "migrate", environment=environment)
    assert nowhere.returncode == 1
    assert "unable to open database file" in nowhere.stderr
    volume = f"clerk-sync-{time.time_ns()}"
    mount = (f"--volume={volume}:/data",)
    try:
        migrated = engine.run(image, "migrate", environment=environment, options=mount)
        assert migrated.returncode == 0, migrated.stderr
        with engine.started(image, environment=environment, options=mount) as container:
            async with deliveries.talking_to(
                f"http://127.0.0.1:{ports['CLERK_SYNC_PORT']}",
                f"http://127.0.0.1:{ports['CLERK_SYNC_INTERNAL_PORT']}",
            ) as at:
                await until_up(at, container)
                event = deliveries.event("user.created", "user_ada")
                assert (await at.post(event)).said == (200, "applied", None)
                assert "user_ada" in (await at.inside("/profiles")).text
            container.terminate()
            assert container.ended() == 0
    finally:
        engine("volume", "rm", "--force", volume)


def test_a_second_build_is_the_same(
    engine: Engine, image: str, python: Callable[..., Any], built: Callable[..., str]
) -> None:
    """Nothing in it tells when or where it was built; files' times are the engine's business."""
    contents = """
        import hashlib, json, os, sysconfig
        found = {}
        for root in ("/app", "/data", "/usr/local", sysconfig.get_path("stdlib")):
            for folder, folders, files in os.walk(root):
                for name in folders + files:
                    path = os.path.join(folder, name)
                    status = os.lstat(path)
                    said = [status.st_mode, status.st_uid, status.st_gid]
                    if os.path.islink(path):
                        said.append(os.readlink(path))
                    elif os.path.isfile(path):
                        said.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
                    found[path] = said
        print(json.dumps(found))
    """
    again = built("clerk-sync:again", "--no-cache")
    first, second = python(contents), python(contents, image=again)
    engine("rmi", again)
    assert len(first) > 5000
    assert {path for path in first | second if first.get(path) != second.get(path)} == set()
