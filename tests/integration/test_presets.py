"""The presets' commented-out tables: a reader takes off the `# `, and Clerk's events find them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.clerk import catalog, samples
from clerk_sync.clerk.catalog import ACTIONS, KINDS, SECRET_TYPES, Action
from clerk_sync.clerk.signature import Delivery
from clerk_sync.mapping import loader
from clerk_sync.mapping.ingest import change_of
from clerk_sync.schema.checks import advice
from clerk_sync.schema.migrate import migrate
from clerk_sync.schema.reflection import live_tables
from tests.histories import NOW, Database, upsert_of

if TYPE_CHECKING:
    from clerk_sync.mapping.change import Change

TEXT: Final = Path(loader.__file__).with_name("presets").joinpath("mirror.yaml").read_text()
# Only what the file comments out is indented behind its `# `.
UNCOMMENTED: Final = re.sub(r"^# (?=  )", "", TEXT, flags=re.MULTILINE)
WHOLE: Final = loader.read(UNCOMMENTED, source="m")
TYPES: Final = [type_ for type_ in catalog.TYPES if type_ not in SECRET_TYPES]
# What Clerk's samples leave empty: nobody is both kinds of payer, and nothing failed.
EMPTY: Final = {
    *("canceled_at", "ended_at", "failed_at", "failed_reason"),
    *("organization_id", "user_id", "past_due_at"),
}


def sample(type_: str, clerk_id: str, moment: int) -> Change:
    """The sample of this type as it comes a while after the moment before."""
    envelope = samples.event(type_, clerk_id=clerk_id, now_ms=NOW + moment * 60_000)
    delivery = Delivery(f"msg_{moment}", NOW // 1000, json.dumps(envelope))
    return change_of(delivery, WHOLE, instance_id=None)


def tables() -> dict[str, str]:
    return {kind: table.table for kind, table in WHOLE.tables.items()}


def test_every_object_that_can_be_mapped_has_its_table() -> None:
    assert set(WHOLE.tables) == set(KINDS)
    assert WHOLE.warnings == ()
    assert set(ACTIONS) == set(TYPES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if f"#   {kind}:" in TEXT])
def test_one_table_alone_can_be_taken(kind: str) -> None:
    (block,) = re.findall(rf"^#   {kind}:\n(?:#     .*\n)+", TEXT, re.MULTILINE)
    name = WHOLE.tables[kind].table
    text = TEXT.replace(block, re.sub("^# ", "", block, flags=re.MULTILINE))
    text = re.sub(rf"^# (?=.*table: {name},)", "", text, flags=re.MULTILINE)
    mapping = loader.read(text, source="m")
    assert mapping.tables.keys() == {"user", "organization", "organizationMembership", kind}
    owners = [one.kind for one in mapping.tables.values() if name in {o.table for o in one.owns}]
    assert owners == {
        "session": ["user"],
        "organizationInvitation": ["organization"],
        "organizationDomain": ["organization"],
    }.get(kind, [])


async def test_clerk_s_events_find_their_tables(database_url: str) -> None:
    moments = count(1)
    async with Database.at(database_url) as database:
        await migrate(database.engine, WHOLE)
        assert list(advice(WHOLE, await live_tables(database.engine, WHOLE))) == []
        store = await database.store(WHOLE)
        last: dict[str, Any] = {}
        types = defaultdict(list)
        for type_ in TYPES:
            kind, action = ACTIONS[type_]
            types[action].append((type_, f"{kind}_1"))
        for type_, clerk_id in types[Action.SAVE]:
            change = sample(type_, clerk_id, next(moments))
            assert await database.apply(store, change) == ["applied"], type_
            last[ACTIONS[type_][0]] = upsert_of(change).values
        for kind, table in tables().items():
            ((clerk_id, *_),) = await database.rows(f"SELECT clerk_id FROM {table}")
            assert clerk_id == f"{kind}_1"
            filled = {name for name, value in last[kind].items() if value not in (None, "")}
            assert {column.name for column in WHOLE.tables[kind].columns} - filled <= EMPTY
        statuses = {
            kind: await database.value(f"SELECT status FROM {table}")
            for kind, table in tables().items()
            if "status" in last[kind]
        }
        assert statuses == {kind: last[kind]["status"] for kind in statuses}
        assert statuses["session"] == "revoked"
        assert statuses["organizationInvitation"] == "revoked"
        for type_, clerk_id in types[Action.DELETE]:
            change = sample(type_, clerk_id, next(moments))
            assert await database.apply(store, change) == ["applied"], type_
        # What had no event of its own went with its owner, or stays.
        left = {
            kind
            for kind, table in tables().items()
            if await database.value(f"SELECT COUNT(*) FROM {table}")
        }
        assert left == set(KINDS) - {
            kind for kind, action in ACTIONS.values() if action is Action.DELETE
        }


async def test_what_belongs_to_somebody_goes_and_stays_away_with_them(shared_url: str) -> None:
    moments = count(100)
    async with Database.at(shared_url) as database:
        await migrate(database.engine, WHOLE)
        store = await database.store(WHOLE)
        session = sample("session.created", "sess_1", next(moments))
        invitation = sample("organizationInvitation.created", "orginv_1", next(moments))
        domain = sample("organizationDomain.created", "orgdmn_1", next(moments))
        paid = sample("paymentAttempt.updated", "pa_1", next(moments))
        assert await database.apply(store, session, invitation, domain, paid) == ["applied"] * 4
        user, organization = (
            upsert_of(one).values[name]
            for one, name in ((session, "user_id"), (invitation, "organization_id"))
        )
        gone = [
            sample("user.deleted", user, next(moments)),
            sample("organization.deleted", organization, next(moments)),
        ]
        assert await database.apply(store, *gone) == ["applied"] * 2
        late = [
            sample("session.ended", "sess_1", next(moments)),
            sample("session.created", "sess_2", next(moments)),
            sample("organizationInvitation.revoked", "orginv_1", next(moments)),
            sample("organizationDomain.updated", "orgdmn_1", next(moments)),
        ]
        assert await database.apply(store, *late) == ["stale"] * 4
        for kind in ("session", "organizationInvitation", "organizationDomain"):
            assert await database.value(f"SELECT COUNT(*) FROM {tables()[kind]}") == 0
        assert await database.rows("SELECT clerk_id, user_id FROM clerk_payment_attempts") == [
            ("pa_1", user)
        ]


async def test_a_payer_s_empty_id_is_no_owner(shared_url: str) -> None:
    owns = (
        "      - {table: clerk_payment_attempts, column: organization_id, references: clerk_id}\n"
    )
    text = UNCOMMENTED.replace(
        "\n  organizationMembership:", f"{owns}\n  organizationMembership:", 1
    )
    mapping = loader.read(text, source="m")
    assert mapping.tables["organization"].owns[-1].table == "clerk_payment_attempts"
    async with Database.at(shared_url) as database:
        await migrate(database.engine, mapping)
        await database.empty("clerk_payment_attempts")
        change = sample("paymentAttempt.updated", "pa_1", 1)
        assert upsert_of(change).values["organization_id"] == ""
        assert await database.apply(await database.store(mapping), change) == ["applied"]
        states = await database.rows("SELECT kind, clerk_id FROM clerk_sync_entities")
        assert states == [("paymentAttempt", "pa_1")]
