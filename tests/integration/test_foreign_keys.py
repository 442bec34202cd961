"""An app's own tables, whose rows refer to each other: walks write and remove them in order."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from clerk_sync.outcomes import Ending
from clerk_sync.schema.migrate import migrate
from tests.histories import Database, mapped
from tests.walking import walking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.walking import Walking

OWN: Final = (
    (
        "CREATE TABLE people (clerk_id VARCHAR(64) EXACT PRIMARY KEY, username VARCHAR(64) UNIQUE)"
        " OPTIONS"
    ),
    "CREATE TABLE organizations (clerk_id VARCHAR(64) EXACT PRIMARY KEY, name VARCHAR(64)) OPTIONS",
    (
        "CREATE TABLE members (clerk_id VARCHAR(64) EXACT PRIMARY KEY,"
        " user_id VARCHAR(64) EXACT NOT NULL, organization_id VARCHAR(64) EXACT NOT NULL,"
        " FOREIGN KEY (user_id) REFERENCES people (clerk_id),"
        " FOREIGN KEY (organization_id) REFERENCES organizations (clerk_id)) OPTIONS"
    ),
)
MAPPING: Final = mapped(
    """
tables:
  organizationMembership:
    table: members
    key: clerk_id
    columns: {organization_id: organization.id, user_id: public_user_data.user_id}
  organization:
    table: organizations
    key: clerk_id
    columns: {name: name}
  user:
    table: people
    key: clerk_id
    columns: {username: username}
"""
)


@asynccontextmanager
async def referring(url: str, users: int = 0, organizations: int = 1) -> AsyncIterator[Walking]:
    async with Database.at(url) as database:
        await migrate(database.engine, mapped("tables: {}"))
        await database.ddl(*OWN)
    async with walking(url, MAPPING, most=25) as world:
        api = world.api
        for n in range(organizations):
            api.put_organization(f"org_{n}", name=f"n{n}")
        for n in range(users):
            api.put_user(f"user_{n:03}", username=f"u{n}")
            api.put_membership(f"orgmem_{n:03}", f"user_{n:03}", f"org_{n % organizations}")
        yield world


async def agree(world: Walking) -> None:
    api = world.api
    assert await world.ids("user") == sorted(api.users)
    assert await world.ids("organization") == sorted(api.organizations)
    assert await world.ids("organizationMembership") == sorted(api.memberships)


async def test_rows_are_written_after_those_that_they_refer_to(database_url: str) -> None:
    async with referring(database_url, 100, 30) as world:
        ending, report = await world.backfill()
        assert (ending, report.invalid) == (Ending.MENDED, 0)
        await agree(world)
        await world.database.execute("DELETE FROM members", "DELETE FROM people")
        ending, report = await world.reconcile()
        assert (ending, report.invalid) == (Ending.MENDED, 0)
        await agree(world)


async def test_who_joins_during_the_walk_comes_with_the_user(database_url: str) -> None:
    """Their membership is listed, when the walk over users has ended already."""
    async with referring(database_url, 40, 2) as world:
        api = world.api

        def join() -> None:
            api.put_user("user_new", username="new")
            api.put_organization("org_new", name="new")
            api.put_membership("orgmem_new1", "user_new", "org_new")
            api.put_membership("orgmem_new2", "user_001", "org_new")

        api.before_read(2, join, path="/v1/organization_memberships")
        ending, report = await world.backfill()
        assert (ending, report.invalid) == (Ending.MENDED, 0)
        await agree(world)


async def test_rows_go_before_those_that_they_refer_to(database_url: str) -> None:
    async with referring(database_url, 40, 10) as world:
        assert (await world.backfill())[0] is Ending.MENDED
        for gone in ("user_003", "user_004", "org_5"):
            world.api.delete(gone)
        ending, report = await world.reconcile(percent=100)
        assert (ending, report.invalid, report.unconfirmed) == (Ending.MENDED, 0, 0)
        await agree(world)


async def test_a_value_that_is_free_once_its_row_has_gone_is_written(database_url: str) -> None:
    async with referring(database_url, 5) as world:
        assert (await world.backfill())[0] is Ending.MENDED
        world.api.delete("user_003")
        world.api.put_user("user_900", username="u3")
        world.api.put_membership("orgmem_900", "user_900", "org_0")
        ending, report = await world.reconcile()
        assert (ending, report.invalid) == (Ending.MENDED, 0)
        await agree(world)
