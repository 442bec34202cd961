"""Any order, duplication and interleaving ends as one in-order delivery does.

Histories are random; what becomes of them is compared with the same history delivered event
by event, and with what Clerk's newest words say should be there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from clerk_sync.mapping.change import Upsert
from clerk_sync.schema.migrate import migrate
from tests.histories import Clerk, Committing, Database, mapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.store import Store

_TABLES: Final = """
tables:
  user:
    table: people
    key: clerk_id
    columns: {username: username, age: age}
    on_delete: %s
    owns:
      - {table: memberships, column: user_id, references: clerk_id}
  organization:
    table: organizations
    key: clerk_id
    columns: {name: name}
    owns:
      - {table: memberships, column: organization_id, references: clerk_id}
  organizationMembership:
    table: memberships
    key: clerk_id
    columns: {organization_id: organization.id, user_id: public_user_data.user_id, role: role}
"""
REMOVING: Final = mapped(_TABLES % "remove")
MARKING: Final = mapped(_TABLES % "{mark: deleted_at}")
# Of what is set, one column is not mapped: the row may be there only after the delete.
SETTING: Final = mapped(_TABLES % "{mark: deleted_at, set: {username: null, tagline: gone}}")
DDL: Final = (
    """CREATE TABLE people (
        clerk_id VARCHAR(128) EXACT PRIMARY KEY,
        username VARCHAR(8),
        age INTEGER CHECK (age <> 13),
        deleted_at DATETIME,
        tagline VARCHAR(20) DEFAULT 'mine'
    ) OPTIONS""",
    "CREATE TABLE organizations (clerk_id VARCHAR(128) EXACT PRIMARY KEY, name VARCHAR(8)) OPTIONS",
    """CREATE TABLE memberships (
        clerk_id VARCHAR(128) EXACT PRIMARY KEY,
        organization_id VARCHAR(128) EXACT,
        user_id VARCHAR(128) EXACT,
        role VARCHAR(8)
    ) OPTIONS""",
)
NAMES: Final = ("people", "organizations", "memberships")
USERS: Final = ("user_a", "user_A", "user_b")
ORGANIZATIONS: Final = ("org_1", "org_2")
MEMBERS: Final = {
    "m_1": ("user_a", "org_1"),
    "m_2": ("user_b", "org_1"),
    "m_3": ("user_a", "org_2"),
    "m_4": ("user_A", "org_2"),
}
REFUSED: Final = 13


@dataclass(frozen=True)
class Said:
    """One event of a history. `poison` is what makes it unfit: a column, or the database."""

    kind: str
    clerk_id: str
    version: int | None
    event: int
    poison: str | None = None


@dataclass(frozen=True)
class Course:
    """How a history reaches two committers: order, duplicates, and where each event goes."""

    seed: int
    again: int
    batch_limit: int
    writers: int


def said() -> st.SearchStrategy[list[Said]]:
    moments = st.integers(1, 4)
    saves = st.builds(
        Said,
        st.just("user"),
        st.sampled_from(USERS),
        moments,
        moments,
        st.sampled_from([None, None, None, None, "column", "database"]),
    )
    organizations = st.builds(
        Said, st.just("organization"), st.sampled_from(ORGANIZATIONS), moments, moments
    )
    memberships = st.builds(
        Said, st.just("organizationMembership"), st.sampled_from([*MEMBERS]), moments, moments
    )
    ends = st.one_of(
        st.builds(Said, st.just("user"), st.sampled_from(USERS), st.none(), moments),
        st.builds(
            Said, st.just("organization"), st.sampled_from(ORGANIZATIONS), st.none(), moments
        ),
        st.builds(
            Said, st.just("organizationMembership"), st.sampled_from([*MEMBERS]), st.none(), moments
        ),
    )
    return st.lists(
        st.one_of(saves, saves, memberships, organizations, memberships, ends),
        min_size=4,
        max_size=28,
    )


courses: Final = st.builds(
    Course, st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(1, 12), st.integers(1, 2)
)


def changes_of(history: Sequence[Said], mapping: Mapping) -> list[Change]:
    clerk = Clerk(mapping)

    def change(number: int, said: Said) -> Change:
        if said.version is None:
            return clerk.deleted(said.clerk_id, said.event, kind=said.kind)
        fields: dict[str, Any] = {"name": f"n{number}", "role": f"r{number}"}
        fields |= {"username": f"u{number}", "age": number + 100}
        if said.poison == "column":
            fields["username"] = "nine chars"
        elif said.poison == "database":
            fields["age"] = REFUSED
        if said.kind == "organizationMembership":
            user, organization = MEMBERS[said.clerk_id]
            return clerk.membership(
                said.clerk_id, user, organization, said.version, event=said.event, **fields
            )
        return clerk.save(said.kind, said.clerk_id, said.version, event=said.event, **fields)

    return [change(number, one) for number, one in enumerate(history)]


async def in_order(database: Database, store: Store, changes: Sequence[Change]) -> None:
    """Deliver one event after another."""
    async with Committing(database, store) as committing:
        for change in changes:
            (answer,) = await committing.commit(change)
            assert answer.split(":")[0] in ("applied", "stale", "quarantined"), answer


async def at_once(
    database: Database, store: Store, changes: Sequence[Change], course: Course
) -> None:
    """Deliver permuted and duplicated, by two committers at the same time."""
    chance = Random(course.seed)
    deliveries = [*changes, *chance.choices(changes, k=course.again)]
    chance.shuffle(deliveries)
    limits = {"batch_limit": course.batch_limit, "writers": course.writers}
    async with (
        Committing(database, store, **limits) as left,
        Committing(database, store, **limits) as right,
    ):
        answers = await asyncio.gather(
            *(
                committing.commit(*(d for d, goes in zip(deliveries, sides, strict=True) if goes))
                for sides in [[chance.random() < 0.5 for _ in deliveries]]
                for committing, sides in ((left, sides), (right, [not side for side in sides]))
            )
        )
    words = {answer.split(":")[0] for side in answers for answer in side}
    assert words <= {"applied", "stale", "quarantined", "duplicate"}


def expected(
    history: Sequence[Said], changes: Sequence[Change], mapping: Mapping
) -> dict[str, dict[str, str | None]]:
    """What should be there, by the newest version of everything that was not deleted."""
    marking = mapping is not REMOVING
    gone = {said.clerk_id for said in history if said.version is None}
    ending = {user for user in USERS if user in gone} if marking else set()
    newest: dict[str, Upsert] = {}
    for said, change in zip(history, changes, strict=True):
        if isinstance(change.effect, Upsert) and said.poison is None:
            best = newest.get(said.clerk_id)
            if best is None or change.effect.version > best.version:
                newest[said.clerk_id] = change.effect
    column = {"user": "username", "organization": "name", "organizationMembership": "role"}
    rows: dict[str, dict[str, str | None]] = {name: {} for name in NAMES}
    tables = dict(zip(column, NAMES, strict=True))
    for clerk_id, upsert in newest.items():
        owners = set(MEMBERS.get(clerk_id, ())) - ending
        if (clerk_id in gone and clerk_id not in ending) or owners & gone:
            continue
        kind, (_, _, svix_id) = upsert.entity[0], upsert.version
        number = int(svix_id.split("_")[1]) - 1
        content = None
        if clerk_id not in ending or mapping is not SETTING:
            content = f"{column[kind][0]}{number}"
        rows[tables[kind]][clerk_id] = content
    return rows


async def present(database: Database) -> dict[str, dict[str, str | None]]:
    columns = zip(NAMES, ("username", "name", "role"), strict=True)
    return {
        name: dict(await database.rows(f"SELECT clerk_id, {column} FROM {name}"))
        for name, column in columns
    }


async def unset(database: Database) -> list[tuple[Any, ...]]:
    """Rows that are marked, and not all that a delete sets; or the other way round."""
    return await database.rows(
        "SELECT clerk_id FROM people WHERE (deleted_at IS NULL) <>"
        " (username IS NOT NULL AND tagline = 'mine')"
    )


async def settled(
    database: Database, history: Sequence[Said], *, marking: bool
) -> dict[str, list[str]]:
    """The snapshot, but for versions that no longer matter.

    Of a user that was removed, what the database would refuse is only tried, and then rolled
    back, while it comes before the removal.
    """
    snapshot = await database.snapshot(*NAMES)
    gone = {said.clerk_id for said in history if said.version is None}
    poisoned = {said.clerk_id for said in history if said.poison == "database"}
    if not marking:
        moot = [f"'{clerk_id}'" for clerk_id in gone & poisoned]
        snapshot["state"] = [
            row for row in snapshot["state"] if not any(clerk_id in row for clerk_id in moot)
        ]
    return snapshot


@pytest.fixture(scope="module")
def prepared(shared_url: str) -> str:
    async def prepare() -> None:
        async with Database.at(shared_url) as database:
            await database.ddl(*DDL)
            await migrate(database.engine, REMOVING)

    asyncio.run(prepare())
    return shared_url


async def check(url: str, history: Sequence[Said], course: Course, mapping: Mapping) -> None:
    marking = mapping is not REMOVING
    changes = changes_of(history, mapping)
    async with Database.at(url) as database:
        store = await database.store(mapping)
        await database.empty(*NAMES)
        await in_order(database, store, changes)
        reference = await settled(database, history, marking=marking)
        detained = await database.quarantined()
        await database.empty(*NAMES)
        await at_once(database, store, changes, course)
        assert await settled(database, history, marking=marking) == reference
        assert await present(database) == expected(history, changes, mapping)
        if mapping is SETTING:
            assert await unset(database) == []
        # What the database refuses is only ever tried while it would be the newest.
        by_column = {
            change.svix_id
            for said, change in zip(history, changes, strict=True)
            if said.poison == "column"
        }
        refused = {
            change.svix_id
            for said, change in zip(history, changes, strict=True)
            if said.poison == "database"
        }
        late = await database.quarantined()
        assert late.keys() - refused == detained.keys() - refused == by_column
        assert {late[one] for one in late.keys() & refused} <= {"refused"}


CORNERS: Final = (
    # An exact tie, and its duplicate, beside a deletion of a name that differs in case.
    [Said("user", "user_a", 2, 2), Said("user", "user_a", 2, 2), Said("user", "user_A", None, 1)],
    # A membership before, between and after the ends of both that it joins.
    [
        Said("organizationMembership", "m_1", 1, 1),
        Said("user", "user_a", None, 2),
        Said("organizationMembership", "m_1", 3, 3),
        Said("organization", "org_1", None, 4),
    ],
    # The newest word about a user is one that no column takes.
    [
        Said("user", "user_b", version, 1, poison)
        for version, poison in ((1, None), (3, "database"), (2, None), (4, "column"))
    ],
    # A newer version seen at an earlier time.
    [Said("user", "user_a", 1, 4), Said("user", "user_a", 2, 1), Said("user", "user_a", 2, 3)],
    # A delete before, between and after what it has to clear.
    [
        Said("user", "user_a", 2, 2),
        Said("user", "user_a", None, 3),
        Said("user", "user_a", 4, 4),
        Said("user", "user_b", None, 1),
        Said("user", "user_b", 2, 2),
    ],
)


@given(history=said(), course=courses, mapping=st.sampled_from([REMOVING, MARKING, SETTING]))
@example(history=CORNERS[0], course=Course(1, 3, 2, 1), mapping=REMOVING)
@example(history=CORNERS[1], course=Course(2, 2, 1, 2), mapping=REMOVING)
@example(history=CORNERS[1], course=Course(5, 2, 4, 1), mapping=MARKING)
@example(history=CORNERS[2], course=Course(3, 4, 8, 1), mapping=REMOVING)
@example(history=CORNERS[3], course=Course(4, 0, 1, 1), mapping=MARKING)
@example(history=CORNERS[4], course=Course(1, 3, 1, 1), mapping=SETTING)
@example(history=CORNERS[4], course=Course(6, 2, 5, 2), mapping=SETTING)
@settings(
    max_examples=75,
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_delivery_ends_as_the_one_in_order(
    prepared: str,
    history: list[Said],
    course: Course,
    mapping: Mapping,
) -> None:
    asyncio.run(check(prepared, history, course, mapping))
