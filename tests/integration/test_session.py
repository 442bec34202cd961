"""What a server imposes on its clients changes nothing: no letter, no promise, nobody else's row.

A server may give every session another character set or mode than the driver and our statements
take for granted: by its configuration, by SET GLOBAL, or by an `init_connect`, which it runs for
every user who has no special rights.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import pytest

from clerk_sync.database.connection import Statement, connect, engine_of
from clerk_sync.database.errors import (
    DatabaseUnavailable,
    RejectedByDatabase,
    translate_engine_errors,
)
from clerk_sync.database.url import target_of
from clerk_sync.outcomes import Reason
from clerk_sync.store.values import as_text
from tests import clerk_api, deliveries
from tests.deliveries import event, served, serving, settings_of
from tests.histories import Database, mapped
from tests.system.test_backfill import KEY, Site
from tests.system.test_trouble import found_by_check, login_of
from tools.servers import Managed, query, url_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.conftest import Servers
    from tests.deliveries import At

_numbers: Final = itertools.count(1)


@contextmanager
def imposing(server: Managed, values: Mapping[str, str]) -> Iterator[None]:
    """Impose these global variables, given as SQL."""
    before = {name: server.execute(f"SELECT @@global.{name}")[0][0] for name in values}
    try:
        for name, value in values.items():
            server.execute(f"SET GLOBAL {name} = {value}")
        yield
    finally:
        for name, value in before.items():
            server.execute(f"SET GLOBAL {name} = {value!r}")


@contextmanager
def plain_user(server: Managed) -> Iterator[str]:
    """Make a database, and a user of it whom no `init_connect` spares; its URL."""
    name = f"clerk_sync_session_{next(_numbers)}"
    server.create_database(name)
    yield login_of(server, name, may="ALL")
    server.execute(f"DROP USER {name}")
    server.drop_database(name)


# Character sets

PEOPLE: Final = """
tables:
  user:
    table: people
    key: clerk_id
    adopt: {username: username}
    columns: {username: username, name: first_name, note: last_name}
    owns:
      - {table: notes, column: author, references: username}
"""
PEOPLE_TABLES: Final = (
    """CREATE TABLE people (id SERIAL, clerk_id VARCHAR(128) EXACT UNIQUE,
        username VARCHAR(128) EXACT, name VARCHAR(128), note VARCHAR(128),
        plan VARCHAR(16) NOT NULL DEFAULT 'free', KEY (username)) OPTIONS""",
    "CREATE TABLE notes (id SERIAL, author VARCHAR(128) EXACT) OPTIONS",
)
# Where UTF-8 is read as gbk or big5, the last byte of 中 swallows the backslash before the quote;
# as sjis, that of あ. In these sets themselves, 表 ソ 功 end with the byte of a backslash.
ATTACK: Final = "{}',null);UPDATE people SET plan=0x61646d696e;COMMIT;-- "
NAMES: Final = (
    *(ATTACK.format(one) for one in ("中", "あ", "é", "\xbf", "")),
    *("中'", "あ'", "中\\", "あ\\", "表'", "ソ\\", "功", "許功蓋", "\xbf'", "¥'", "\xa5\\", "₩'"),
    *("Zoë", "Zoë 😀", "trailing\\", "\\\\", "\\'", "'", "''", '"', "`", "O'Hara"),
    *("a\0b", "\x1a", "a\nb\r\t\b", "%s", "%(x)s %%", ";", "-- ", "/*", "#", "?", ":x", "{x}"),
    *("\x7f\x80\x9f", "\ufeff", "\u2028", "\ufffd", "e\u0301", "\U0010ffff", " ", "0x27", "\\0"),
)
People = dict[str | None, list[str | None]]
Command = Callable[..., Awaitable[str]]
CHARSETS: Final = ("gbk", "big5", "sjis", "latin1", "utf8mb3")


def hexed(text: str | None) -> str | None:
    return None if text is None else text.encode().hex().upper()


def literal(text: str) -> str:
    """Write the text as SQL that every character set reads the same."""
    return f"CONVERT(0x{text.encode().hex()} USING utf8mb4)"


async def people(url: str) -> People:
    """Return Clerk id → username, name and note in hex, and the plan."""
    found = await query(
        url, "SELECT clerk_id, HEX(username), HEX(name), HEX(note), plan FROM people"
    )
    assert len(found) == len({row[0] for row in found})
    return {clerk_id: row for clerk_id, *row in map(tuple, found)}


def row_of(username: str, name: str, note: str) -> list[str | None]:
    return [hexed(username), hexed(name), hexed(note), "free"]


async def note_by(url: str, *authors: str) -> None:
    await query(
        url, f"INSERT INTO notes (author) VALUES {','.join(f'({literal(a)})' for a in authors)}"
    )


async def authors(url: str) -> set[str]:
    return {author for (author,) in await query(url, "SELECT HEX(author) FROM notes")}


def saying(statement: str) -> dict[str, str]:
    """What makes the server say this for every user without special rights."""
    return {"init_connect": f'"{statement}"'}


def imposing_charset(server: Managed, how: str, charset: str) -> AbstractContextManager[None]:
    if how == "init_connect":
        return imposing(server, saying(f"SET NAMES {charset}"))
    # What the server takes for its clients' where it does not ask them.
    names = ("character_set_client", "character_set_connection", "character_set_results")
    return imposing(server, dict.fromkeys(names, charset))


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("how", ["init_connect", "handshake"])
async def test_no_imposed_charset_changes_a_letter_or_another_row(
    mysql_server: Managed, servers: Servers, how: str, charset: str, tmp_path: Path
) -> None:
    server = mysql_server
    if how == "handshake":
        if server.flavour == "mysql" and int(server.version.split(".")[0]) >= 9:
            pytest.skip("MySQL 9 has no such option any more")
        other = servers.having(server.flavour, "--skip-character-set-client-handshake")
        assert isinstance(other, Managed)
        server = other
    with plain_user(server) as url, imposing_charset(server, how, charset):
        ((imposed,),) = await query(url, "SELECT @@character_set_client")
        assert imposed.replace("mb3", "") == charset.replace("mb3", "")
        api = clerk_api.ClerkApi(key=KEY)
        async with api.serving():
            here = Site(api, url, tmp_path)
            tmp_path.joinpath("people.yaml").write_text(PEOPLE)
            try:
                await everything_that_takes_text(here, str(tmp_path / "people.yaml"))
            finally:
                here.close()


async def everything_that_takes_text(here: Site, config: str) -> None:
    """Events, reads, quarantine, backfill, reconcile, deletes, erase: each with every name."""

    async def command(*arguments: str, code: int = 0) -> str:
        done = await here.run(*arguments, CLERK_SYNC_CONFIG=config)
        assert done.code == code, done.out + done.err
        return done.out

    async with Database.at(here.url) as database:
        await database.ddl(*PEOPLE_TABLES)
    await command("migrate")
    await query(here.url, "INSERT INTO people (clerk_id, username) VALUES ('user_other', 'other')")
    await note_by(here.url, "other", *NAMES)
    expected: People = {"user_other": [hexed("other"), None, None, "free"]}
    settings = settings_of(here.url, CLERK_SYNC_DEADLINE_SECONDS=10)
    async with serving(settings, mapped(PEOPLE)) as at:
        await at.until_ready()
        await events(here.url, at, expected)
        await quarantine(here.url, at, command, expected)
        await deletes(here.url, at, expected)
    await what_the_api_brings(here, command, expected)
    # A person goes, and nobody else.
    left = await authors(here.url)
    await note_by(here.url, f"b{NAMES[0]}")
    assert "notes: removed 1" in await command("erase", "user_b0")
    del expected["user_b0"]
    assert await people(here.url) == expected
    assert await authors(here.url) == left


async def events(url: str, at: At, expected: People) -> None:
    # Every second one has been there before Clerk.
    for name in NAMES[::2]:
        await query(url, f"INSERT INTO people (username) VALUES ({literal(name)})")
    replies = await asyncio.gather(
        *(
            at.post(event("user.created", f"user_{n}", username=x, first_name=x, last_name=x))
            for n, x in enumerate(NAMES)
        )
    )
    assert {reply.said for reply in replies} == {(200, "applied", None)}
    expected |= {f"user_{n}": row_of(x, x, x) for n, x in enumerate(NAMES)}
    assert await people(url) == expected
    for n, name in enumerate(NAMES):
        reply = await at.inside(f"/profiles?username={quote(name, safe='')}")
        assert (reply.json["clerk_id"], reply.json["name"]) == (f"user_{n}", name)


async def quarantine(url: str, at: At, command: Command, expected: People) -> None:
    long, note = "x" * 200, "".join(NAMES)[:100]
    made = [
        event("user.updated", f"user_{n}", username=NAMES[n], first_name=long, last_name=note)
        for n in range(2)
    ]
    for number, one in enumerate(made):
        reply = await at.post(one, svix_id=f"msg'\"\\%s;{number}")
        assert reply.said == (200, "quarantined", "too_long")
    listed = (await command("quarantine", "list", "--json")).splitlines()
    assert [json.loads(json.loads(line)["payload"]) for line in listed] == made
    payloads = await query(url, "SELECT HEX(payload) FROM clerk_sync_quarantine")
    assert {bytes.fromhex(text) for (text,) in payloads} == {*map(deliveries.bytes_of, made)}
    assert await command("quarantine", "drop", "msg'\"\\%s;0") == "dropped 1 of 1\n"
    await query(url, "ALTER TABLE people MODIFY name VARCHAR(200) CHARACTER SET utf8mb4")
    assert "1 applied" in await command("quarantine", "replay", "--all")
    expected["user_1"] = row_of(NAMES[1], long, note)
    assert await people(url) == expected


async def deletes(url: str, at: At, expected: People) -> None:
    gone = [f"user_{n}" for n in range(0, len(NAMES), 3)]
    replies = await asyncio.gather(*(at.post(event("user.deleted", one)) for one in gone))
    assert {reply.said for reply in replies} == {(200, "applied", None)}
    for one in gone:
        del expected[one]
    assert await people(url) == expected
    assert await authors(url) == {username for username, *_ in expected.values()}


async def what_the_api_brings(here: Site, command: Command, expected: People) -> None:
    here.api.put_user("user_other", username="other", first_name=None, last_name=None)
    for n, name in enumerate(NAMES):
        kept, turned = f"user_{n}", NAMES[n - 1]
        if kept in expected:
            fields = {"username": name, "first_name": turned, "last_name": name}
            here.api.put_user(kept, updated_at=deliveries.now_ms(), **fields)
            expected[kept] = row_of(name, turned, name)
        here.api.put_user(f"user_b{n}", username=f"b{name}", first_name=name, last_name=turned)
        expected[f"user_b{n}"] = row_of(f"b{name}", name, turned)
    await command("backfill")
    assert await people(here.url) == expected
    await query(here.url, "UPDATE people SET note = 'x' WHERE clerk_id LIKE 'user\\_b%'")
    found = f"0 missing, 0 outdated, {len(NAMES)} drifted, 0 deleted"
    assert found in await command("reconcile", code=2)
    assert await people(here.url) == expected


UNADOPTED: Final = PEOPLE.replace("    adopt: {username: username}\n", "")


@pytest.mark.parametrize(("charset", "swallowing"), [("gbk", "中"), ("big5", "中"), ("sjis", "あ")])
async def test_no_name_becomes_a_statement(
    mysql_server: Managed, charset: str, swallowing: str
) -> None:
    with plain_user(mysql_server) as url, imposing(mysql_server, saying(f"SET NAMES {charset}")):
        async with Database.at(url) as database:
            await database.ddl(*PEOPLE_TABLES)
        await query(url, "INSERT INTO people (clerk_id) VALUES ('user_other')")
        async with served(url, mapped(UNADOPTED)) as at:
            name = ATTACK.format(swallowing)
            made = event("user.created", "user_1", username="ada", first_name=name, last_name=None)
            reply = await at.post(made, svix_id="msg_1")
        assert await query(url, "SELECT plan FROM people") == (("free",), ("free",))
        assert reply.said == (200, "applied", None)
        assert await deliveries.ledger(url) == {"msg_1": "applied"}
        assert (await people(url))["user_1"] == [hexed("ada"), hexed(name), None, "free"]


# Everything else that a session has


@dataclass(frozen=True)
class Probe:
    """What is imposed on every session, and SQL whose last result shows that it is not on ours."""

    sql: tuple[str, ...]
    shows: Any
    # Global variables as SQL, or what `init_connect` says.
    imposed: dict[str, str]
    only: str | None = None


TABLES: Final = (
    "CREATE TABLE numbered (id SERIAL) OPTIONS",
    """CREATE TABLE loose (author VARCHAR(9), shorty VARCHAR(3), padded CHAR(4) NOT NULL,
        CHECK (shorty <> 'bad')) OPTIONS""",
    "CREATE TABLE owner (id INT PRIMARY KEY) OPTIONS",
    """CREATE TABLE owned (id INT,
        FOREIGN KEY (id) REFERENCES owner (id) ON DELETE CASCADE) OPTIONS""",
    "INSERT INTO loose VALUES ('a', NULL, 'p'), ('b', NULL, 'p')",
    "INSERT INTO owner VALUES (1)",
    "INSERT INTO owned VALUES (1)",
)
_INSERTED: Final = "INSERT INTO loose VALUES ('c', NULL, 'p')"
_COUNT: Final = "SELECT COUNT(*) FROM loose"
_ISOLATION: Final = "SELECT @@{}_isolation"
PROBES: Final[dict[str, Probe]] = {
    "backslash": Probe(("SELECT HEX('a\\\\b')",), "615C62", {"sql_mode": "'NO_BACKSLASH_ESCAPES'"}),
    "quotes": Probe(('SELECT "author" FROM owner',), "author", {"sql_mode": "'ANSI_QUOTES'"}),
    "lax": Probe(("UPDATE loose SET shorty = 'long'",), RejectedByDatabase, {"sql_mode": "''"}),
    "padded": Probe(
        ("SELECT LENGTH(padded) FROM loose LIMIT 1",),
        1,
        {"sql_mode": "'PAD_CHAR_TO_FULL_LENGTH'"},
    ),
    "zero": Probe(("INSERT INTO numbered VALUES (0)", "SELECT id FROM numbered"), 0, {}),
    "oracle": Probe(("SELECT '' IS NULL",), 0, {"sql_mode": "'EMPTY_STRING_IS_NULL'"}, "mariadb"),
    "at once": Probe(
        (
            "UPDATE loose SET author = 'x', shorty = author WHERE author = 'a'",
            "SELECT shorty FROM loose WHERE author = 'x'",
        ),
        "x",
        {"sql_mode": "'SIMULTANEOUS_ASSIGNMENT'"},
        "mariadb",
    ),
    "time zone": Probe(
        ("SELECT UNIX_TIMESTAMP('1970-01-02 00:00:00') DIV 1",), 86_400, {"time_zone": "'-08:00'"}
    ),
    "autocommit": Probe((_INSERTED, "ROLLBACK", _COUNT), 2, {"autocommit": "1"}),
    "autocommit by init": Probe(
        (_INSERTED, "ROLLBACK", _COUNT), 2, {"autocommit": "0", **saying("SET autocommit = 1")}
    ),
    "completion": Probe(("COMMIT", _COUNT), 2, saying("SET completion_type = 'RELEASE'")),
    "lock wait": Probe(
        ("SELECT @@innodb_lock_wait_timeout",), 1, {"innodb_lock_wait_timeout": "50"}
    ),
    "foreign keys": Probe(
        ("DELETE FROM owner", "SELECT COUNT(*) FROM owned"), 0, {"foreign_key_checks": "0"}
    ),
    "unique": Probe(("SELECT @@unique_checks",), 1, {"unique_checks": "0"}),
    "checks": Probe(
        ("UPDATE loose SET shorty = 'bad'",),
        RejectedByDatabase,
        {"check_constraint_checks": "0"},
        "mariadb",
    ),
    "null": Probe(
        ("INSERT INTO numbered VALUES (NULL)", "SELECT COUNT(*) FROM numbered WHERE id IS NULL"),
        0,
        {"sql_auto_is_null": "1"},
    ),
    "safe": Probe(("DELETE FROM loose WHERE author = 'a'", _COUNT), 1, {"sql_safe_updates": "1"}),
    "big": Probe(("SELECT @@sql_big_selects",), 1, saying("SET sql_big_selects = 0")),
    "limit": Probe(("SELECT author FROM loose",), ["a", "b"], {"sql_select_limit": "1"}),
    "unquoted": Probe(("SELECT @@sql_quote_show_create",), 1, {"sql_quote_show_create": "0"}),
    "isolation": Probe(
        (_ISOLATION.format("transaction"),),
        "READ-COMMITTED",
        {"transaction_isolation": "'SERIALIZABLE'"},
        "mysql",
    ),
    "isolation of mariadb": Probe(
        (_ISOLATION.format("tx"),), "READ-COMMITTED", {"tx_isolation": "'SERIALIZABLE'"}, "mariadb"
    ),
    "reads only": Probe((_INSERTED, _COUNT), 3, saying("SET SESSION TRANSACTION READ ONLY")),
    "begun": Probe((_INSERTED, _COUNT), 3, saying("START TRANSACTION READ ONLY")),
    "elsewhere": Probe((_COUNT,), 2, saying("USE information_schema")),
    "charset": Probe(("SELECT CHAR_LENGTH('é')",), 1, saying("SET NAMES latin1")),
    "results": Probe(("SELECT 'é'",), "é", saying("SET character_set_results = latin1")),
}


async def by_driver(url: str, *sql: str) -> list[Any]:
    connection = await connect(target_of(url), seconds=5)
    try:
        # `%` is a format's, as in every Statement.
        steps = [(Statement(one.replace("%", "%%")), [()]) for one in sql]
        *_, last = await connection.run(steps)
        return [row[0] for row in last.rows]
    finally:
        connection.close()


async def by_engine(url: str, *sql: str) -> list[Any]:
    engine = engine_of(lambda: target_of(url), size=1)
    try:
        with translate_engine_errors():
            async with engine.connect() as connection:
                for one in sql:
                    last = await connection.exec_driver_sql(one)
                return [row[0] for row in last] if last.returns_rows else []
    finally:
        await engine.dispose()


async def with_tables(url: str) -> None:
    async with Database.at(url) as database:
        await database.ddl(*TABLES)


@pytest.mark.parametrize("way", [by_driver, by_engine])
@pytest.mark.parametrize("name", PROBES)
def test_no_imposed_property_reaches_our_sessions(
    mysql_server: Managed, name: str, way: Callable[..., Any]
) -> None:
    probe = PROBES[name]
    if probe.only not in (None, mysql_server.flavour):
        return
    with plain_user(mysql_server) as url:
        asyncio.run(with_tables(url))
        with imposing(mysql_server, probe.imposed):
            if isinstance(probe.shows, type):
                with pytest.raises((RejectedByDatabase, DatabaseUnavailable)):
                    asyncio.run(way(url, *probe.sql))
            else:
                shown = asyncio.run(way(url, *probe.sql))
                assert shown == (probe.shows if isinstance(probe.shows, list) else [probe.shows])


def test_a_database_may_have_any_name(mysql_server: Managed) -> None:
    name = "clerk`s 表é"
    quoted = name.replace("`", "``")
    mysql_server.execute(f"CREATE DATABASE `{quoted}`")
    url = url_of(mysql_server.user, mysql_server.host, mysql_server.port, name)
    try:
        for way in (by_driver, by_engine):
            assert asyncio.run(way(url, "SELECT DATABASE()")) == [name]
    finally:
        mysql_server.execute(f"DROP DATABASE `{quoted}`")


# A session that cannot be made ours


async def _pumped(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, old: bytes, new: bytes
) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(2**16):
            writer.write(data.replace(old, new))
            await writer.drain()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def relayed(
    url: str, *, version: bytes | None = None, statement: bytes = b"", becomes: bytes = b""
) -> AsyncIterator[str]:
    """Stand before the server, with another version, or another statement of the same length."""
    assert len(statement) == len(becomes)
    address = urlsplit(url)
    talks = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        theirs, ours = await asyncio.open_connection(address.hostname, address.port)
        head = await theirs.readexactly(4)
        greeting = await theirs.readexactly(int.from_bytes(head[:3], "little"))
        if version is not None:
            greeting = greeting[:1] + version + greeting[greeting.index(0) :]
        writer.write(len(greeting).to_bytes(3, "little") + head[3:] + greeting)
        await asyncio.gather(
            _pumped(reader, ours, statement or b"\0", becomes or b"\0"),
            _pumped(theirs, writer, b"\0", b"\0"),
        )

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield url.replace(f":{address.port}/", f":{port}/")
    finally:
        server.close()
        await asyncio.gather(*filter(None, talks))


async def refusals(url: str, **how: Any) -> list[str]:
    """What is said by each way to the database, and by `check`."""
    said = []
    async with relayed(url, **how) as relay:
        for way in (by_driver, by_engine):
            with pytest.raises(DatabaseUnavailable) as refused:
                await way(relay, "SELECT 1")
            said.append(str(refused.value))
        return [*said, *await found_by_check(relay)]


def test_a_proxy_that_drops_a_setting_is_found_and_named(mysql_server: Managed) -> None:
    how = {"statement": b"SET NAMES utf8mb4", "becomes": b"SET NAMES latin1 "}
    with plain_user(mysql_server) as url:
        for told in asyncio.run(refusals(url, **how)):
            assert "character_set_client is 'latin1', not 'utf8mb4'" in told
            assert re.search(r"127\.0\.0\.1:\d+: unsafe session: ", told)
            assert "A proxy in between may change or drop SET statements" in told


def test_what_cannot_be_read_as_it_was_written_is_found(mysql_server: Managed) -> None:
    how = {"statement": b"SELECT HEX('\\\\", "becomes": b"SELECT HEX('\\'"}
    with plain_user(mysql_server) as url:
        for told in asyncio.run(refusals(url, **how)):
            assert "a text with quotes and backslashes is '2727" in told


def test_a_server_that_refuses_a_setting_is_named_with_its_words(mysql_server: Managed) -> None:
    how = {"statement": b"sql_safe_updates", "becomes": b"sql_soft_updates"}
    with plain_user(mysql_server) as url:
        for told in asyncio.run(refusals(url, **how)):
            assert re.search(r"127\.0\.0\.1:\d+: the session cannot be prepared: ", told)
            assert "1193" in told
            assert "sql_soft_updates" in told


VITESS: Final = b"8.0.40-Vitess"
_UTC: Final = {"time_zone": "'+00:00'"}


@pytest.mark.parametrize(
    ("imposed", "says"),
    [
        (saying("SET NAMES gbk"), "character_set_client is 'gbk', not 'utf8mb4': start each"),
        (saying("SET character_set_results = latin1"), "character_set_results is 'latin1'"),
        ({"time_zone": "'-08:00'"}, "time_zone is '-08:00': default_time_zone has to be +00:00"),
        ({"sql_mode": "'NO_ZERO_DATE'"}, "sql_mode 'NO_ZERO_DATE' cuts values off"),
        (
            {"sql_mode": "'STRICT_ALL_TABLES,NO_BACKSLASH_ESCAPES,ANSI_QUOTES'"},
            "sql_mode has ANSI_QUOTES, NO_BACKSLASH_ESCAPES, which change the meaning of",
        ),
    ],
)
def test_vitess_is_asked_and_refused_where_it_is_wrong(
    mysql_server: Managed, imposed: dict[str, str], says: str
) -> None:
    with plain_user(mysql_server) as url, imposing(mysql_server, _UTC | imposed):
        for told in asyncio.run(refusals(url, version=VITESS)):
            assert says in told
            assert "Vitess takes this from its own and its MySQL's configuration only" in told


@pytest.mark.parametrize("mode", ["STRICT_TRANS_TABLES", "STRICT_ALL_TABLES,NO_ZERO_DATE"])
def test_vitess_is_taken_as_it_is_where_it_is_right(mysql_server: Managed, mode: str) -> None:
    async def shown(url: str, *sql: str) -> list[Any]:
        async with relayed(url, version=VITESS) as relay:
            return [await way(relay, *sql) for way in (by_driver, by_engine)]

    with plain_user(mysql_server) as url, imposing(mysql_server, _UTC | {"sql_mode": f"'{mode}'"}):
        variables = "@@sql_mode, '/', @@autocommit + 0, '/', @@innodb_lock_wait_timeout"
        seen = asyncio.run(shown(url, f"SELECT CONCAT({variables})"))
        assert seen == [[f"{mode}/0/50"], [f"{mode}/0/50"]], "nothing is set but autocommit"


def test_a_server_s_own_limit_of_time_is_named(mysql_server: Managed) -> None:
    variable = {"mysql": "max_execution_time", "mariadb": "max_statement_time"}
    name = variable[mysql_server.flavour]
    with (
        plain_user(mysql_server) as url,
        imposing(mysql_server, {name: "1"}),
        pytest.raises(DatabaseUnavailable, match=name),
    ):
        asyncio.run(by_driver(url, "SELECT 1 FROM information_schema.collations WHERE SLEEP(5)"))


# What the app may insert


DATED: Final = """
tables:
  user:
    table: dated
    key: clerk_id
    columns: {name: first_name, seen: last_sign_in_at}
"""
_DATED_TABLE: Final = """CREATE TABLE dated (id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(8),
    seen TIMESTAMP NULL, last_seen DATETIME NOT NULL DEFAULT '0000-00-00 00:00:00',
    born DATE NOT NULL DEFAULT '2021-00-00', due DATE NOT NULL DEFAULT '2021-02-31'{})"""
# Made by hand, with its key, or left to `migrate` to add the key to.
_KEY: Final = """, clerk_id VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin UNIQUE"""


@pytest.mark.parametrize("key", [_KEY, ""], ids=["keyed", "migrated"])
async def test_a_date_that_the_app_may_write_is_no_reason_to_refuse_its_row(
    mysql_server: Managed, key: str
) -> None:
    server = mysql_server
    with plain_user(server) as url:
        with imposing(server, {"sql_mode": "'ALLOW_INVALID_DATES'"}):
            await query(url, _DATED_TABLE.format(key))
            await query(url, "INSERT INTO dated (name) VALUES ('theirs')")
        async with served(url, mapped(DATED)) as at:
            seen = {"last_sign_in_at": 1_700_000_000_000}
            made = [event("user.created", f"user_{n}", first_name="x", **seen) for n in range(3)]
            later = deliveries.now_ms() + 1000
            update = event("user.updated", "user_1", version=later, first_name="y", **seen)
            for one in (*made, update):
                assert (await at.post(one)).said == (200, "applied", None)
            long = event("user.updated", "user_2", version=later, first_name="too long.")
            assert (await at.post(long)).said == (200, "quarantined", "too_long")
            shown = (await at.inside("/profiles")).json
        assert {one["last_seen"] for one in shown} == {"0000-00-00 00:00:00"}
        text = "clerk_id, name, UNIX_TIMESTAMP(seen), CONCAT(last_seen, '/', born, '/', due)"
        dates = "0000-00-00 00:00:00/2021-00-00/2021-02-31"
        assert await query(url, f"SELECT {text} FROM dated") == (
            (None, "theirs", None, dates),
            ("user_0", "x", 1_700_000_000, dates),
            ("user_1", "y", 1_700_000_000, dates),
            ("user_2", "x", 1_700_000_000, dates),
        )


# What a literal depends on


@pytest.mark.parametrize("text", ["\udcc3\udca4", "a\udc80'", "\ud800", "\udfff\\"])
def test_half_a_character_is_refused_and_no_byte_of_its_own(
    mysql_server: Managed, text: str
) -> None:
    async def tried(url: str) -> None:
        connection = await connect(target_of(url), seconds=5)
        insert = Statement("INSERT INTO loose (author, padded) VALUES ", "(%s, 'p')")
        with pytest.raises(RejectedByDatabase) as refused:
            await connection.run([(insert, [["fine"], [text]])])
        assert refused.value.reason is Reason.OUT_OF_RANGE
        (found,) = await connection.run([(Statement(_COUNT), [()])])
        assert found.rows == ((2,),)
        connection.close()

    with plain_user(mysql_server) as url:
        asyncio.run(with_tables(url))
        asyncio.run(tried(url))


def test_binary_values_arrive_as_they_are(mysql_server: Managed) -> None:
    values = (b"", b"plain'\\", bytes(range(256)), b"\xe4'\xe4\\", "é'\\😀".encode("gb18030"))

    async def shown(url: str) -> list[Any]:
        connection = await connect(target_of(url), seconds=5)
        statement = Statement("SELECT HEX(%s), HEX(%s)")
        results = await connection.run([(statement, [[value, "é'\\"] for value in values])])
        connection.close()
        return [row for result in results for row in result.rows]

    with plain_user(mysql_server) as url:
        assert asyncio.run(shown(url)) == [(value.hex().upper(), "C3A9275C") for value in values]


@pytest.mark.parametrize("does", ["SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'", "SET NAMES gbk"])
async def test_an_app_s_trigger_cannot_change_what_is_escaped(
    mysql_server: Managed, does: str
) -> None:
    names = ("\\', 1) -- ", "中'", "あ\\", "'")
    with plain_user(mysql_server) as url:
        async with Database.at(url) as database:
            await database.ddl(*PEOPLE_TABLES)
        for when in ("BEFORE INSERT", "AFTER UPDATE"):
            trigger = f"CREATE TRIGGER t{when[:2]} {when} ON people FOR EACH ROW {does}"
            mysql_server.execute(trigger, urlsplit(url).path.strip("/"))
        how = {"CLERK_SYNC_WRITERS": 1, "CLERK_SYNC_DEADLINE_SECONDS": 10}
        async with served(url, mapped(UNADOPTED), **how) as at:
            for version, turn in enumerate(("created", "updated"), start=deliveries.now_ms()):
                for n, x in enumerate(names):
                    data = {"username": x, "first_name": x, "last_name": turn}
                    made = event(f"user.{turn}", f"user_{n}", version=version)
                    made["data"] |= data
                    assert (await at.post(made)).said == (200, "applied", None)
        assert await people(url) == {
            f"user_{n}": row_of(x, x, "updated") for n, x in enumerate(names)
        }


MARKED_UP: Final = """
tables:
  user:
    table: pages
    key: clerk_id
    columns: {name: first_name | e, data: public_metadata | tojson, plain: first_name}
"""


async def test_text_that_jinja_marks_as_markup_is_text(database_url: str) -> None:
    async with Database.at(database_url) as database:
        await database.ddl(
            "CREATE TABLE pages (clerk_id VARCHAR(128) EXACT PRIMARY KEY, name BLOB, data BLOB,"
            " plain BLOB) OPTIONS"
        )
    name = "é'\\ <b>; -- \n%s"
    async with served(database_url, mapped(MARKED_UP)) as at:
        made = event("user.created", "user_1", first_name=name, public_metadata={"x": name})
        assert (await at.post(made)).said == (200, "applied", None)
    found = await deliveries.rows(database_url, "SELECT name, data, plain FROM pages")
    ((escaped, data, plain),) = [[as_text(value) for value in row] for row in found]
    assert escaped == "é&#39;\\ &lt;b&gt;; -- \n%s"
    assert json.loads(data) == {"x": name}
    assert plain == name
