"""`migrate`, by hand or by itself, and what a service says of a schema that is not right."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa

from clerk_sync.mapping import loader
from clerk_sync.schema.checks import SchemaMismatch, advice
from clerk_sync.schema.migrate import migrate, migration_sql
from clerk_sync.schema.reflection import live_tables
from clerk_sync.store import tables
from tests.histories import Clerk, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clerk_sync.mapping.model import Mapping

MIRROR: Final = loader.load("mirror")
ORBYTAL: Final = loader.load("orbytal")
TUTORIAL: Final = (
    """CREATE TABLE users (
        id SERIAL, username VARCHAR(255), tagline VARCHAR(255), display_name VARCHAR(255),
        img_url VARCHAR(255)
    ) OPTIONS""",
    """CREATE TABLE blocks (
        id SERIAL, url VARCHAR(255), type INTEGER, user_id BIGINT, label VARCHAR(255)
    ) OPTIONS""",
)
PEOPLE: Final = """
tables:
  user:
    table: people
    key: clerk_id
    columns:
      username: username
      display_nam: first_name
    on_delete: {mark: deleted}
    owns:
      - {table: posts, column: author, references: clerk_id}
"""
SETTING: Final = """
tables:
  user:
    table: people
    key: clerk_id
    columns: {email: primary_email, username: username, meta: {value: public_metadata, type: json}}
    on_delete:
      mark: deleted_at
      set:
"""
MADE: Final = """
tables:
  user:
    table: made
    create: true
    key: clerk_id
    columns:
      username: {value: username, type: string(255)}
"""
MADE_LATER: Final = f"""{MADE}
      email: {{value: primary_email, type: string(320), index: true}}
    on_delete: {{mark: deleted_at}}
""".replace("\n\n", "\n")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database.at(database_url) as database:
        yield database


async def live(database: Database, *names: str) -> dict[str, Any]:
    """What the database says of these tables: columns, keys and indexes."""

    def look(connection: sa.Connection) -> dict[str, Any]:
        inspector = sa.inspect(connection)
        return {
            name: (
                {
                    column["name"]: (
                        type_name(connection.dialect, column["type"]),
                        column["nullable"] and column["name"] not in primary,
                    )
                    for column in inspector.get_columns(name)
                },
                primary,
                {
                    (str(index["name"]), tuple(index["column_names"]))
                    for index in inspector.get_indexes(name)
                    if not index["unique"]
                },
            )
            for name in names
            for primary in [inspector.get_pk_constraint(name)["constrained_columns"]]
        }

    async with database.engine.connect() as connection:
        return await connection.run_sync(look)


def wanted(database: Database, *wanted: sa.Table) -> dict[str, Any]:
    """The same of tables as they are declared."""
    dialect = database.engine.dialect
    return {
        table.name: (
            {
                column.name: (type_name(dialect, column.type), column.nullable)
                for column in table.columns
            },
            [column.name for column in table.primary_key.columns],
            {
                (str(index.name), tuple(column.name for column in index.columns))
                for index in table.indexes
            },
        )
        for table in wanted
    }


def type_name(dialect: sa.Dialect, type_: sa.types.TypeEngine[Any]) -> str:
    """The type without what its table says for all of its columns."""
    words = type_.compile(dialect).partition(" C")[0].upper()
    return {
        "BIGINT(20)": "BIGINT",  # a width that says nothing
        "INTEGER(11)": "INTEGER",
        "TINYINT(1)": "BOOL",
        "LONGTEXT": "JSON" if dialect.name == "mariadb" else "LONGTEXT",  # is one there
    }.get(words, words)


def normal(database: Database, found: dict[str, Any]) -> str:
    text = json.dumps(found, default=sorted, sort_keys=True, indent=1)
    # MariaDB's JSON is a LONGTEXT with a check.
    return text.replace('"LONGTEXT"', '"JSON"') if not database.sqlite else text


async def assert_as_declared(database: Database, mapping: Mapping) -> None:
    made = [tables.made_table(table) for table in mapping.tables.values() if table.create]
    everything = [*tables.metadata.tables.values(), *made]
    assert normal(database, await live(database, *(t.name for t in everything))) == normal(
        database, wanted(database, *everything)
    )


async def faults(database: Database, mapping: Mapping) -> tuple[str, ...]:
    with pytest.raises(SchemaMismatch) as found:
        await database.store(mapping)
    return found.value.faults


async def test_migrate_makes_what_is_declared_and_then_has_nothing_to_do(
    database: Database,
) -> None:
    done = await migrate(database.engine, MIRROR)
    assert "created table clerk_users" in done
    await assert_as_declared(database, MIRROR)
    await database.store(MIRROR)
    assert await migrate(database.engine, MIRROR) == []


MIGRATE: Final = """
import asyncio, json, sys
from clerk_sync.mapping import loader
from clerk_sync.schema.checks import SchemaMismatch, advice
from clerk_sync.schema.migrate import migrate, migration_sql
from clerk_sync.schema.reflection import live_tables
from clerk_sync.database.url import target_of
from clerk_sync.database.connection import engine_of

async def main():
    target = target_of(sys.argv[1])
    engine = engine_of(lambda: target, size=2)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(await migrate(engine, loader.load("mirror"))))
    await engine.dispose()

asyncio.run(main())
"""


async def test_four_processes_migrate_at_once_and_one_does_the_work(database: Database) -> None:
    pipe = asyncio.subprocess.PIPE
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MIGRATE, database.url, stdin=pipe, stdout=pipe
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    said = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * 4
    done = sorted((json.loads(out) for out, _ in said), key=len)
    assert done[:3] == [[], [], []]
    assert "created table clerk_users" in done[3]
    await assert_as_declared(database, MIRROR)


@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
async def test_migration_that_broke_off_is_resumed(database: Database, printed: bool) -> None:  # noqa: FBT001
    await migrate(database.engine, MIRROR)
    on_table = "" if database.sqlite else " ON clerk_sync_events"
    await database.execute(
        "DROP TABLE clerk_sync_quarantine",
        "DROP TABLE clerk_organizations",
        f"DROP INDEX clerk_sync_events_committed_at{on_table}",
    )
    if printed:
        sql = await migration_sql(database.engine, MIRROR)
        await database.execute(*filter(str.strip, sql.split(";")))
        assert (await migration_sql(database.engine, MIRROR)).strip() == ""
    await migrate(database.engine, MIRROR)
    await assert_as_declared(database, MIRROR)
    assert await migrate(database.engine, MIRROR) == []


@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
async def test_a_table_of_its_own_that_somebody_dropped_is_made_again(
    database: Database,
    printed: bool,  # noqa: FBT001
) -> None:
    await migrate(database.engine, MIRROR)
    await database.execute("DROP TABLE clerk_sync_leases", "DROP TABLE clerk_sync_events")
    assert len(await faults(database, MIRROR)) == 2
    if printed:
        sql = await migration_sql(database.engine, MIRROR)
        await database.execute(*filter(str.strip, sql.split(";")))
    else:
        done = await migrate(database.engine, MIRROR)
        assert "created table clerk_sync_leases" in done
    await assert_as_declared(database, MIRROR)
    await database.store(MIRROR)
    assert await migrate(database.engine, MIRROR) == []


async def test_printed_sql_run_by_hand_makes_the_same(database: Database) -> None:
    sql = await migration_sql(database.engine, MIRROR)
    assert "clerk_sync_events" in sql
    assert "table clerk_sync_events is missing" in (await faults(database, MIRROR))[1], "printed"
    await database.execute(*filter(str.strip, sql.split(";")))
    await assert_as_declared(database, MIRROR)
    await database.store(MIRROR)
    assert (await migration_sql(database.engine, MIRROR)).strip() == ""
    assert await migrate(database.engine, MIRROR) == []


async def test_tables_of_a_newer_version_are_left_as_they_are(database: Database) -> None:
    await migrate(database.engine, MIRROR)
    await database.execute(
        "ALTER TABLE clerk_sync_runs ADD COLUMN later VARCHAR(9)",
        "CREATE TABLE clerk_sync_later (name VARCHAR(9) PRIMARY KEY)",
    )
    assert (await migration_sql(database.engine, MIRROR)).strip() == ""
    assert await migrate(database.engine, MIRROR) == []
    await database.store(MIRROR)
    assert await database.rows("SELECT later FROM clerk_sync_runs") == []
    assert await database.rows("SELECT name FROM clerk_sync_later") == []


async def test_a_version_table_that_was_left_behind_is_left_alone(database: Database) -> None:
    await migrate(database.engine, MIRROR)
    await database.execute(
        "CREATE TABLE clerk_sync_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO clerk_sync_version VALUES ('0001')",
    )
    await database.store(MIRROR)
    assert (await migration_sql(database.engine, MIRROR)).strip() == ""
    assert await migrate(database.engine, MIRROR) == []
    assert await database.rows("SELECT * FROM clerk_sync_version") == [("0001",)]


LATER: Final = ("clerk_sync_leases", "clerk_sync_cursors", "clerk_sync_runs")
# What a later version may have added: every column of clerk-sync's own tables that takes null.
ADDED: Final = [
    (table.name, column.name)
    for table in tables.metadata.tables.values()
    for column in table.columns
    if column.nullable
]


def dropping(database: Database) -> list[str]:
    """The statements that leave the columns in `ADDED` out of tables that have them."""
    over = [
        (index.name, table)
        for table, column in ADDED
        for index in tables.metadata.tables[table].indexes
        if column in index.columns
    ]
    on = {table: "" if database.sqlite else f" ON {table}" for _, table in over}
    return [  # SQLite drops no column that an index is on
        *(f"DROP INDEX {name}{on[table]}" for name, table in over),
        *(f"ALTER TABLE {table} DROP COLUMN {column}" for table, column in ADDED),
    ]


@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
@pytest.mark.parametrize("dropped", [LATER, LATER[1:]], ids=["first version", "half done"])
async def test_first_version_with_its_data_becomes_this_one(
    database: Database,
    dropped: tuple[str, ...],
    *,
    printed: bool,
) -> None:
    mapping = mapped(MADE)
    await migrate(database.engine, mapping)
    store = await database.store(mapping)
    await database.apply(store, Clerk(mapping).user("user_1", username="ada"))
    before = await database.snapshot("made")

    await database.execute(
        *(f"DROP TABLE {name}" for name in dropped),
        *(one for one in dropping(database) if "retry_at" in one),
    )
    fault = (await faults(database, mapping))[-1]
    assert fault.startswith("table clerk_sync_runs is missing: run `clerk-sync migrate`")
    sql = await migration_sql(database.engine, mapping)
    assert "clerk_sync_entities" not in sql
    if printed:
        await database.execute(*filter(str.strip, sql.split(";")))
    else:
        assert sorted(await migrate(database.engine, mapping)) == [
            "added column clerk_sync_quarantine.retry_at",
            "added index clerk_sync_quarantine_retry_at",
            *sorted(f"created table {name}" for name in dropped),
        ]
    await assert_as_declared(database, mapping)
    assert (await migration_sql(database.engine, mapping)).strip() == ""
    assert await migrate(database.engine, mapping) == []
    assert await database.snapshot("made") == before


@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
async def test_columns_that_a_later_version_adds(database: Database, *, printed: bool) -> None:
    mapping = mapped(MADE)
    await migrate(database.engine, mapping)
    await database.execute(*dropping(database))
    lacking = [fault.partition(",")[0] for fault in await faults(database, mapping)]
    assert sorted(lacking) == sorted(f"{table} has no column {one}" for table, one in ADDED)
    if printed:
        sql = await migration_sql(database.engine, mapping)
        assert "CREATE TABLE" not in sql
        await database.execute(*filter(str.strip, sql.split(";")))
    else:
        done = await migrate(database.engine, mapping)
        assert sorted(f"added column {table}.{column}" for table, column in ADDED) == sorted(
            one for one in done if "column" in one
        )
    await database.store(mapping)
    assert (await migration_sql(database.engine, mapping)).strip() == ""
    assert await migrate(database.engine, mapping) == []
    await assert_as_declared(database, mapping)


async def test_table_made_for_the_mapping_gets_later_columns_and_indexes(
    database: Database,
) -> None:
    await migrate(database.engine, mapped(MADE))
    store = await database.store(mapped(MADE))
    await database.apply(store, Clerk(mapped(MADE)).user("user_1", username="ada"))
    later = mapped(MADE_LATER)
    assert any(
        "`made` has no column `email`: run `clerk-sync migrate`" in fault
        for fault in await faults(database, later)
    )
    assert await migrate(database.engine, later) == [
        "added column made.email",
        "added column made.deleted_at",
        "added index made_email",
    ]
    await assert_as_declared(database, later)
    await database.store(later)
    assert await database.rows("SELECT * FROM made") == [("user_1", "ada", None, None)]


async def test_tutorials_tables_need_one_statement(database: Database) -> None:
    await database.ddl(*TUTORIAL)
    await database.execute("INSERT INTO users (username, tagline) VALUES ('ada', 'mine')")
    assert "preset orbytal:6: table `users` has no column `clerk_id`: run `clerk-sync migrate`" in (
        "\n".join(await faults(database, ORBYTAL)).replace(":5:", ":6:")
    )
    sql = await migration_sql(database.engine, ORBYTAL)
    statements = [text for text in sql.split(";") if "users" in text]
    assert len(statements) == (2 if database.sqlite else 1)
    assert "ALTER TABLE users ADD COLUMN clerk_id VARCHAR(128)" in statements[0]
    done = await migrate(database.engine, ORBYTAL)
    assert "added column users.clerk_id" in done
    assert await database.rows("SELECT id, username, tagline, clerk_id FROM users") == [
        (1, "ada", "mine", None)
    ]
    await database.store(ORBYTAL)
    assert await migrate(database.engine, ORBYTAL) == []


async def test_printed_statement_for_the_tutorial_run_by_hand_is_enough(
    database: Database,
) -> None:
    await database.ddl(*TUTORIAL)
    sql = await migration_sql(database.engine, ORBYTAL)
    await database.execute(*filter(str.strip, sql.split(";")))
    await database.store(ORBYTAL)
    assert await migrate(database.engine, ORBYTAL) == []


# What is wrong is said at start, with the line of the mapping file that asks for it.


async def test_empty_database_says_which_tables_are_missing_and_what_to_run(
    database: Database,
) -> None:
    found = await faults(database, mapped(PEOPLE))
    for name in tables.metadata.tables:
        assert any(f"table {name} is missing: run `clerk-sync migrate`" in one for one in found)
    assert "test.yaml:4: table `people` is missing: the app's own migrations make it" in found


async def test_every_fault_of_a_mapped_table_is_told_with_its_line(database: Database) -> None:
    await migrate(database.engine, mapped(MADE))
    await database.ddl(
        """CREATE TABLE people (
            clerk_id VARCHAR(128) EXACT, username VARCHAR(9), display_name VARCHAR(9),
            deleted_at DATETIME
        ) OPTIONS""",
        "CREATE TABLE posts (id SERIAL, author_id VARCHAR(128) EXACT) OPTIONS",
    )
    assert await faults(database, mapped(PEOPLE)) == (
        (
            "test.yaml:5: `clerk_id` of `people` must be unique by itself: "
            "CREATE UNIQUE INDEX people_clerk_id ON people (clerk_id)"
        ),
        "test.yaml:8: table `people` has no column `display_nam`; did you mean `display_name`?",
        "test.yaml:9: table `people` has no column `deleted`; did you mean `deleted_at`?",
        "test.yaml:11: table `posts` has no column `author`; did you mean `author_id`?",
    )
    await database.execute(
        "CREATE UNIQUE INDEX people_clerk_id ON people (clerk_id)",
        "ALTER TABLE people RENAME COLUMN display_name TO display_nam",
        "ALTER TABLE people RENAME COLUMN deleted_at TO deleted",
        "ALTER TABLE posts RENAME COLUMN author_id TO author",
    )
    await database.store(mapped(PEOPLE))


async def test_mark_that_cannot_hold_a_time_is_a_fault(database: Database) -> None:
    await migrate(database.engine, mapped(MADE))
    await database.ddl(
        """CREATE TABLE people (
            clerk_id VARCHAR(128) EXACT PRIMARY KEY, username VARCHAR(9),
            display_nam VARCHAR(9), deleted BIGINT
        ) OPTIONS""",
        "CREATE TABLE posts (id SERIAL, author VARCHAR(128) EXACT) OPTIONS",
    )
    (fault,) = await faults(database, mapped(PEOPLE))
    assert fault.startswith("test.yaml:9: `deleted` of `people` is BIGINT")


_SETTABLE: Final = """CREATE TABLE people (
    id SERIAL,
    clerk_id VARCHAR(128) EXACT UNIQUE,
    email VARCHAR(20),
    username VARCHAR(20) NOT NULL,
    meta JSON,
    level SMALLINT,
    seen DATETIME,
    shown VARCHAR(40) GENERATED ALWAYS AS (username) STORED,
    deleted_at DATETIME
    %s
) OPTIONS"""


def setting(*lines: str) -> Mapping:
    return mapped(SETTING + "".join(f"        {line}\n" for line in lines))


@pytest.mark.past_vitess
async def test_what_a_delete_cannot_set_is_a_fault(database: Database) -> None:
    await migrate(database.engine, mapped(MADE))
    await database.ddl(_SETTABLE % "")
    found = await faults(
        database,
        setting(
            *("emial: null", "username: null", "level: many", "seen: '2026-01-05'", "shown: x"),
            'email: "cut \\ud83d"',
        ),
    )
    assert [fault.partition(": ")[0] for fault in found] == [
        f"test.yaml:{line}" for line in range(10, 16)
    ]
    assert "no column `emial`; did you mean `email`?" in found[0]
    assert "`username` of `people` may not be null: let it be null, or set something" in found[1]
    assert found[2].endswith("which does not take 'many': wrong_type")
    assert found[3].endswith("which does not take '2026-01-05': wrong_type")
    assert "`shown` of `people` is generated" in found[4]
    assert found[5].endswith(r"which does not take 'cut \ud83d': wrong_type")


@pytest.mark.past_vitess
async def test_what_a_delete_can_set_is_no_fault_and_is_set(database: Database) -> None:
    mapping = setting(
        *("email: null", "username: ''", "level: -3", "seen: 1700000000000", "meta: \"a 'text'\"")
    )
    await migrate(database.engine, mapped(MADE))
    await database.ddl(_SETTABLE % "")
    store = await database.store(mapping)
    clerk = Clerk(mapping)
    await database.apply(
        store, clerk.user("user_1", username="ada", public_metadata={}), clerk.deleted("user_1")
    )
    ((email, username, level, seen, meta),) = await database.rows(
        "SELECT email, username, level, seen, meta FROM people"
    )
    assert (email, username, level, meta) == (None, "", -3, "\"a 'text'\"")
    assert str(seen).startswith("2023-11-14 22:13:20")


@pytest.mark.parametrize(
    ("unique", "lines", "told"),
    [
        ("email", [], "a deleted row stays in it"),
        ("email", ["username: gone"], "a deleted row stays in it"),
        ("email", ["email: null"], None),
        ("email", ["email: gone"], "`set` can make deleted rows the same"),
        ("level, email", [], "a deleted row stays in it"),
        ("level, email", ["level: null"], None),
        ("level, email", ["level: 0"], "`set` can make deleted rows the same"),
        ("email, deleted_at", [], None),
        ("clerk_id, email", [], None),
        ("level", [], None),
    ],
)
async def test_a_unique_index_that_marked_rows_stay_in_is_told(
    database: Database, unique: str, lines: list[str], told: str | None
) -> None:
    await database.ddl(_SETTABLE % f", UNIQUE ({unique})")
    mapping = setting(*lines) if lines else mapped(SETTING.replace("      set:\n", ""))
    found = list(advice(mapping, await live_tables(database.engine, mapping)))
    assert len(found) == (told is not None)
    if told is not None:
        assert told in found[0]
        names = ", ".join(sorted(unique.split(", ")))
        assert found[0].startswith(f"test.yaml:8: `{names}` of `people` is unique, and ")
        assert found[0].endswith(": add `set: {email: null}`")


async def test_a_unique_column_that_cannot_be_null_has_to_be_mended_first(
    database: Database,
) -> None:
    await database.ddl(_SETTABLE % ", UNIQUE (username)")
    mapping = setting("email: null")
    (found,) = advice(mapping, await live_tables(database.engine, mapping))
    assert found.endswith("the same value: let it be null, and add `set: {username: null}`")
    removing = mapped(SETTING.partition("    on_delete")[0])
    assert not list(advice(removing, await live_tables(database.engine, removing)))


@pytest.mark.parametrize("inherited", [True, False], ids=["of the table", "of the column"])
async def test_ids_that_ignore_case_are_a_fault(database: Database, inherited: bool) -> None:  # noqa: FBT001
    await migrate(database.engine, mapped(MADE))
    column = "" if inherited or database.sqlite else "COLLATE utf8mb4_general_ci"
    await database.ddl(
        f"""CREATE TABLE people (
            clerk_id VARCHAR(128) {column} PRIMARY KEY, username VARCHAR(9),
            display_nam VARCHAR(9), deleted DATETIME
        ) OPTIONS""",
        f"CREATE TABLE posts (id SERIAL, author VARCHAR(128) {column}) OPTIONS",
    )
    mapping = mapped(PEOPLE)
    if database.sqlite:  # whose own comparison is exact
        await database.store(mapping)
        return
    key, owned = await faults(database, mapping)
    assert key.startswith("test.yaml:5: `clerk_id` of `people` compares by utf8mb4_")
    assert owned.startswith("test.yaml:11: `author` of `posts` compares by utf8mb4_")
    await database.execute(*(fault.split("case-sensitive: ")[1] for fault in (key, owned)))
    await database.store(mapping)


async def test_schema_of_an_older_version_is_a_fault_that_says_what_to_run(
    database: Database,
) -> None:
    await migrate(database.engine, MIRROR)
    await database.execute("ALTER TABLE clerk_sync_events DROP COLUMN reason")
    (fault,) = await faults(database, MIRROR)
    assert "clerk_sync_events has no column reason" in fault
    assert "run `clerk-sync migrate`" in fault
    assert await migrate(database.engine, MIRROR) == ["added column clerk_sync_events.reason"]
    await database.store(MIRROR)


async def test_inline_unique_is_seen(database: Database) -> None:
    await migrate(database.engine, mapped(MADE))
    await database.ddl(
        """CREATE TABLE people (
            id SERIAL, clerk_id VARCHAR(128) EXACT UNIQUE, username VARCHAR(9),
            display_nam VARCHAR(9), deleted DATETIME
        ) OPTIONS""",
        "CREATE TABLE posts (id SERIAL, author VARCHAR(128) EXACT) OPTIONS",
    )
    await database.store(mapped(PEOPLE))
