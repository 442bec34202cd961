"""Every command, on strange servers and schemas: a sentence at worst, never a traceback."""

from __future__ import annotations

import base64
import logging
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import click
import pytest
import structlog
from click.testing import CliRunner, Result

from clerk_sync.cli import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Servers
    from tools.servers import Managed, Server

SECRET: Final = "whsec_" + base64.b64encode(b"the secret of these tests").decode()
COMMANDS: Final = {
    "migrate": (),
    "migrate --print": (),
    "check": (),
    "trigger": ("user.created", "--url", "http://127.0.0.1:1/"),
    "probe": ("--url", "http://127.0.0.1:1/", "--seconds", "1"),
    "replay": ("-",),
    "quarantine list": (),
    "quarantine replay": ("--all",),
    "quarantine drop": ("msg_1",),
    "backfill": (),
    "reconcile": ("--dry-run",),
    "ensure": ("user_1",),
    "erase": ("user_1",),
}
"""Every command but `serve`, with arguments that do no harm."""
MAPPING: Final = """
tables:
  user:
    table: {table}
    key: {key}
    columns: {{username: username, "{column}": first_name}}
    on_delete: remove
    owns: [{{table: posts, column: author, references: {key}}}]
"""


def leaves(group: click.Group, *before: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *before, name)
        else:
            yield " ".join((*before, name))


def test_no_command_is_left_out() -> None:
    assert {name.partition(" -")[0] for name in COMMANDS} | {"serve"} == {*leaves(cli)}


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clerk_url: str) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("CLERK_", "DATABASE_", "LOG_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", SECRET)
    monkeypatch.setenv("CLERK_SECRET_KEY", "sk_test_x")
    monkeypatch.setenv("CLERK_API_URL", clerk_url)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


class _NoClerk(BaseHTTPRequestHandler):
    """Takes no key."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def clerk_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoClerk) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ran(name: str) -> Result:
    """Run one command here; whatever nobody foresaw would be raised."""
    result = CliRunner().invoke(cli, [*name.split(), *COMMANDS[name]], input="")
    assert result.exception is None or isinstance(result.exception, SystemExit), name
    assert result.exit_code in (0, 1, 2), name
    assert "Traceback" not in result.output, name
    if result.exit_code == 1:
        assert result.output.strip(), f"{name} says nothing"
    return result


def all_ran() -> dict[str, Result]:
    return {name: ran(name) for name in COMMANDS}


def served(until: Callable[[str], bool], tmp_path: Path) -> str:
    """What `serve` logs until it said something, and until it is told to end, which it does."""
    log = tmp_path / "serve.log"
    ports = {"CLERK_SYNC_PORT": "0", "CLERK_SYNC_INTERNAL_PORT": "0"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "clerk_sync", "serve"],
            env=os.environ | ports | {"CLERK_SYNC_HOST": "127.0.0.1"},
            stdout=out,
            stderr=out,
        )
        deadline = time.monotonic() + 30
        while not until(log.read_text()) and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    said = log.read_text()
    assert "raceback" not in said
    return said


def ready_or_told(said: str) -> bool:
    return '"listening"' in said and ('"ready"' in said or '"not_ready"' in said)


def use(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path, **names: str) -> None:
    spelt = {"table": "people", "key": "clerk_id", "column": "first"} | names
    (tmp_path / "mapping.yaml").write_text(MAPPING.format(**spelt))
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("CLERK_SYNC_CONFIG", str(tmp_path / "mapping.yaml"))


POSTS: Final = "CREATE TABLE posts (id INT PRIMARY KEY, author VARCHAR(128) COLLATE utf8mb4_bin)"
KEY: Final = "clerk_id VARCHAR(128) COLLATE utf8mb4_bin PRIMARY KEY"
WORDS: Final = "username VARCHAR(255), first VARCHAR(255)"
# By what is strange: the names that the mapping has, and how the tables are made.
SCHEMAS: Final[dict[str, tuple[dict[str, str], tuple[str, ...]]]] = {
    "types that nobody knows": (
        {},
        (f"CREATE TABLE people ({KEY}, {WORDS}, v UNKNOWN, p POINT, j JSON)",),
    ),
    "names that nobody maps": (
        {},
        (f"CREATE TABLE people ({KEY}, {WORDS}, `b``` VARCHAR(3) UNIQUE, `%s` INT, `100%` INT)",),
    ),
    "a back-tick": (
        {"column": "fi`rst"},
        (f"CREATE TABLE people ({KEY}, username VARCHAR(255), `fi``rst` VARCHAR(255))",),
    ),
    "a percent sign": (
        {"column": "100%s"},
        (f"CREATE TABLE people ({KEY}, username VARCHAR(255), `100%s` VARCHAR(255))",),
    ),
    "other cases": (
        {"key": "Clerk_ID", "column": "FIRST"},
        (f"CREATE TABLE people ({KEY}, {WORDS})",),
    ),
    "a table's other case": ({"table": "People"}, (f"CREATE TABLE people ({KEY}, {WORDS})",)),
    "a view": (
        {},
        (
            f"CREATE TABLE persons ({KEY}, {WORDS})",
            "CREATE VIEW people AS SELECT clerk_id, username, first FROM persons",
        ),
    ),
    "a broken view": (
        {},
        (
            f"CREATE TABLE persons ({KEY}, {WORDS})",
            "CREATE VIEW people AS SELECT clerk_id, username, first FROM persons",
            "DROP TABLE persons",
        ),
    ),
    "bytes for ids": (
        {},
        (f"CREATE TABLE people (clerk_id VARBINARY(128) PRIMARY KEY, {WORDS})",),
    ),
    "numbers for ids": ({}, (f"CREATE TABLE people (clerk_id BIGINT PRIMARY KEY, {WORDS})",)),
    "a prefix for a key": (
        {},
        (f"CREATE TABLE people (clerk_id VARCHAR(128), {WORDS}, UNIQUE KEY k (clerk_id(10)))",),
    ),
    "a generated column": (
        {},
        (f"CREATE TABLE people ({KEY}, username VARCHAR(255), first TEXT AS (username) STORED)",),
    ),
    "a column of a strange type": (
        {},
        (f"CREATE TABLE people ({KEY}, username VARCHAR(255), first UNKNOWN)",),
    ),
    "no transactions": ({}, (f"CREATE TABLE people ({KEY}, {WORDS}) ENGINE=MyISAM",)),
    "partitions": (
        {},
        (f"CREATE TABLE people ({KEY}, {WORDS}) PARTITION BY KEY (clerk_id) PARTITIONS 2",),
    ),
    "nothing": ({}, ()),
}


@pytest.mark.parametrize("strange", [*SCHEMAS])
def test_strange_schemas_end_no_command_in_a_traceback(
    strange: str, mysql_server: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = mysql_server.create_database("strange")
    names, statements = SCHEMAS[strange]
    unknown = {"mysql": "VECTOR(3)", "mariadb": "UUID"}[mysql_server.flavour]
    for statement in (*statements, POSTS):
        mysql_server.execute(statement.replace("UNKNOWN", unknown), "strange")
    use(monkeypatch, url, tmp_path, **names)
    results = all_ran()
    if strange in ("types that nobody knows", "names that nobody maps", "a back-tick"):
        assert results["migrate"].exit_code == 0, results["migrate"].output
        assert "FAIL schema" not in results["check"].output
    said = served(ready_or_told, tmp_path)
    assert "schema_check_failed" not in said


def test_names_of_tables_in_any_case_where_the_server_takes_them_for_one(
    mysql_server: Managed,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server = servers.having(mysql_server.flavour, "--lower-case-table-names=1")
    use(monkeypatch, server.create_database("strange"), tmp_path, table="People")
    server.execute(POSTS, "strange")
    server.execute(f"CREATE TABLE people ({KEY}, {WORDS})", "strange")
    done = all_ran()["migrate"]
    assert done.exit_code == 0, done.output
    assert '"ready"' in served(ready_or_told, tmp_path)


def _accounts(server: Server) -> dict[str, tuple[str, str]]:
    """Accounts that get in nowhere, or not everywhere, by what is strange of them."""
    if server.flavour == "mariadb":
        server.execute("INSTALL SONAME 'auth_ed25519'")
    plugin = {
        "mysql": "IDENTIFIED WITH sha256_password BY 'x'",
        "mariadb": "IDENTIFIED VIA ed25519 USING PASSWORD('x')",
    }
    made = {
        "another plugin": plugin[server.flavour],
        "TLS only": "IDENTIFIED BY 'x' REQUIRE SSL",
        "certificate only": "IDENTIFIED BY 'x' REQUIRE X509",
        "read only": "IDENTIFIED BY 'x'",
        "no rights": "IDENTIFIED BY 'x'",
        "one connection": "IDENTIFIED BY 'x' WITH MAX_USER_CONNECTIONS 1",
        "expired": "IDENTIFIED BY 'x' PASSWORD EXPIRE",
    }
    for name, how in made.items():
        server.execute(f"DROP USER IF EXISTS `{name}`")
        server.execute(f"CREATE USER `{name}` {how}")
        if name != "no rights":
            rights = "SELECT" if name == "read only" else "ALL"
            server.execute(f"GRANT {rights} ON strange.* TO `{name}`")
    return {name: (name, "x") for name in made} | {"a wrong password": (server.user[0], "wrong")}


def test_strange_accounts_end_no_command_in_a_traceback(
    mysql_server: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = mysql_server.create_database("strange")
    mysql_server.execute(POSTS, "strange")
    mysql_server.execute(f"CREATE TABLE people ({KEY}, {WORDS})", "strange")
    use(monkeypatch, url, tmp_path)
    assert ran("migrate").exit_code == 0
    where = url.rpartition("@")[2]
    for strange, (user, password) in _accounts(mysql_server).items():
        monkeypatch.setenv("DATABASE_URL", f"mysql://{quote(user)}:{password}@{where}")
        results = all_ran()
        if strange not in ("read only", "one connection", "another plugin"):
            assert "FAIL database" in results["check"].output, strange
        if strange == "another plugin" and mysql_server.flavour == "mariadb":
            assert "mysql_native_password" in results["check"].output
            assert '"not_ready"' in served(ready_or_told, tmp_path)


def test_nobody_asks_for_a_lock_that_a_cluster_cannot_keep(
    mysql_server: Managed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, mysql_server.create_database("strange"), tmp_path)
    mysql_server.execute(POSTS, "strange")
    mysql_server.execute(f"CREATE TABLE people ({KEY}, {WORDS})", "strange")
    mysql_server.execute("SET GLOBAL log_output = 'TABLE'")
    mysql_server.execute("SET GLOBAL general_log = ON")
    try:
        all_ran()
        served(ready_or_told, tmp_path)
        heard = mysql_server.execute(
            "SELECT COUNT(*), SUM(argument REGEXP 'get_lock|release_lock|lock tables')"
            " FROM mysql.general_log WHERE argument NOT LIKE '%general_log%'"
        )
    finally:
        mysql_server.execute("SET GLOBAL general_log = OFF")
        mysql_server.execute("TRUNCATE mysql.general_log")
    ((statements, locks),) = heard
    assert statements > 100
    assert locks == 0


@pytest.mark.parametrize("level", ["", "debug"])
def test_what_nobody_foresaw_is_a_sentence(level: str) -> None:
    """A command that fails as none should, in a process of its own."""
    script = (
        "from clerk_sync import cli\n"
        "@cli.cli.command()\n"
        "def odd() -> None:\n"
        "    raise KeyError('ada@example.com')\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "odd"],
        env=os.environ | {"LOG_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == ("ada@" in done.stderr) == (level == "debug")
    if not level:
        assert done.stderr.startswith("clerk-sync: KeyError in ")
        assert done.stderr.count("\n") == 1
        assert "LOG_LEVEL=debug" in done.stderr
