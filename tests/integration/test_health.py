"""Health suspends the committer while the database or the schema is not right, and resumes it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from clerk_sync.health import Health
from clerk_sync.outcomes import Reason
from clerk_sync.schema.migrate import migrate
from tests.histories import Clerk, Committing, Database, mapped
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PEOPLE: Final = mapped("""
tables:
  user:
    table: people
    create: true
    key: clerk_id
    columns: {username: {value: username, type: string(8)}}
""")


@asynccontextmanager
async def watched(url: str) -> AsyncIterator[tuple[Database, Committing, Health]]:
    """A committer that gets its store from health alone."""
    async with Database.at(url) as database:
        await migrate(database.engine, PEOPLE)
        async with Committing(database, None) as committing:
            health = Health(database.engine, PEOPLE, committing.committer, reads=database.engine)
            watching = asyncio.create_task(health.watch())
            try:
                await became(health, None)
                yield database, committing, health
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)


async def became(health: Health, reason: Reason | None) -> None:
    async def now() -> Reason | None:
        return health.readiness.reason if not health.readiness.ready else None

    await until(now, lambda found: found is reason)


async def test_it_resumes_as_soon_as_the_database_accepts_writes_again(database_url: str) -> None:
    clerk = Clerk(PEOPLE)
    async with watched(database_url) as (database, committing, health):
        assert await committing.commit(clerk.user("user_1")) == ["applied"]
        await database.execute("ALTER TABLE clerk_sync_entities RENAME TO elsewhere")
        try:
            await became(health, Reason.DATABASE)
            refused = await committing.commit(clerk.user("user_2"))
            assert refused[0].startswith("unavailable: ")
        finally:
            await database.execute("ALTER TABLE elsewhere RENAME TO clerk_sync_entities")
        await became(health, None)
        # Not only the one that finds out.
        answers = await asyncio.gather(
            *(committing.commit(clerk.user(f"user_{n}")) for n in range(3, 7))
        )
        assert answers == [["applied"]] * 4


async def test_trouble_with_the_schema_is_checked_at_once(database_url: str) -> None:
    clerk = Clerk(PEOPLE)
    async with watched(database_url) as (database, committing, health):
        await database.execute("ALTER TABLE people RENAME TO gone")
        try:
            assert await committing.commit(clerk.user("user_1")) == ["unavailable: schema"]
            await became(health, Reason.SCHEMA)
            assert health.users is None
            assert await committing.commit(clerk.user("user_1")) == ["unavailable: schema"]
        finally:
            await database.execute("ALTER TABLE gone RENAME TO people")
        await became(health, None)
        assert health.users is not None
        assert await committing.commit(clerk.user("user_1")) == ["applied"]
