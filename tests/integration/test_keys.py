"""A Clerk id in a column of any type that holds it: every way to the row takes it for the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.mapping.change import ApiRead
from clerk_sync.schema.migrate import migrate
from clerk_sync.store import erasure, profiles
from clerk_sync.sync.diff import compare
from tests.histories import NOW, Clerk, Database, at, mapped, upsert_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DAY: Final = 86_400_000
MAPPING: Final = mapped("""
tables:
  user:
    table: people
    key: clerk_id
    adopt: {username: username}
    columns: {username: username, data: public_metadata}
    on_delete: {mark: deleted_at, purge_after: 1d}
    owns:
      - {table: members, column: user_id, references: clerk_id}
      - {table: posts, column: author, references: clerk_id}
  organizationMembership:
    table: members
    key: clerk_id
    columns: {user_id: public_user_data.user_id}
""")
# A type, and how much of it a unique key has to name.
TYPES: Final = {
    "VARBINARY(64)": "",
    "BLOB": "(128)",
    "TINYBLOB": "(128)",
    "CHAR(64) EXACT": "",
    "TEXT EXACT": "(128)",
    "VARCHAR(64) LATIN COLLATE latin1_bin": "",
}
# Clerk's own ids are as long as each other.
BINARY: Final = "BINARY(32)"
ADA: Final = "user_3HOG1Qx8xuFPYjHxEQM8q0EQBkX"
EVE: Final = "user_3HOG1Qx8xuFPYjHxEQM8q0EQBkY"
MEMBER: Final = "orgmem_3pkb7sQQR273JQ02stZ6BblWIvW"


@pytest.fixture(params=[*TYPES, BINARY])
async def database(request: pytest.FixtureRequest, shared_url: str) -> AsyncIterator[Database]:
    """The app's tables, with ids of one type."""
    type_ = str(request.param)
    async with Database.at(shared_url) as database:
        if database.sqlite:
            type_ = type_.replace("COLLATE latin1_bin", "")
        member = type_.replace("(32)", "(34)")
        part = "" if database.sqlite else TYPES.get(type_, "")
        await database.execute(
            *(f"DROP TABLE IF EXISTS {name}" for name in ("people", "members", "posts"))
        )
        await database.ddl(
            f"CREATE TABLE people (id SERIAL, clerk_id {type_}, username {type_}, data JSON,"
            " deleted_at DATETIME(3)) OPTIONS",
            f"CREATE TABLE members (id SERIAL, clerk_id {member}, user_id {type_}) OPTIONS",
            f"CREATE TABLE posts (id SERIAL, author {type_}) OPTIONS",
            f"CREATE UNIQUE INDEX people_key ON people (clerk_id{part})",
            f"CREATE UNIQUE INDEX members_key ON members (clerk_id{part})",
        )
        await migrate(database.engine, MAPPING)
        await database.empty()
        yield database


def person(clerk: Clerk, clerk_id: str, version: int = 1) -> Any:
    return clerk.user(clerk_id, version, username=clerk_id[::-1], public_metadata={"a": version})


async def counted(database: Database) -> list[int]:
    return [
        await database.value(f"SELECT COUNT(*) FROM {name}")
        for name in ("people", "members", "posts")
    ]


async def test_every_way_takes_the_ids_for_the_same(database: Database) -> None:
    store, clerk = await database.store(MAPPING), Clerk(MAPPING)
    member = clerk.membership(MEMBER, ADA, "org_1")
    changes = [person(clerk, ADA), person(clerk, EVE), member]
    assert await database.apply(store, *changes) == ["applied"] * 3
    assert await database.apply(store, person(clerk, ADA, 2)) == ["applied"]
    await database.execute(f"INSERT INTO posts (author) VALUES ('{ADA}'), ('{EVE}')")

    users = store.targets["user"]
    found = await profiles.identified(database.engine, users, ADA)
    assert found is not None
    assert (found["clerk_id"], found["username"], found["data"]) == (ADA, ADA[::-1], {"a": 2})
    named = await profiles.named(database.engine, users, ADA[::-1])
    assert named is not None
    assert [one["author"] for one in named["posts"]] == [ADA]
    assert json.loads(profiles.to_json(named))["clerk_id"] == ADA

    connection = await database.connect()
    (same,) = await compare(
        connection, store, "user", [upsert_of(person(clerk, ADA, 2))], ApiRead(NOW)
    )
    assert (same.verdict, same.differences) == ("same", ())

    assert await database.apply(store, clerk.deleted(EVE)) == ["applied"]
    later = at(9) + DAY + 1
    assert await erasure.purge(database.engine, store, now_ms=later) == {"user": 1}
    assert await counted(database) == [1, 1, 1]
    removed = await erasure.erase(database.engine, store, ADA, now_ms=NOW)
    assert {name: removed[name] for name in ("people", "members", "posts")} == {
        "people": 1,
        "members": 1,
        "posts": 1,
    }
    assert await counted(database) == [0, 0, 0]


async def test_a_row_is_adopted_by_a_name_of_any_type(database: Database) -> None:
    store, clerk = await database.store(MAPPING), Clerk(MAPPING)
    await database.execute(f"INSERT INTO people (username) VALUES ('{ADA[::-1]}')")
    assert await database.apply(store, person(clerk, ADA)) == ["applied"]
    assert await counted(database) == [1, 0, 0]
