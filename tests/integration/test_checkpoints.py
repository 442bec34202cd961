"""A backfill goes on where it was left off: with the same mapping, into the same tables."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from clerk_sync.clerk.api import ClerkRefused
from clerk_sync.outcomes import Ending
from tests.clerk_api import failing
from tests.histories import mapped
from tests.walking import prepare, walking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from clerk_sync.mapping.model import Mapping as Mapped
    from clerk_sync.store.store import Store
    from tests.walking import Walking

_LATER: Final = """
tables:
  user:
    table: people
    create: true
    key: clerk_id
    columns:
      username: {value: %s, type: string(8)}
      metadata: {value: public_metadata, type: json}
    on_delete: remove
"""
ANOTHER_COLUMN: Final = mapped(
    _LATER.replace(
        "      metadata", "      first: {value: first_name, type: string(20)}\n      metadata"
    )
    % "username"
)
ANOTHER_VALUE: Final = mapped(_LATER % "first_name")
SIZE: Final = 300


@pytest.fixture(scope="module")
def stores(shared_url: str) -> Mapping[bool, Store]:
    added = "ALTER TABLE people ADD COLUMN first VARCHAR(20)"
    return asyncio.run(prepare(shared_url, added))


@pytest.fixture
async def left_off(shared_url: str, stores: Mapping[bool, Store]) -> AsyncIterator[Walking]:
    """A backfill that ended after some pages of 100 users."""
    async with walking(shared_url, store=stores[False], most=50) as world:
        for n in range(SIZE):
            world.api.put_user(f"user_{n:04}", username="ada", first_name="first")
        world.api.faults.append(failing(403, path="/v1/users", query="after", skip=2, times=100))
        with pytest.raises(ClerkRefused):
            await world.backfill()
        world.api.faults.clear()
        assert 50 < len(await world.ids("user")) < SIZE
        yield world


async def under(world: Walking, mapping: Mapped) -> Walking:
    """The same, once the mapping is this one."""
    store = await world.database.store(mapping)
    runs = replace(world.runs, mapping=mapping, store=store)
    return replace(world, mapping=mapping, store=store, runs=runs)


async def test_it_resumes(left_off: Walking) -> None:
    before = len(await left_off.ids("user"))
    ending, report = await left_off.backfill()
    assert (ending, report.restarted) == (Ending.MENDED, [])
    assert report.resumed is not None
    assert report.tallies["user"].read == SIZE - before
    assert len(await left_off.ids("user")) == SIZE


@pytest.mark.parametrize("mapping", [ANOTHER_COLUMN, ANOTHER_VALUE], ids=["column", "value"])
async def test_another_mapping_starts_from_the_beginning(
    left_off: Walking, mapping: Mapped
) -> None:
    world = await under(left_off, mapping)
    ending, report = await world.backfill()
    assert ending is Ending.MENDED
    assert report.restarted == ["user: starts from the beginning, as its mapping has changed"]
    column = "first" if mapping is ANOTHER_COLUMN else "username"
    query = f"SELECT COUNT(*) FROM people WHERE {column} = 'first'"
    assert await world.database.value(query) == SIZE


@pytest.mark.parametrize(
    "emptied",
    ["DELETE FROM people", "DELETE FROM people WHERE username = 'ada' AND clerk_id < 'user_0090'"],
)
async def test_a_table_without_the_rows_starts_from_the_beginning(
    left_off: Walking, emptied: str
) -> None:
    await left_off.database.execute(emptied)
    ending, report = await left_off.backfill()
    assert ending is Ending.MENDED
    (why,) = report.restarted
    assert why.startswith("user: starts from the beginning, as `people` lacks ")
    assert len(await left_off.ids("user")) == SIZE


async def test_a_few_missing_rows_are_reported_at_the_end(left_off: Walking) -> None:
    """They may have been deleted by webhooks; if not, the counts differ."""
    await left_off.database.execute("DELETE FROM people WHERE clerk_id < 'user_0003'")
    ending, report = await left_off.backfill()
    assert (ending, report.restarted) == (Ending.UNMENDED, [])
    assert report.discrepancies == ["Clerk counts 300 users, `people` has 297 of them"]
    # Nothing is kept of it: the next one looks at all of them.
    assert (await left_off.backfill())[0] is Ending.MENDED
    assert len(await left_off.ids("user")) == SIZE


async def test_a_checkpoint_of_an_older_version_starts_from_the_beginning(
    left_off: Walking,
) -> None:
    await left_off.database.execute("UPDATE clerk_sync_cursors SET mapping = NULL")
    ending, report = await left_off.backfill()
    assert (ending, len(report.restarted)) == (Ending.MENDED, 1)
