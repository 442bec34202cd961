"""What `check` and `migrate` try on the real tables, and what they say where it goes wrong."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest
import sqlalchemy as sa

from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.mapping import loader
from clerk_sync.schema import rehearsal
from clerk_sync.schema.binding import store_of
from clerk_sync.schema.checks import SchemaMismatch, advice
from clerk_sync.schema.migrate import migrate
from clerk_sync.schema.reflection import live_tables
from clerk_sync.store import erasure
from tests.histories import NOW, OWN, Clerk, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.schema.reflection import Live
    from clerk_sync.schema.rehearsal import Rehearsed

KEY: Final = "clerk_id VARCHAR(128) EXACT NOT NULL UNIQUE"
NAME: Final = "username VARCHAR(64)"
MARK: Final = "on_delete: {mark: deleted_at}"
OWNS: Final = "owns: [{table: posts, column: author, references: clerk_id}]"
ODD: Final = ("a b", "a%b", "%s", "%%", "%(x)s", "a:b", ":x", "a'b", 'a"b', "(x)", "VALUES (q)")
TABLES: Final = (
    *("members", "orgs", "posts", "people", "plans", "renamed", "clerk_users"),
    *("clerk_organizations", "clerk_organization_memberships", "users", "blocks"),
    *(f"t {name}" for name in ODD),
)


def people(
    columns: str = "{username: username}", extra: str = "", key: str = "clerk_id", more: str = ""
) -> str:
    return f"""
tables:
  user:
    table: people
    key: {key}
    columns: {columns}
    {extra}
{more}"""


@pytest.fixture
async def database(shared_url: str) -> AsyncIterator[Database]:
    """The module's database, empty."""
    async with Database.at(shared_url) as database:
        async with database.engine.connect() as connection:
            if not database.sqlite:
                await connection.exec_driver_sql("SET foreign_key_checks=0")
            quote = connection.dialect.identifier_preparer.quote_identifier
            for name in TABLES:
                for what in ("TABLE", "VIEW"):
                    with suppress(sa.exc.DBAPIError):
                        await connection.exec_driver_sql(f"DROP {what} {quote(name)}")
            if not database.sqlite:
                await connection.exec_driver_sql("SET foreign_key_checks=1")
            for name in OWN:
                with suppress(sa.exc.DBAPIError):
                    await connection.exec_driver_sql(f"DELETE FROM {name}")
            await connection.commit()
        yield database


async def counted(database: Database, mapping: Mapping, live: Live) -> list[int]:
    names = live.quoted(*OWN, *(table.table for table in mapping.tables.values()))
    percent = "%" if database.sqlite else "%%"
    counts = [f"SELECT COUNT(*) FROM {name.replace('%', percent)}" for name in names]
    return [await database.value(count) for count in counts]


async def tried(database: Database, text: str, *ddl: str) -> Rehearsed | tuple[str, ...]:
    """What was found by trying; where looking was enough, the faults."""
    await database.ddl(*ddl)
    mapping = mapped(text)
    await migrate(database.engine, mapping)
    live = await live_tables(database.engine, mapping)
    try:
        store_of(mapping, live)
    except SchemaMismatch as error:
        return error.faults
    before = await counted(database, mapping, live)
    found = await rehearsal.rehearse(database.engine, mapping, live)
    assert await counted(database, mapping, live) == before, "what was tried is not there"
    return found


def maker(*columns: str, name: str = "people", options: str = "") -> str:
    return f"CREATE TABLE {name} (id SERIAL, {', '.join(columns)}) OPTIONS {options}"


# Good schemas

GOOD: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "plain": (people(), (maker(KEY, NAME),)),
    "marked": (people(extra=MARK), (maker(KEY, NAME, "deleted_at DATETIME"),)),
    "marked by a timestamp": (
        people(extra=MARK),
        (maker(KEY, NAME, "deleted_at TIMESTAMP NULL"),),
    ),
    "key of bytes": (people(), (maker("clerk_id VARBINARY(64) UNIQUE", "username BLOB"),)),
    "key of as many bytes": (people(), (maker("clerk_id BINARY(32) UNIQUE", NAME),)),
    "fixed text": (people(), (maker("clerk_id CHAR(40) EXACT UNIQUE", "username CHAR(64)"),)),
    "owned by bytes": (
        people(extra=OWNS),
        (maker(KEY, NAME), maker("author VARBINARY(64)", name="posts")),
    ),
    "no columns": (people("{}"), (maker(KEY),)),
    "every time": (
        people("{a: created_at, b: created_at, c: created_at}"),
        (maker(KEY, "a DATETIME", "b DATE", "c TIMESTAMP NULL"),),
    ),
    "json": (people("{d: public_metadata, e: username}"), (maker(KEY, "d JSON", "e JSON"),)),
}
GOOD_ON_MYSQL: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "key of latin1": (
        people(),
        (maker("clerk_id CHAR(40) CHARACTER SET latin1 COLLATE latin1_bin UNIQUE", NAME),),
    ),
    "key of ascii": (
        people(),
        (maker("clerk_id VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin UNIQUE", NAME),),
    ),
    "key of two bytes each": (
        people(),
        (maker("clerk_id VARCHAR(40) CHARACTER SET ucs2 COLLATE ucs2_bin UNIQUE", NAME),),
    ),
    "long text with a long prefix": (
        people(),
        (maker("clerk_id TEXT EXACT", NAME, "UNIQUE KEY one (clerk_id(191))"),),
    ),
    "long bytes with a long prefix": (
        people(),
        (maker("clerk_id BLOB", NAME, "UNIQUE KEY one (clerk_id(191))"),),
    ),
    "partitions": (
        people(),
        (
            (
                f"CREATE TABLE people (clerk_id VARCHAR(128) EXACT PRIMARY KEY, {NAME}) OPTIONS"
                " PARTITION BY KEY (clerk_id) PARTITIONS 4"
            ),
        ),
    ),
    "invisible": (
        people(extra=MARK),
        (
            maker(
                "clerk_id VARCHAR(128) EXACT UNIQUE INVISIBLE",
                f"{NAME} INVISIBLE",
                "deleted_at DATETIME INVISIBLE",
            ),
        ),
    ),
    "enum": (
        people("{plan: public_metadata.plan}"),
        (maker(KEY, "plan ENUM('free', 'pro') NOT NULL"),),
    ),
    "a unique name that others may have": (
        people("{first: first_name}"),
        (
            maker(KEY, "first VARCHAR(64) UNIQUE"),
            "INSERT INTO people (clerk_id, first) VALUES ('x', 'Ada')",
        ),
    ),
}


@pytest.mark.parametrize("name", [*GOOD, *GOOD_ON_MYSQL])
async def test_good_schemas_are_tried_and_left_as_they_were(database: Database, name: str) -> None:
    if database.sqlite and name in GOOD_ON_MYSQL:
        pytest.skip("SQLite has no such words")
    text, ddl = (GOOD | GOOD_ON_MYSQL)[name]
    found = await tried(database, text, *ddl)
    assert found == rehearsal.Rehearsed(["people"], [], [])


@pytest.mark.parametrize("name", ODD)
async def test_every_name_works(database: Database, name: str) -> None:
    """A name with a `%` was formatted twice, one with a `:` taken for a parameter."""
    table, key, column, mark = (json.dumps(f"{what} {name}") for what in "tkcm")
    text = f"""
tables:
  user:
    table: {table}
    create: true
    key: {key}
    columns: {{{column}: {{value: username, type: string(64), index: true}}}}
    on_delete: {{mark: {mark}}}
"""
    assert await tried(database, text) == rehearsal.Rehearsed([f"t {name}"], [], [])
    store = await database.store(mapped(text))
    clerk = Clerk(mapped(text))
    applied = [
        await database.apply(store, clerk.user("user_a", username="%s'\"")),
        await database.apply(store, clerk.user("user_a", 2, username="%%")),
        await database.apply(store, clerk.deleted("user_a")),
    ]
    assert applied == [["applied"]] * 3
    assert await erasure.erase(database.engine, store, "user_a", now_ms=NOW) == {
        "clerk_sync_events": 3,
        f"t {name}": 1,
    }


@pytest.mark.parametrize("preset", loader.PRESETS)
async def test_the_presets_are_tried(database: Database, preset: str) -> None:
    mapping = loader.load(preset)
    if preset == "orbytal":
        await database.ddl(
            maker(NAME, "display_name VARCHAR(255)", "img_url VARCHAR(255)", name="users"),
            maker("user_id BIGINT", name="blocks"),
        )
    await migrate(database.engine, mapping)
    live = await live_tables(database.engine, mapping)
    found = await rehearsal.rehearse(database.engine, mapping, live)
    tables = [table.table for table in mapping.tables.values()]
    assert found == rehearsal.Rehearsed(tables, [], [])


async def test_parents_come_first_where_tables_refer_to_each_other(database: Database) -> None:
    more = """
  organizationMembership:
    {table: members, key: id, columns: {u: public_user_data.user_id, o: organization.id}}
  organization: {table: orgs, key: id, columns: {name: name, maker: created_by}}
"""
    text = people(more=more)
    id_ = "VARCHAR(128) EXACT"
    ddl = (
        maker(KEY, NAME),
        f"""CREATE TABLE orgs (id {id_} PRIMARY KEY, name VARCHAR(64) UNIQUE, maker {id_} NOT NULL,
            FOREIGN KEY (maker) REFERENCES people (clerk_id)) OPTIONS""",
        f"""CREATE TABLE members (id {id_} PRIMARY KEY, u {id_} NOT NULL, o {id_} NOT NULL,
            FOREIGN KEY (u) REFERENCES people (clerk_id),
            FOREIGN KEY (o) REFERENCES orgs (id)) OPTIONS""",
    )
    found = await tried(database, text, *ddl)
    assert found == rehearsal.Rehearsed(["people", "orgs", "members"], [], [])


# Schemas that looking at is enough for

VARCHAR: Final = "VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
LOOKED: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "short key": (
        people(),
        (maker("clerk_id VARCHAR(20) EXACT NOT NULL UNIQUE", NAME),),
        (
            "test.yaml:5: `clerk_id` of `people` is VARCHAR(20), and Clerk's ids have 32 "
            f"characters and more: ALTER TABLE people MODIFY clerk_id {VARCHAR} NOT NULL"
        ),
    ),
    "number for a key": (
        people(),
        (maker("clerk_id BIGINT UNIQUE", NAME),),
        f"and Clerk's ids are text: ALTER TABLE people MODIFY clerk_id {VARCHAR}",
    ),
    "key that fills up": (
        people(),
        (maker("clerk_id BINARY(40) UNIQUE", NAME),),
        "`clerk_id` of `people` is BINARY(40), and fills up with zeros what is shorter",
    ),
    "mark that may not be null": (
        people(extra=MARK),
        (maker(KEY, NAME, "deleted_at DATETIME NOT NULL"),),
        (
            "test.yaml:7: `deleted_at` of `people` may not be null, and is null until the delete: "
            "ALTER TABLE people MODIFY deleted_at DATETIME(3) NULL"
        ),
    ),
    "mark that is a day": (
        people(extra=MARK),
        (maker(KEY, NAME, "deleted_at DATE"),),
        "test.yaml:7: `deleted_at` of `people` is DATE: a mark needs a DATETIME",
    ),
    "generated column": (
        people("{username: username, low: username}"),
        (maker(KEY, NAME, "low VARCHAR(64) GENERATED ALWAYS AS (lower(username)) STORED"),),
        "test.yaml:6: `low` of `people` is GENERATED, and only the database writes it",
    ),
    "generated key": (
        people(),
        (
            f"""CREATE TABLE people (other VARCHAR(128) EXACT, {NAME},
            clerk_id VARCHAR(128) EXACT GENERATED ALWAYS AS (lower(other)) STORED UNIQUE)
            OPTIONS""",
        ),
        "test.yaml:5: `clerk_id` of `people` is GENERATED, and only the database writes it",
    ),
    "generated mark": (
        people(extra=MARK),
        (maker(KEY, NAME, "t DATETIME", "deleted_at DATETIME GENERATED ALWAYS AS (t) STORED"),),
        "test.yaml:7: `deleted_at` of `people` is GENERATED",
    ),
    "view": (
        people(),
        (maker(KEY, NAME, name="renamed"), "CREATE VIEW people AS SELECT * FROM renamed"),
        "test.yaml:4: `people` is a view, and events need a table: name the one behind it",
    ),
    "owned by a number": (
        people(extra=OWNS),
        (maker(KEY, NAME), maker("author BIGINT", name="posts")),
        "and Clerk's ids are text: ALTER TABLE posts MODIFY author VARCHAR(128)",
    ),
    "owned by something else": (
        people(extra="owns: [{table: posts, column: author, references: id}]"),
        (maker(KEY, NAME), maker("author VARCHAR(64)", name="posts")),
        "test.yaml:7: `author` of `posts` is VARCHAR(64), and `id` of `people` is ",
    ),
}
LOOKED_ON_MYSQL: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "prefix": (
        people(),
        (maker("clerk_id VARCHAR(128) EXACT", NAME, "UNIQUE KEY one (clerk_id(10))"),),
        (
            "test.yaml:5: `one` of `people` covers only the first 10 characters of `clerk_id`, "
            "so that two objects could share a row: ALTER TABLE people DROP INDEX one, "
            "ADD UNIQUE INDEX people_clerk_id (clerk_id)"
        ),
    ),
    "prefix of the primary key": (
        people(),
        (
            (
                f"CREATE TABLE people (clerk_id VARCHAR(128) EXACT NOT NULL, {NAME}, "
                "PRIMARY KEY (clerk_id(10))) OPTIONS"
            ),
        ),
        (
            "`clerk_id`, so that two objects could share a row: "
            "ALTER TABLE people DROP PRIMARY KEY, ADD PRIMARY KEY (clerk_id)"
        ),
    ),
    "prefix beside the whole": (
        people(),
        (maker(KEY, NAME, "UNIQUE KEY one (clerk_id(10))"),),
        "test.yaml:5: `one` of `people` covers only the first 10 characters of `clerk_id`",
    ),
    "words for a key": (
        people(),
        (maker("clerk_id ENUM('a') UNIQUE", NAME),),
        "test.yaml:5: `clerk_id` of `people` is ENUM('a'), and Clerk's ids are text",
    ),
    "mark of every update": (
        people(extra=MARK),
        (maker(KEY, NAME, "deleted_at TIMESTAMP NULL ON UPDATE CURRENT_TIMESTAMP"),),
        "gets the time of every UPDATE, and would mark a row that is alive",
    ),
    "no transactions": (
        people(),
        (f"CREATE TABLE people ({KEY}, {NAME}) ENGINE=MyISAM DEFAULT CHARSET=utf8mb4",),
        (
            "test.yaml:4: `people` is a table of the engine MyISAM, which has no transactions: "
            "ALTER TABLE people ENGINE=InnoDB"
        ),
    ),
    "owned without transactions": (
        people(extra=OWNS),
        (
            maker(KEY, NAME),
            "CREATE TABLE posts (author VARCHAR(64) EXACT) ENGINE=MEMORY DEFAULT CHARSET=utf8mb4",
        ),
        "test.yaml:7: `posts` is a table of the engine MEMORY, which has no transactions",
    ),
}


@pytest.mark.parametrize("name", [*LOOKED, *LOOKED_ON_MYSQL])
async def test_what_cannot_work_is_seen_without_a_row(database: Database, name: str) -> None:
    if database.sqlite and name in LOOKED_ON_MYSQL:
        pytest.skip("SQLite has no such words")
    text, ddl, told = (LOOKED | LOOKED_ON_MYSQL)[name]
    found = await tried(database, text, *ddl)
    assert isinstance(found, tuple)
    (fault,) = found
    assert told in fault
    if "ALTER TABLE" in fault and not database.sqlite and "GENERATED" not in fault:
        await database.execute("ALTER" + fault.split("ALTER", 1)[1])
        again = await tried(database, text)
        assert not isinstance(again, tuple), "what is said helps"
        assert again.faults == []


# Schemas that only a row shows

TRIED: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "text into a number": (
        people(),
        (maker(KEY, "username INTEGER"),),
        "and does not take what `username` gives, such as 'ada_",
    ),
    "too narrow": (
        people(),
        (maker(KEY, "username VARCHAR(3)"),),
        "`username` of `people` is VARCHAR(3), and does not take what `username` gives",
    ),
    "expression that fails": (
        people("{n: public_metadata.n + 1}"),
        (maker(KEY, "n INTEGER"),),
        "test.yaml:6: `public_metadata.n + 1` fails on Clerk's own kind of user: UndefinedError",
    ),
    "check of the app's": (
        people(),
        (maker(KEY, "username VARCHAR(64) CHECK (username = 'x')"),),
        "`people` refuses a row such as Clerk's events make (refused): ",
    ),
}
TRIED_ON_MYSQL: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "another label": (
        people("{plan: public_metadata.plan}"),
        (maker(KEY, "plan ENUM('Pro')"),),
        (
            "test.yaml:6: `plan` of `people` is ENUM('Pro'), and does not take what "
            "`public_metadata.plan` gives, such as 'pro' (wrong_type)"
        ),
    ),
    "shape": (
        people(),
        (maker(KEY, "username POINT"),),
        "test.yaml:6: `username` of `people` is POINT, and does not take what `username` gives",
    ),
    "times in a number": (
        people("{t: created_at}"),
        (maker(KEY, "t INT UNSIGNED"),),
        "(out_of_range)",
    ),
    "trigger that changes a value": (
        people(),
        (
            maker(KEY, NAME),
            "CREATE TRIGGER other BEFORE INSERT ON people FOR EACH ROW SET NEW.username = 'other'",
            "CREATE TRIGGER same BEFORE UPDATE ON people FOR EACH ROW SET NEW.username = 'other'",
        ),
        "test.yaml:6: `username` of `people` gives back 'other' for 'ada_",
    ),
    "trigger that refuses": (
        people(),
        (
            maker(KEY, NAME),
            (
                "CREATE TRIGGER no BEFORE INSERT ON people FOR EACH ROW"
                " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not here'"
            ),
        ),
        "`people` refuses a row such as Clerk's events make (refused): not here",
    ),
}


@pytest.mark.past_vitess
@pytest.mark.parametrize("name", [*TRIED, *TRIED_ON_MYSQL])
async def test_what_does_not_work_is_tried(database: Database, name: str) -> None:
    if database.sqlite and name in TRIED_ON_MYSQL:
        pytest.skip("SQLite has no such words")
    text, ddl, told = (TRIED | TRIED_ON_MYSQL)[name]
    found = await tried(database, text, *ddl)
    assert not isinstance(found, tuple)
    assert found.tables == []
    (fault,) = found.faults
    assert told in fault


async def test_other_tables_are_tried_where_one_fails(database: Database) -> None:
    more = "  organization: {table: orgs, key: clerk_id, columns: {name: name}}"
    found = await tried(
        database,
        people(more=more),
        maker(KEY, "username INTEGER"),
        maker(KEY, "name VARCHAR(64)", name="orgs"),
    )
    assert not isinstance(found, tuple)
    assert (found.tables, len(found.faults)) == (["orgs"], 1)


async def test_a_row_that_nobody_could_write_is_advice_already(database: Database) -> None:
    found = await tried(database, people(), maker(KEY, NAME, "team INTEGER NOT NULL"))
    assert found == rehearsal.Rehearsed([], [], [])


async def test_null_where_the_column_takes_none_is_told(database: Database) -> None:
    found = await tried(database, people("{t: mfa_disabled_at}"), maker(KEY, "t DATETIME NOT NULL"))
    told = (
        "test.yaml:6: `t` of `people` may not be null, and `mfa_disabled_at` may: "
        "events without it go to quarantine"
    )
    assert found == rehearsal.Rehearsed(["people"], [], [told])


async def test_a_parent_that_is_not_mapped_is_no_fault(database: Database) -> None:
    if database.sqlite:
        pytest.skip("SQLite looks at foreign keys only where it is told to")
    found = await tried(
        database,
        people("{plan: public_metadata.plan}"),
        "CREATE TABLE plans (name VARCHAR(64) PRIMARY KEY) OPTIONS",
        maker(KEY, "plan VARCHAR(64)", "FOREIGN KEY (plan) REFERENCES plans (name)"),
    )
    told = "test.yaml:3: `people` is not tried: a foreign key asks for a row of `plans`"
    assert not isinstance(found, tuple)
    assert (found.tables, found.faults) == ([], [])
    assert found.warnings[0].startswith(told)


async def test_numbers_that_are_used_up_are_told(database: Database) -> None:
    if database.sqlite:
        pytest.skip("SQLite's numbers do not end")
    await database.ddl(
        f"CREATE TABLE people (n TINYINT AUTO_INCREMENT PRIMARY KEY, {KEY}, {NAME})"
        " AUTO_INCREMENT=127 ENGINE=InnoDB DEFAULT CHARSET=utf8mb4",
        "INSERT INTO people (clerk_id) VALUES ('user_last')",
    )
    try:
        found = await tried(database, people())
        told = "" if isinstance(found, tuple) else "".join(found.faults)
    except DatabaseUnavailable as error:  # MariaDB's number for it is not about data
        told = str(error)
    assert re.search("the AUTO_INCREMENT `n` is used up|does not give back the row", told)
    assert await database.rows("SELECT n, clerk_id FROM people") == [(127, "user_last")]


async def test_a_history_that_keeps_what_is_erased_is_told(database: Database) -> None:
    if database.sqlite or "MariaDB" not in await database.value("SELECT VERSION()"):
        pytest.skip("MariaDB alone keeps versions")
    table = maker(KEY, NAME, options="WITH SYSTEM VERSIONING")
    found = await tried(database, people(), table)
    assert found == rehearsal.Rehearsed(["people"], [], [])
    mapping = mapped(people())
    (told,) = advice(mapping, await live_tables(database.engine, mapping))
    assert "SYSTEM VERSIONING" in told


@pytest.mark.past_vitess
async def test_triggers_are_named(database: Database) -> None:
    if database.sqlite:
        pytest.skip("SQLite's triggers reach nothing outside")
    found = await tried(
        database,
        people(),
        maker(KEY, NAME),
        "CREATE TRIGGER tells AFTER INSERT ON people FOR EACH ROW SET @told = 1",
    )
    assert not isinstance(found, tuple)
    assert (found.tables, found.faults) == (["people"], [])
    (doubt,) = found.warnings
    assert "trigger `tells` of `people` runs for the probe row, too" in doubt
    assert doubt.endswith("CLERK_SYNC_PROBE_ROWS=false leaves this out")


async def test_nothing_is_committed_and_few_numbers_are_used(database: Database) -> None:
    if database.sqlite:
        pytest.skip("SQLite counts no commits")
    await database.ddl(maker(KEY, NAME))
    mapping = mapped(people())
    live = await live_tables(database.engine, mapping)
    before = dict(await database.rows("SHOW GLOBAL STATUS LIKE 'Com_commit'"))
    await rehearsal.rehearse(database.engine, mapping, live)
    assert dict(await database.rows("SHOW GLOBAL STATUS LIKE 'Com_commit'")) == before
    await database.execute("INSERT INTO people (clerk_id) VALUES ('user_next')")
    # One for the row, and at most one for the row that was there already.
    assert await database.value("SELECT id FROM people") <= 3
