"""The page of the SQL has every statement, as it goes to each engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.database.errors import RejectedByDatabase
from clerk_sync.mapping import loader
from clerk_sync.schema.migrate import migrate
from tests.histories import Clerk, Database, at, upsert_of
from tools import sql_reference

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from clerk_sync.database.connection import Connection, Result, Step
    from clerk_sync.database.errors import SchemaChanged

MIRROR: Final = loader.load("mirror")
ORBYTAL: Final = loader.load("orbytal")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database.at(database_url) as database:
        yield database


class Recording:
    """A real connection that notes the text of every statement."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent: set[str] = set()

    def _note(self, steps: Sequence[Step]) -> None:
        self.sent.update(sql_reference.normal(statement) for statement, _ in steps)

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        self._note(steps)
        return await self._connection.run(steps)

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        self._note(steps)
        return await self._connection.try_each(steps)

    async def rollback(self) -> None:
        await self._connection.rollback()

    def close(self) -> None:
        """Leave it to the database, whose connection it is."""


def test_the_page_is_what_the_code_sends() -> None:
    assert sql_reference.PAGE.read_text("utf-8") == sql_reference.text(), "run `make generate`"


def test_every_statement_of_the_code_is_on_the_page() -> None:
    named = {entry.name for entries in sql_reference.SECTIONS.values() for entry in entries}
    own = {name for name in sql_reference.statements("MySQL") if "." not in name}
    of_tables = {
        name.partition(".")[2] for name in sql_reference.statements("MySQL") if "." in name
    }
    assert own == {name for name in named if "." not in name}
    assert of_tables == {name.partition(".")[2] for name in named if "." in name}


async def engine_of(database: Database) -> str:
    if database.sqlite:
        return "SQLite"
    return "MariaDB" if "MariaDB" in await database.value("SELECT VERSION()") else "MySQL"


@pytest.mark.past_vitess
async def test_what_goes_to_the_database_is_on_the_page(database: Database) -> None:
    known = " ; ".join(sql_reference.statements(await engine_of(database)).values())
    connection = Recording(await database.connect())
    await migrate(database.engine, MIRROR)
    clerk, store = Clerk(MIRROR), await database.store(MIRROR)
    organization = clerk.save("organization", "org_1", name="x" * 300)  # too long: quarantined

    async def apply(*changes: Any) -> None:
        await store.apply(connection, changes, now_ms=at(99))

    await apply(clerk.user("user_1", username="ada"))
    await apply(organization)
    await apply(clerk.save("organization", "org_1", 2, svix_id=organization.svix_id, name="x"))
    await apply(clerk.membership("orgmem_1", "user_1", "org_1"))
    await store.locked(connection, [clerk.user("user_1", 3)])
    await store.locked(connection, [clerk.deleted("user_1")])
    await apply(clerk.deleted("user_1"))
    await store.insert(connection, "user", [upsert_of(clerk.user("user_2"))], now_ms=at(99))

    await database.ddl(
        """CREATE TABLE users (
            id SERIAL, username VARCHAR(255) UNIQUE, display_name VARCHAR(255), img_url VARCHAR(255)
        ) OPTIONS""",
        "CREATE TABLE blocks (id SERIAL, user_id BIGINT) OPTIONS",
        "INSERT INTO users (username) VALUES ('ada')",
    )
    await migrate(database.engine, ORBYTAL)
    clerk, store = Clerk(ORBYTAL), await database.store(ORBYTAL)
    await apply(clerk.user("user_3", username="ada"))
    await apply(clerk.user("user_3", 2, username="ida"))
    moved = clerk.user("user_3", 3, username="eda")
    await store.apply(connection, [moved], now_ms=at(99), vacating=[moved])
    await apply(clerk.user("user_4", username="ada"))
    await apply(clerk.deleted("user_3"))

    sent = {part for text in connection.sent for part in text.split(" UNION ALL ")}
    # SQLite has no second unique key that an upsert could collide with unseen.
    assert len(sent) > (15 if database.sqlite else 20)
    assert sent - {"COMMIT"} == {part for part in sent if part in known}
    assert all(re.search(r"\b(SELECT|INSERT|UPDATE|DELETE)\b", one) for one in sent - {"COMMIT"})
