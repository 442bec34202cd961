"""Names and types of live tables, as the server compares them and whoever made them chose them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from clerk_sync.schema.checks import advice
from clerk_sync.schema.migrate import migrate, migration_sql
from clerk_sync.schema.reflection import live_tables
from tests.histories import Clerk, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Servers

MADE: Final = mapped(
    """
tables:
  user:
    table: Users
    create: true
    key: Clerk_Id
    columns:
      UserName: {value: username, type: string(255), index: true}
"""
)
MADE_LATER: Final = mapped(
    """
tables:
  user:
    table: Users
    create: true
    key: clerk_id
    columns:
      username: {value: username, type: string(255), index: true}
      Email: {value: primary_email, type: string(320)}
"""
)
# The app's own tables: the mapping spells none of their names as the app does.
SPELT: Final = mapped(
    """
tables:
  user:
    table: People
    key: clerk_id
    adopt: {username: username}
    columns: {username: username, TEAM_ID: public_metadata.team}
    on_delete: remove
    owns:
      - {table: posts, column: author, references: id}
  organization:
    table: Teams
    key: CLERK_ID
    columns: {name: name}
"""
)
APPS: Final = (
    "CREATE TABLE Teams (Clerk_Id VARCHAR(128) EXACT PRIMARY KEY, Name VARCHAR(255)) OPTIONS",
    """CREATE TABLE People (
        Id SERIAL, Clerk_ID VARCHAR(128) EXACT UNIQUE, UserName VARCHAR(255),
        Team_Id VARCHAR(128) EXACT, FOREIGN KEY (Team_Id) REFERENCES Teams (Clerk_Id)
    ) OPTIONS""",
    "CREATE TABLE Posts (Id SERIAL, Author BIGINT UNSIGNED) OPTIONS",
)
ODD: Final = mapped(
    """
tables:
  user:
    table: people
    key: clerk_id
    columns: {username: username}
"""
)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database.at(database_url) as database:
        yield database


@pytest.fixture
async def folding(database_url: str, servers: Servers) -> AsyncIterator[Database]:
    """A database that holds table names for the same whatever their case, as SQLite's always."""
    if not database_url.startswith("sqlite"):
        async with Database.at(database_url) as database:
            version = await database.value("SELECT VERSION()")
        flavour = "mariadb" if "MariaDB" in version else "mysql"
        server = servers.having(flavour, "--lower-case-table-names=1")
        database_url = server.create_database("folding")
    async with Database.at(database_url) as database:
        yield database


async def test_a_table_with_capitals_is_made_once_and_found(folding: Database) -> None:
    assert "created table Users" in await migrate(folding.engine, MADE)
    assert await migrate(folding.engine, MADE) == []
    assert (await migration_sql(folding.engine, MADE)).strip() == ""
    store = await folding.store(MADE)
    assert await folding.apply(store, Clerk(MADE).user("user_1", username="ada")) == ["applied"]
    # The mapping's author changes nothing but the case, and adds a column.
    assert await migrate(folding.engine, MADE_LATER) == [
        f"added column {'Users' if folding.sqlite else 'users'}.Email"
    ]
    assert await migrate(folding.engine, MADE_LATER) == []
    store = await folding.store(MADE_LATER)
    change = Clerk(MADE_LATER).user("user_1", 2, username="eve", svix_id="msg_later")
    assert await folding.apply(store, change) == ["applied"]
    assert await folding.rows("SELECT clerk_id, username FROM users") == [("user_1", "eve")]


async def test_tables_are_found_by_other_cases_of_their_names(folding: Database) -> None:
    if folding.sqlite:
        await folding.execute("PRAGMA foreign_keys = ON")
    await folding.ddl(*APPS)
    await migrate(folding.engine, SPELT)
    store = await folding.store(SPELT)
    clerk = Clerk(SPELT)
    user = clerk.user("user_1", username="ada", public_metadata={"team": "org_1"})
    assert await folding.apply(store, user, clerk.save("organization", "org_1", name="x")) == [
        "applied",
        "applied",
    ], "the team comes before its people, as the foreign key wants it"
    assert await folding.rows("SELECT clerk_id, username, team_id FROM people") == [
        ("user_1", "ada", "org_1")
    ]
    await folding.execute("INSERT INTO posts (author) SELECT id FROM people")
    assert await folding.apply(store, clerk.deleted("user_1", 5)) == ["applied"]
    assert await folding.rows("SELECT id FROM posts") == []


async def test_names_of_tables_that_differ_by_case_are_two_where_the_server_says_so(
    database: Database,
) -> None:
    if database.sqlite or await database.value("SELECT @@lower_case_table_names"):
        return
    await database.ddl("CREATE TABLE users (id SERIAL) OPTIONS")
    assert "created table Users" in await migrate(database.engine, MADE)
    assert await migrate(database.engine, MADE) == []


async def test_columns_are_found_by_other_cases_of_their_names(database: Database) -> None:
    await database.ddl(*(one.replace("Posts", "posts") for one in APPS))
    await migrate(database.engine, SPELT)
    store = await database.store(SPELT)
    clerk = Clerk(SPELT)
    await database.execute("INSERT INTO People (UserName) VALUES ('ada')")
    assert await database.apply(store, clerk.user("user_1", username="ada")) == ["applied"]
    assert await database.rows("SELECT Clerk_ID, UserName FROM People") == [("user_1", "ada")]
    assert await migrate(database.engine, SPELT) == []


VECTOR: Final = {"mysql": "VECTOR(3)", "mariadb": "INET6"}


def oddities(server: str) -> tuple[str, ...]:
    """Columns that nobody mapped, as strange as they come."""
    return (
        f"v {VECTOR[server]}",
        "p POINT",
        "`o``clock` VARCHAR(9)",
        "`b``` VARCHAR(3) UNIQUE",
        "`100%` INT",
        "`%s` INT",
        "`a(b), c` INT",
        "`a\nb` VARCHAR(9)",
        "e ENUM('a''b','c,d','`')",
        "g INT GENERATED ALWAYS AS (LENGTH(username)) STORED",
        "i INT INVISIBLE",
        "j JSON",
        "KEY `k``y` (`o``clock`)",
        "CHECK (username <> 'a''b`')",
    )


async def test_what_is_not_mapped_may_be_of_any_type_and_name(database: Database) -> None:
    if database.sqlite:
        columns: tuple[str, ...] = ('"o`clock" TEXT', '"100%" INT', '"a""b" VECTOR(3)')
    else:
        version = await database.value("SELECT VERSION()")
        columns = oddities("mariadb" if "MariaDB" in version else "mysql")
    await database.ddl(
        "CREATE TABLE people (clerk_id VARCHAR(128) EXACT PRIMARY KEY, username VARCHAR(255),"
        + ", ".join(one.replace("%", "%%") for one in columns)
        + ") OPTIONS"
    )
    await migrate(database.engine, ODD)
    store = await database.store(ODD)
    assert await database.apply(store, Clerk(ODD).user("user_1", username="ada")) == ["applied"]
    assert list(advice(ODD, await live_tables(database.engine, ODD))) == []


async def test_a_mapped_column_may_have_a_back_tick_in_its_name(database: Database) -> None:
    mapping = mapped(
        """
tables:
  user:
    table: people
    key: "clerk`id"
    columns: {"user``name": username}
"""
    )
    quoted = (
        ('"clerk`id"', '"user``name"') if database.sqlite else ("`clerk``id`", "`user````name`")
    )
    await database.ddl(
        f"CREATE TABLE people ({quoted[0]} VARCHAR(128) EXACT PRIMARY KEY,"
        f" {quoted[1]} VARCHAR(5) EXACT) OPTIONS"
    )
    await migrate(database.engine, mapping)
    store = await database.store(mapping)
    clerk = Clerk(mapping)
    assert await database.apply(store, clerk.user("user_1", username="ada")) == ["applied"]
    assert await database.apply(store, clerk.user("user_2", username="too long")) == [
        "quarantined: too_long"
    ]
    assert await database.rows("SELECT * FROM people") == [("user_1", "ada")]
