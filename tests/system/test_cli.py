"""The commands, as people type them: what they say, what they change, how they exit."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from click.testing import CliRunner, Result
from svix.webhooks import Webhook

from clerk_sync import __version__
from clerk_sync.clerk import samples, signature
from clerk_sync.cli import COMMANDS, cli

SECRET = "whsec_" + base64.b64encode(b"the secret of these tests").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"the secret of another one").decode()
LONG_AGO = 1_600_000_000
PEOPLE = """\
tables:
  user:
    table: people
    key: clerk_id
    columns:
      username: username
      email: primary_email
"""


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and an environment of its own, with a secret and nothing else set."""
    for name in list(os.environ):
        if name.startswith(("CLERK_", "DATABASE_", "LOG_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLERK_WEBHOOK_SIGNING_SECRET", SECRET)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*arguments: str, stdin: str | None = None, **env: str | None) -> Result:
    result = CliRunner().invoke(cli, arguments, env=env, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def subprocess_run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "clerk_sync", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("name", "summary"), [(name, one[1]) for name, one in COMMANDS.items()])
def test_the_summary_of_a_command_is_how_its_help_begins(name: str, summary: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert " ".join((command.help or "").split()).startswith(summary)
    assert summary in " ".join(run("--help").stdout.split())


def test_help_imports_no_command() -> None:
    """All of them together take a second, of which people and completions would wait."""
    script = (
        "import sys\n"
        "from clerk_sync.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "assert not {'sqlalchemy', 'aiohttp', 'pydantic'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def query(sql: str) -> list[Any]:
    connection = sqlite3.connect("clerk-sync.db")
    try:
        rows = connection.execute(sql).fetchall()
        connection.commit()
        return rows
    finally:
        connection.close()


def people_with(**columns: str) -> None:
    """The app's own table, as the mapping PEOPLE names it."""
    types = {"clerk_id": "VARCHAR(128) UNIQUE", "email": "TEXT"} | columns
    query(f"CREATE TABLE people ({', '.join(f'{name} {types[name]}' for name in types)})")


def line_of(
    event: dict[str, Any] | bytes,
    svix_id: str,
    *,
    at: int = LONG_AGO,
    secret: str = SECRET,
    name: str = "svix",
) -> str:
    """One line as Clerk's own CLI listener prints it."""
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    sent_at = datetime.fromtimestamp(at, tz=UTC)
    headers = {
        f"{name.title()}-Id": svix_id,
        f"{name}-timestamp": str(at),
        f"{name}-signature": Webhook(secret).sign(svix_id, sent_at, body.decode()),
        "content-type": "application/json",
    }
    return json.dumps({"headers": headers, "body_b64": base64.b64encode(body).decode()})


def user(type_: str = "user.created", clerk_id: str = "user_1", **data: Any) -> dict[str, Any]:
    event = samples.event(type_, clerk_id=clerk_id, now_ms=LONG_AGO * 1000)
    event["data"] |= data
    return event


class Receiver:
    """A server on this machine that keeps what it is sent."""

    def __init__(self, status: int) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append((self.command, self.path, headers, body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b'{"outcome": "applied"}')

            do_GET = do_POST = answer  # noqa: N815 -- the base class's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    one = Receiver(getattr(request, "param", 200))
    yield one
    one.close()


# Help


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


@pytest.mark.parametrize("path", [(), *commands(cli)], ids=" ".join)
def test_every_command_has_help_that_ends_with_an_example(path: tuple[str, ...]) -> None:
    result = run(*path, "--help", CLERK_WEBHOOK_SIGNING_SECRET=None)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    example = re.search(r"\n  Example:\n    .*clerk-sync (.+)\n\Z", result.stdout)
    assert example
    assert example[1].startswith(" ".join(path))
    assert all(len(line) <= 110 for line in result.stdout.splitlines())


def test_the_commands_are_those_of_the_design() -> None:
    assert {
        "serve",
        "migrate",
        "check",
        "trigger",
        "replay",
        "quarantine",
        "quarantine list",
        "quarantine replay",
        "quarantine drop",
    } <= {" ".join(path) for path in commands(cli)}


def test_it_runs_as_a_module() -> None:
    done = subprocess_run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"clerk-sync, version {__version__}\n"


@pytest.mark.parametrize("command", [["migrate"], ["check"], ["quarantine", "list"]])
def test_sigterm_ends_a_command_that_waits(command: list[str]) -> None:
    """As the first process of a container it would be ignored, if nobody asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        env = {**os.environ, "DATABASE_URL": f"mysql://u:p@127.0.0.1:{port}/app"}
        with subprocess.Popen([sys.executable, "-m", "clerk_sync", *command], env=env) as waiting:
            connection, _ = silent.accept()  # it waits for a greeting now
            waiting.terminate()
            assert waiting.wait(timeout=20) == 143
            connection.close()


def test_a_command_that_is_none_is_told_with_exit_code_2() -> None:
    result = run("sevre")
    assert result.exit_code == 2
    assert "No such command 'sevre'" in result.stderr


# Faults


@pytest.mark.parametrize(
    "arguments", [("serve",), ("trigger", "user.created"), ("replay", "-")], ids=" ".join
)
def test_without_a_secret_nothing_starts(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, CLERK_WEBHOOK_SIGNING_SECRET=None)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("clerk-sync: CLERK_WEBHOOK_SIGNING_SECRET: is not set: copy")
    assert "CLERK_WEBHOOK_SIGNING_SECRET_FILE" in result.stderr


def test_the_real_process_refuses_too() -> None:
    done = subprocess_run("serve", CLERK_WEBHOOK_SIGNING_SECRET="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("clerk-sync: CLERK_WEBHOOK_SIGNING_SECRET: is not set")
    assert done.stderr.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("variable", "secret", "told"),
    [
        ("CLERK_WEBHOOK_SIGNING_SECRET", "hunter2", "secret 1 of 1 is not `whsec_` and base64"),
        ("CLERK_WEBHOOK_SIGNING_SECRET", f"{SECRET} hunter2", "secret 2 of 2 is not `whsec_`"),
        ("CLERK_WEBHOOK_SIGNING_SECRET", " ,", "is empty: paste"),
        ("CLERK_WEBHOOK_SIGNING_SECRET_FILE", "nowhere", "nowhere: No such file or directory"),
        ("CLERK_WEBHOOK_SIGNING_SECRET_FILE", "empty", "empty: is empty"),
    ],
)
def test_with_a_secret_that_is_none_nothing_starts(variable: str, secret: str, told: str) -> None:
    Path("empty").touch()
    result = run("serve", **{"CLERK_WEBHOOK_SIGNING_SECRET": None, variable: secret})
    assert result.exit_code == 1
    assert result.stderr.startswith(f"clerk-sync: {variable}: {told}")
    assert "hunter2" not in result.output


def test_several_faults_are_told_at_once() -> None:
    Path("m.yaml").write_text("tables: {usr: {}, user: {}}")
    result = run(
        "serve",
        CLERK_WEBHOOK_SIGNING_SECRET=None,
        DATABASE_URL="postgres://u:hunter2@h/db",
        CLERK_SYNC_CONFIG="m.yaml",
    )
    assert result.exit_code == 1
    told = [line.split(": ")[1:3] for line in result.stderr.splitlines()]
    assert told == [
        ["DATABASE_URL", "has the scheme `postgres`"],
        ["CLERK_WEBHOOK_SIGNING_SECRET", "is not set"],
        *[["CLERK_SYNC_CONFIG", "m.yaml:1"]] * 4,
    ]
    assert "did you mean `user`?" in result.stderr
    assert "hunter2" not in result.output


def test_several_settings_that_cannot_be_are_told_at_once() -> None:
    result = run("serve", CLERK_SYNC_PORT="http", LOG_LEVEL="loud")
    assert result.exit_code == 1
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        "CLERK_SYNC_PORT",
        "LOG_LEVEL",
    ]


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess_run(
            "serve",
            CLERK_SYNC_HOST="127.0.0.1",
            CLERK_SYNC_PORT="0",
            CLERK_SYNC_INTERNAL_PORT=str(taken.getsockname()[1]),
        )
    assert done.returncode == 1
    assert "clerk-sync: cannot listen: " in done.stderr
    assert "Traceback" not in done.stderr


# migrate and check


def test_check_fails_before_migrate_and_passes_after() -> None:
    before = run("check")
    assert before.exit_code == 1
    assert "FAIL database  sqlite clerk-sync.db: the file does not exist yet: run `clerk-sync" in (
        before.stdout
    )
    assert not Path("clerk-sync.db").exists()
    assert run("migrate").exit_code == 0
    after = run("check")
    assert after.exit_code == 0, after.output
    assert "FAIL" not in after.stdout
    assert [line[5:14].strip() for line in after.stdout.splitlines()] == [
        "settings",
        "settings",
        "secrets",
        "mapping",
        "database",
        "schema",
        "clerk key",
    ]


def test_migrate_again_finds_nothing_to_do() -> None:
    assert "nothing to do" not in run("migrate").stdout
    assert run("migrate").stdout == "nothing to do\n"


def test_migrate_print_changes_nothing_and_is_what_migrate_would_do() -> None:
    printed = run("migrate", "--print")
    assert printed.exit_code == 0
    assert query("SELECT name FROM sqlite_master") == []
    connection = sqlite3.connect("clerk-sync.db")
    connection.executescript(printed.stdout)
    connection.close()
    assert run("check").exit_code == 0
    by_print = query("SELECT name FROM sqlite_master ORDER BY name")
    Path("clerk-sync.db").unlink()
    run("migrate")
    by_migrate = query("SELECT name FROM sqlite_master ORDER BY name")
    assert by_print == by_migrate


def test_migrate_print_of_a_finished_schema_is_a_comment() -> None:
    run("migrate")
    tables = query("SELECT * FROM sqlite_master ORDER BY name")
    assert run("migrate", "--print").stdout.startswith("-- Nothing to do")
    assert query("SELECT * FROM sqlite_master ORDER BY name") == tables


def test_migrate_needs_no_secret() -> None:
    assert run("migrate", CLERK_WEBHOOK_SIGNING_SECRET=None).exit_code == 0


def test_check_tells_every_fault_on_a_line() -> None:
    Path("m.yaml").write_text("tables: {user: {table: t, key: k, columns: {a: 'x |', b: ''}}}")
    result = run(
        "check",
        CLERK_WEBHOOK_SIGNING_SECRET="hunter2",
        CLERK_SYNC_CONFIG="m.yaml",
        DATABASE_URL="mysql://u:hunter2@127.0.0.1:1/db",
    )
    assert result.exit_code == 1
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["secrets", "mapping", "mapping", "database"]
    assert "mysql 127.0.0.1:1/db" in result.stdout
    assert "hunter2" not in result.output


def test_check_tells_a_misspelt_column_with_its_line_and_the_nearest() -> None:
    people_with(usernam="TEXT")
    Path("m.yaml").write_text(PEOPLE)
    run("migrate", CLERK_SYNC_CONFIG="m.yaml")
    result = run("check", CLERK_SYNC_CONFIG="m.yaml")
    assert result.exit_code == 1
    assert (
        "FAIL schema    m.yaml:6: table `people` has no column `username`; "
        "did you mean `usernam`?" in result.stdout
    )


def test_check_warns_of_a_field_that_clerk_does_not_have() -> None:
    people_with(username="TEXT")
    Path("m.yaml").write_text(PEOPLE.replace("primary_email", "primary_mail"))
    run("migrate", CLERK_SYNC_CONFIG="m.yaml")
    result = run("check", CLERK_SYNC_CONFIG="m.yaml")
    assert result.exit_code == 0
    assert "warn mapping   m.yaml:7: `primary_mail` is no field" in result.stdout
    assert "did you mean `primary_email`?" in result.stdout


def test_check_and_migrate_try_a_row_and_leave_none() -> None:
    people_with(username="INTEGER")
    Path("m.yaml").write_text(PEOPLE)
    told = (
        "m.yaml:6: `username` of `people` is INTEGER, and does not take what `username` gives, "
        "such as 'ada_"
    )
    migrated = run("migrate", CLERK_SYNC_CONFIG="m.yaml")
    assert (migrated.exit_code, told in migrated.stderr) == (1, True)
    checked = run("check", CLERK_SYNC_CONFIG="m.yaml")
    assert (checked.exit_code, f"FAIL schema    {told}" in checked.stdout) == (1, True)
    off = {"CLERK_SYNC_CONFIG": "m.yaml", "CLERK_SYNC_PROBE_ROWS": "false"}
    assert run("migrate", **off).exit_code == 0
    untried = run("check", **off)
    assert untried.exit_code == 0
    assert "ok   schema    as the mapping needs it\n" in untried.stdout
    assert (
        "warn schema    no probe row was written, because CLERK_SYNC_PROBE_ROWS is false"
        in untried.stdout
    )
    query("DROP TABLE people")
    people_with(username="TEXT")
    tried = run("check", CLERK_SYNC_CONFIG="m.yaml")
    assert tried.exit_code == 0
    assert (
        "ok   schema    as the mapping needs it; written, read back and rolled back: people\n"
        in tried.stdout
    )
    for name in ("people", "clerk_sync_entities", "clerk_sync_events"):
        assert query(f"SELECT COUNT(*) FROM {name}") == [(0,)]


@pytest.mark.parametrize(
    ("receiver", "exit_code", "told"),
    [
        (200, 0, "ok   clerk key Clerk accepts it"),
        (401, 1, "FAIL clerk key CLERK_SECRET_KEY: Clerk answers 401: copy the"),
        (500, 1, "FAIL clerk key CLERK_API_URL: Clerk answers 500"),
    ],
    indirect=["receiver"],
)
def test_check_asks_clerk_about_the_key(receiver: Receiver, exit_code: int, told: str) -> None:
    run("migrate")
    result = run("check", CLERK_SECRET_KEY="sk_test_hunter2", CLERK_API_URL=receiver.url)
    assert told in result.stdout
    assert result.exit_code == exit_code
    ((method, path, headers, _),) = receiver.requests
    assert (method, path) == ("GET", "/users/count")
    assert headers["authorization"] == "Bearer sk_test_hunter2"
    assert "hunter2" not in result.output


# trigger


def test_trigger_posts_a_signed_realistic_event(receiver: Receiver) -> None:
    result = run("trigger", "user.created", "--id", "user_ada", "--url", f"{receiver.url}/hook")
    assert result.exit_code == 0, result.output
    ((method, path, headers, body),) = receiver.requests
    assert (method, path) == ("POST", "/hook")
    now = datetime.now(UTC).timestamp()
    delivery = signature.verify(headers, body, signers=signature.signers(SECRET), now=now)
    event = json.loads(body)
    assert (event["type"], event["data"]["id"]) == ("user.created", "user_ada")
    assert event["data"]["email_addresses"]
    assert result.stdout == (
        f'user.created user_ada as {delivery.id}: 200 {{"outcome": "applied"}}\n'
    )


def test_trigger_posts_to_the_service_on_this_machine(receiver: Receiver) -> None:
    port = receiver.url.rpartition(":")[2]
    result = run(
        "trigger", "user.deleted", CLERK_SYNC_PORT=port, CLERK_SYNC_WEBHOOK_PATH="/hooks/clerk"
    )
    assert result.exit_code == 0
    assert receiver.requests[0][1] == "/hooks/clerk"


def test_trigger_is_of_the_instance_that_is_accepted(receiver: Receiver) -> None:
    run("trigger", "user.created", "--url", receiver.url, CLERK_INSTANCE_ID="ins_mine")
    run("trigger", "user.created", "--url", receiver.url)
    mine, other = (json.loads(body)["instance_id"] for _, _, _, body in receiver.requests)
    assert mine == "ins_mine"
    assert other.startswith("ins_")


def test_trigger_signs_with_the_first_of_several_secrets(receiver: Receiver) -> None:
    secrets = f"{OTHER_SECRET},{SECRET}"
    run("trigger", "user.deleted", "--url", receiver.url, CLERK_WEBHOOK_SIGNING_SECRET=secrets)
    _, _, headers, body = receiver.requests[0]
    assert signature.recorded(headers, body, signers=signature.signers(OTHER_SECRET))


@pytest.mark.parametrize("receiver", [401, 503], indirect=True)
def test_trigger_fails_when_it_is_not_answered_2xx(receiver: Receiver) -> None:
    result = run("trigger", "user.created", "--url", receiver.url)
    assert result.exit_code == 1
    assert re.search(r": (401|503) \{", result.stdout)


def test_trigger_says_that_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run("trigger", "user.created", CLERK_SYNC_PORT=str(port))
    assert result.exit_code == 1
    assert result.stderr.endswith("is the service running there?\n")
    assert f"http://127.0.0.1:{port}/webhooks/clerk: ClientConnectorError" in result.stderr


def test_trigger_tells_the_nearest_type() -> None:
    result = run("trigger", "user.create")
    assert result.exit_code == 1
    assert result.stderr == (
        "clerk-sync: Clerk has no event type `user.create`; did you mean `user.created`?\n"
    )


def test_trigger_sends_a_file_of_data_in_an_envelope(receiver: Receiver) -> None:
    Path("data.json").write_text('{"id": "user_1", "username": "Zoë"}')
    arguments = ("trigger", "user.updated", "--file", "data.json", "--url", receiver.url)
    assert run(*arguments).exit_code == 0
    assert run(*arguments, "--id", "user_2").exit_code == 0
    first, second = (json.loads(body) for _, _, _, body in receiver.requests)
    assert first["type"] == "user.updated"
    assert first["data"] == {"id": "user_1", "username": "Zoë"}
    assert second["data"]["id"] == "user_2"


def test_trigger_sends_a_file_of_a_whole_event_as_it_is(receiver: Receiver) -> None:
    event = {"type": "x.y", "data": None, "timestamp": "odd"}
    Path("event.json").write_text(json.dumps(event))
    assert (
        run("trigger", "user.updated", "--file", "event.json", "--url", receiver.url).exit_code == 0
    )
    assert json.loads(receiver.requests[0][3]) == event


@pytest.mark.parametrize("content", [b"{", b"[]", b"7", b"\xff"])
def test_trigger_refuses_a_file_that_is_no_event(content: bytes) -> None:
    Path("x.json").write_bytes(content)
    result = run("trigger", "user.updated", "--file", "x.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("clerk-sync: x.json: ")


# replay


def test_replay_applies_what_was_recorded_whatever_its_age() -> None:
    run("migrate")
    lines = [line_of(user(), "msg_1"), line_of(user(clerk_id="user_2"), "msg_2", name="webhook")]
    Path("deliveries.ndjson").write_text("\n\n".join(lines) + "\n")
    result = run("replay", "deliveries.ndjson")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "2 applied"
    assert query("SELECT clerk_id FROM clerk_users ORDER BY clerk_id") == [
        ("user_1",),
        ("user_2",),
    ]


def test_replay_again_is_all_duplicates() -> None:
    run("migrate")
    lines = f"{line_of(user(), 'msg_1')}\n"
    assert run("replay", "-", stdin=lines).exit_code == 0
    again = run("replay", "-", stdin=lines * 2)
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (0, "2 duplicate")


def test_replay_tells_the_outcome_of_each_line() -> None:
    run("migrate")
    good = line_of(user(), "msg_1")
    lines = {
        "applied": good,
        "duplicate": good,
        "rejected malformed": "{",
        "rejected wrong": line_of(user(), "msg_2", secret=OTHER_SECRET),
        "rejected missing": json.dumps(json.loads(good) | {"headers": {}}),
        "ignored": line_of(user("session.created"), "msg_3"),
        "quarantined bad_id": line_of(user(id=None), "msg_4"),
        "quarantined bad_json": line_of(b"{", "msg_5"),
    }
    result = run("replay", "-", stdin="\n".join(lines.values()))
    assert result.exit_code == 1
    *told, summary = result.stdout.splitlines()
    assert sorted(told) == sorted(
        f"line {number}: {outcome}" for number, outcome in enumerate(lines, start=1)
    )
    assert summary == "1 applied, 1 duplicate, 1 ignored, 2 quarantined, 3 rejected"


@pytest.mark.parametrize(
    "broken",
    [
        "nope",
        "[]",
        "7",
        "null",
        "{}",
        '{"headers": {}}',
        '{"headers": [], "body_b64": ""}',
        '{"headers": {}, "body_b64": 7}',
        '{"headers": {}, "body_b64": "***"}',
        '{"headers": {}, "body_b64": "ключ"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "\x00",
        "\udcff\udcfe",
    ],
    ids=lambda text: repr(text)[:20],
)
def test_replay_goes_on_after_a_line_that_is_none(broken: str) -> None:
    run("migrate")
    Path("x").write_bytes(
        f"{broken}\n{line_of(user(), 'msg_1')}\n".encode(errors="surrogateescape")
    )
    result = run("replay", "x")
    assert result.exit_code == 1
    assert sorted(result.stdout.splitlines()) == sorted(
        ["line 1: rejected malformed", "line 2: applied", "1 applied, 1 rejected"]
    )


def test_replay_of_another_instances_deliveries_is_rejected() -> None:
    run("migrate")
    result = run("replay", "-", stdin=line_of(user(), "msg_1"), CLERK_INSTANCE_ID="ins_mine")
    assert result.exit_code == 1
    assert "line 1: rejected instance" in result.stdout


def test_replay_of_nothing_is_fine() -> None:
    run("migrate")
    result = run("replay", "-", stdin="\n\n")
    assert (result.exit_code, result.stdout) == (0, "none\n")


def test_replay_into_a_database_that_is_not_migrated_says_so() -> None:
    result = run("replay", "-", stdin=line_of(user(), "msg_1"))
    assert result.exit_code == 1
    assert "run `clerk-sync migrate`" in result.stderr


def test_replay_shows_nothing_private_even_when_the_database_refuses() -> None:
    people_with(username="TEXT", email="TEXT UNIQUE")
    Path("m.yaml").write_text(PEOPLE)
    run("migrate", CLERK_SYNC_CONFIG="m.yaml")
    query("INSERT INTO people (clerk_id, email) VALUES ('user_0', 'ada@example.com')")
    event = user(
        primary_email_address_id="idn_1",
        email_addresses=[{"id": "idn_1", "email_address": "ada@example.com"}],
    )
    Path("x").write_text(line_of(event, "msg_1"))
    done = subprocess_run("replay", "x", CLERK_SYNC_CONFIG="m.yaml")
    assert done.returncode == 0
    *logged, told, summary = done.stdout.splitlines()
    assert (told, summary) == ("line 1: quarantined conflict", "1 quarantined")
    assert [json.loads(line)["event"] for line in logged] == ["rejected_by_database"]
    assert "ada@" not in done.stdout + done.stderr


# quarantine


@pytest.fixture
def too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose column is too short for `msg_1`, and has none null, as `msg_2` needs."""
    people_with(username="VARCHAR(5) NOT NULL")
    Path("m.yaml").write_text(PEOPLE)
    monkeypatch.setenv("CLERK_SYNC_CONFIG", "m.yaml")
    run("migrate")
    lines = [
        line_of(user(username="adalovelace"), "msg_1"),
        line_of(user(clerk_id="user_2", username=None), "msg_2"),
        line_of(user(clerk_id="user_3", username="bob"), "msg_3"),
    ]
    result = run("replay", "-", stdin="\n".join(lines))
    assert result.exit_code == 0
    assert sorted(result.stdout.splitlines()) == sorted(
        [
            "line 1: quarantined too_long",
            "line 2: quarantined not_null",
            "line 3: applied",
            "1 applied, 2 quarantined",
        ]
    )
    assert query("SELECT clerk_id FROM people") == [("user_3",)]


def mended() -> None:
    query("DROP TABLE people")
    people_with(username="VARCHAR(50) NOT NULL")


def listed() -> list[dict[str, Any]]:
    result = run("quarantine", "list", "--json")
    assert result.exit_code == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.usefixtures("too_short")
def test_quarantine_list_says_what_is_there_and_why() -> None:
    result = run("quarantine", "list", CLERK_WEBHOOK_SIGNING_SECRET=None)
    assert result.exit_code == 0
    first, second = sorted(result.stdout.splitlines(), key=lambda line: line[-5:])
    assert re.fullmatch(r"\S+ \S+  too_long +column username +user\.created +user_1  msg_1", first)
    assert re.fullmatch(r"\S+ \S+  not_null +column \w+ +user\.created +user_2  msg_2", second)
    assert "adalovelace" not in result.stdout


@pytest.mark.usefixtures("too_short")
def test_quarantine_list_as_json_has_the_payloads() -> None:
    kept = {one["svix_id"]: one for one in listed()}
    assert kept.keys() == {"msg_1", "msg_2"}
    assert json.loads(kept["msg_1"]["payload"])["data"]["username"] == "adalovelace"
    assert kept["msg_1"]["reason"] == "too_long"


def test_half_a_character_is_told_and_listed_and_stays() -> None:
    run("migrate")
    lines = [line_of(user(first_name="cut \ud83d"), "msg_1"), line_of(user(x="\ud83d"), "msg_2")]
    done = run("replay", "-", stdin="\n".join(lines))
    assert sorted(done.stdout.splitlines()) == [
        "1 applied, 1 quarantined",
        "line 1: quarantined wrong_type",
        "line 2: applied",
    ]
    (kept,) = listed()
    assert (kept["type"], kept["clerk_id"]) == ("user.created", "user_1")
    assert (kept["reason"], kept["detail"]) == ("wrong_type", "column first_name")
    assert json.loads(kept["payload"])["data"]["first_name"] == "cut \ud83d"
    assert "user_1  msg_1" in run("quarantine", "list").stdout
    assert run("quarantine", "replay", "--all").exit_code == 1
    assert len(listed()) == 1


@pytest.mark.usefixtures("too_short")
def test_quarantine_replay_of_what_is_not_mended_keeps_it() -> None:
    result = run("quarantine", "replay", "--all")
    assert result.exit_code == 1
    assert "msg_1: quarantined too_long" in result.stdout
    assert len(listed()) == 2


@pytest.mark.usefixtures("too_short")
def test_quarantine_replay_applies_what_was_mended() -> None:
    mended()
    one = run("quarantine", "replay", "msg_1", CLERK_WEBHOOK_SIGNING_SECRET=None)
    assert (one.exit_code, one.stdout) == (0, "msg_1: applied\n1 applied\n")
    assert query("SELECT clerk_id, username FROM people") == [("user_1", "adalovelace")]
    assert [kept["svix_id"] for kept in listed()] == ["msg_2"]
    rest = run("quarantine", "replay", "--all")
    assert rest.exit_code == 1
    assert "msg_2: quarantined not_null" in rest.stdout


@pytest.mark.usefixtures("too_short")
def test_quarantine_drop_forgets_for_good() -> None:
    result = run("quarantine", "drop", "msg_1", "msg_2", "msg_1")
    assert (result.exit_code, result.stdout) == (0, "dropped 2 of 2\n")
    assert listed() == []
    assert run("quarantine", "list").stdout == "the quarantine is empty\n"
    again = run("quarantine", "drop", "msg_1")
    assert (again.exit_code, again.stdout) == (1, "dropped 0 of 1\n")
    assert query("SELECT outcome FROM clerk_sync_events WHERE svix_id = 'msg_1'") == [
        ("quarantined",)
    ]


@pytest.mark.usefixtures("too_short")
def test_quarantine_replay_of_what_is_not_there_fails() -> None:
    result = run("quarantine", "replay", "msg_9")
    assert result.exit_code == 1
    assert "msg_9: is not in quarantine" in result.stdout


def test_quarantine_replay_of_what_was_never_kept_leaves_it() -> None:
    run("migrate")
    run("replay", "-", stdin=line_of(b'{"type": "email.created", "data": {"code": 1', "msg_1"))
    assert [(one["reason"], one["payload"]) for one in listed()] == [("bad_json", None)]
    result = run("quarantine", "replay", "--all")
    assert result.exit_code == 1
    assert "msg_1: quarantined bad_json" in result.stdout
    assert len(listed()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("quarantine", "drop", "\udcff"),
        ("quarantine", "replay", "msg_1", "\udcff"),
        ("ensure", "user_\udcff"),
        ("erase", "user_\udcff"),
        ("trigger", "user.\udcff"),
        ("trigger", "user.created", "--id", "\udcff"),
        ("trigger", "user.created", "--url", "http://\udcff/"),
        ("probe", "--url", "http://\udcff/"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_arguments_that_are_not_utf_8_are_told(arguments: tuple[str, ...]) -> None:
    """So the shell's raw bytes come to a command."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "is not UTF-8" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("msg_1", "--all")])
def test_quarantine_replay_needs_either_names_or_all(arguments: tuple[str, ...]) -> None:
    result = run("quarantine", "replay", *arguments)
    assert result.exit_code == 1
    assert "name the events (clerk-sync quarantine list), or give --all" in result.stderr


def test_quarantine_without_a_schema_fails_without_a_traceback() -> None:
    for arguments in (("list",), ("drop", "msg_1"), ("replay", "--all")):
        result = run("quarantine", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("clerk-sync: ")
