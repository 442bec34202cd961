"""Probe rows: in each mapped table a row is written, read back and deleted, and never committed.

`checks` finds what the live tables show. This tries the rest in one transaction, both through the
driver, as webhooks do, and through SQLAlchemy, as `erase`, `ensure` and `purge_after` do. No other
session sees the rows.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
import string
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
import stamina
from asyncmy.constants import ER
from asyncmy.errors import MySQLError

from clerk_sync.clerk import samples
from clerk_sync.clerk.catalog import KINDS, PROBE_IDS, TYPES
from clerk_sync.clock import now_ms
from clerk_sync.database.connection import COMMIT, Connection, Result, Step, shared
from clerk_sync.database.errors import (
    Contention,
    DatabaseUnavailable,
    ErrorNumber,
    LockWaitTimeout,
    RejectedByDatabase,
    SchemaChanged,
    translate_engine_errors,
)
from clerk_sync.mapping.change import Change, Delete, Delivered, Upsert
from clerk_sync.mapping.expressions import row_of
from clerk_sync.mapping.model import Column, Mapping, TableMapping
from clerk_sync.outcomes import Outcome, Reason
from clerk_sync.schema.binding import store_of
from clerk_sync.schema.checks import type_text, unfilled
from clerk_sync.store import erasure, profiles
from clerk_sync.store.target import unique_keys
from clerk_sync.store.values import InvalidValue, as_text, encoder_for

if TYPE_CHECKING:
    from collections.abc import Mapping as Names
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from clerk_sync.schema.reflection import Live
    from clerk_sync.store.store import Store

_SECONDS: Final = 10
_ATTEMPTS: Final = 4
# No id of Clerk's has a hyphen in it.
_MARK: Final = "clerk-sync-probe-"
_LETTERS: Final = string.digits + string.ascii_lowercase
_MEANWHILE_MS: Final = 1000
_DENIED: Final = frozenset(
    {
        ER.DBACCESS_DENIED_ERROR,
        ER.TABLEACCESS_DENIED_ERROR,
        ER.COLUMNACCESS_DENIED_ERROR,
        ER.PROCACCESS_DENIED_ERROR,
    }
)
_USED_UP: Final = frozenset({ErrorNumber.AUTOINC_OUT_OF_RANGE, ErrorNumber.AUTOINC_READ_FAILED})
_PARENTLESS: Final = frozenset({ER.NO_REFERENCED_ROW, ER.NO_REFERENCED_ROW_2})
# What is tried for a column that may not be null where the example is null.
_FILLERS: Final[tuple[Any, ...]] = (
    *("probe", 1, {}, "00:00:00", "192.0.2.1", "2001:db8::1"),
    "00000000-0000-4000-8000-000000000000",
)
OFF: Final = "CLERK_SYNC_PROBE_ROWS=false leaves this out"


@dataclass(slots=True)
class Rehearsed:
    """The result: the tables that took a row, the faults, and what could not be tried."""

    tables: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class AccessDenied(DatabaseUnavailable):
    """The database account lacks a privilege on a mapped table."""


class _Fault(Exception):
    """A fault, in words for people."""


class _Untried(Exception):
    """Why a table could not be tried, or None where a fault says so already."""


async def rehearse(engine: AsyncEngine, mapping: Mapping, live: Live) -> Rehearsed:
    """Write a probe row to every mapped table of a schema without faults.

    Raises AccessDenied or DatabaseUnavailable.
    """
    again = stamina.AsyncRetryingCaller(attempts=_ATTEMPTS, wait_initial=0.05, wait_max=1)
    return await again(Contention, _rehearsed, engine, mapping, live)


async def _rehearsed(engine: AsyncEngine, mapping: Mapping, live: Live) -> Rehearsed:
    with translate_engine_errors():
        async with engine.connect() as connection:
            transaction = await connection.begin()
            try:
                # Explicitly: nothing that follows may be kept, whatever the session's autocommit.
                sqlite = live.dialect.name == "sqlite"
                await connection.exec_driver_sql("BEGIN IMMEDIATE" if sqlite else "BEGIN")
                rehearsal = _Rehearsal(connection, mapping, live)
                session = _Uncommitted(await shared(connection, seconds=_SECONDS))
                return await rehearsal.run(session)
            finally:
                # A connection that broke has nothing left to roll back: the server did.
                with suppress(sa.exc.DBAPIError):
                    await transaction.rollback()


class _Uncommitted:
    """A session that leaves out every COMMIT."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        kept = [step for step in steps if step[0] != COMMIT[0]]
        results = await self._connection.run(kept) if kept else []
        return results + [Result(0, ())] * (len(steps) - len(kept))

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        return await self._connection.try_each(steps)

    async def rollback(self) -> None:
        await self._connection.rollback()

    def close(self) -> None:
        self._connection.close()


class _Rehearsal:
    def __init__(self, connection: AsyncConnection, mapping: Mapping, live: Live) -> None:
        self._connection = connection
        self._live = live
        self._store: Store = store_of(mapping, live)
        # Those that others belong to come first, and go last.
        self._mapped = sorted(mapping.tables.values(), key=lambda one: KINDS.index(one.kind))
        self._mapping = mapping
        self._now_ms = now_ms()
        self._ids = _ids()
        self._found = Rehearsed()

    async def run(self, session: Connection) -> Rehearsed:
        for table in self._mapped:
            for trigger in self._live.details[table.table].triggers:
                self._found.warnings.append(
                    f"{table.places['table']}: trigger `{trigger}` of `{table.table}` runs for the "
                    f"probe row, too: what it does outside of the transaction stays; {OFF}"
                )
        written = [table for table in self._mapped if await self._tried(session, table, self._save)]
        for table in reversed(written):
            if await self._tried(session, table, self._delete):
                self._found.tables.insert(0, table.table)
        return self._found

    async def _tried(self, session: Connection, table: TableMapping, what: Any) -> bool:
        """Return whether it succeeded. What failed is rolled back and noted."""
        await self._connection.exec_driver_sql("SAVEPOINT rehearsal")
        try:
            await what(session, table)
        except _Fault as fault:
            self._found.faults.append(str(fault))
        except _Untried as untried:
            if untried.args:
                self._found.warnings.append(f"{table.at}: `{table.table}` is not tried: {untried}")
        except (RejectedByDatabase, SchemaChanged) as error:
            self._note(table, error)
        except DatabaseUnavailable as error:
            raise self._unavailable(table, error) from error
        except sa.exc.DBAPIError as error:
            self._note_engine(table, error)
        except (sa.exc.SQLAlchemyError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            self._found.faults.append(f"{table.at}: `{table.table}`: {text}")
        else:
            return True
        await self._connection.exec_driver_sql("ROLLBACK TO SAVEPOINT rehearsal")
        return False

    async def _save(self, session: Connection, table: TableMapping) -> None:
        """Write a row, write it again, and read it back, by both ways."""
        target, clerk_id = self._store.targets[table.kind], self._ids[table.kind]
        later = self._now_ms + _MEANWHILE_MS
        await self._apply(session, table, *self._upsert(table, "created", self._now_ms))
        source, upsert = self._upsert(table, "updated", later)
        await self._apply(session, table, source, upsert)
        about = f"{table.places['key']}: `{table.key}` of `{table.table}`"
        other_case = clerk_id.swapcase()
        stored, others = await session.run(
            [target.read.of([clerk_id]), target.present.of([other_case])]
        )
        if len(stored.rows) != 1 or as_text(stored.rows[0][0]) != clerk_id:
            raise _Fault(f"{about} does not give back the row of the Clerk id that was written")
        if others.rows:
            raise _Fault(f"{about} takes {clerk_id} for {other_case}, and Clerk's ids differ")
        row = target.row(clerk_id, upsert.values)
        for place in target.differing(row, stored.rows[0]):
            raise _Fault(
                f"{self._place(table, target.names[place])}: `{target.names[place]}` of "
                f"`{table.table}` gives back {stored.rows[0][place]!r} for {row[place]!r}"
            )
        found = await profiles.row_of(self._connection, target, clerk_id)
        if found is None or found[table.key] != clerk_id:
            raise _Fault(f"{about} is not found by `ensure` and `erase`")
        profiles.to_json(found)
        if table.kind == "user":
            await erasure.everything_of(self._connection, self._store, ("user", clerk_id))

    async def _delete(self, session: Connection, table: TableMapping) -> None:
        """Delete the row by each way; what it owns goes along."""
        target, key = self._store.targets[table.kind], (table.kind, self._ids[table.kind])
        removed = await erasure.delete_rows(self._connection, store=self._store, keys=[key])
        if not removed[target.table.name]:
            raise _Fault(f"{table.places['key']}: `erase` does not find a row of `{table.table}`")
        await self._connection.exec_driver_sql("ROLLBACK TO SAVEPOINT rehearsal")
        later = self._now_ms + 2 * _MEANWHILE_MS
        svix_id = self._delivery(f"{table.kind}_deleted")
        source = Delivered(svix_id, f"{table.kind}.deleted", later)
        await self._apply(session, table, source, Delete(key, later))
        (left,) = await session.run([target.read.of([key[1]])])
        marked = [row for row in left.rows if table.mark and row[-1] is not None]
        if len(left.rows) != len(marked) or bool(table.mark) != bool(marked):
            raise _Fault(f"{table.at}: a delete leaves the row of `{table.table}` as it was")

    async def _apply(
        self, session: Connection, table: TableMapping, source: Delivered, effect: Upsert | Delete
    ) -> None:
        changes = [Change(source, effect)]
        (answer,) = await self._store.apply(session, changes, now_ms=self._now_ms)
        if answer.outcome is not Outcome.APPLIED:
            outcome = answer.reason.value if answer.reason else answer.outcome.value
            raise _Fault(f"{table.at}: an event for `{table.table}` is not applied: {outcome}")

    def _delivery(self, what: str) -> str:
        return f"{PROBE_IDS}{self._ids['user']}_{what}"

    # The row

    def _upsert(self, table: TableMapping, what: str, now_ms: int) -> tuple[Delivered, Upsert]:
        """Return the upsert of Clerk's event, with values that no other row has."""
        type_ = f"{table.kind}.{what}"
        if type_ not in TYPES:
            type_ = f"{table.kind}.created"
        data, other = (samples.data_of(type_, ids, now_ms=now_ms) for ids in (self._ids, _ids()))
        row = {column.name: self._value(table, column, data) for column in table.columns}
        self._make_unlike(table, row, other)
        svix_id = self._delivery(f"{table.kind}_{what}")
        upsert = Upsert(
            (table.kind, self._ids[table.kind]), (now_ms, now_ms, svix_id), row, claims={}
        )
        return Delivered(svix_id, type_, now_ms), upsert

    def _value(self, table: TableMapping, column: Column, data: Names[str, Any]) -> Any:
        """Return the column's value for this object. Raises _Fault where the column rejects it."""
        about = f"{column.at}: `{column.name}` of `{table.table}`"
        live = self._live.tables[table.table].c[column.name]
        try:
            value = row_of({column.name: column.expression})(data)[column.name]
        except Exception as error:  # noqa: BLE001 -- an expression may fail in any way
            raise _Fault(
                f"{column.at}: `{column.expression}` fails on Clerk's own kind of "
                f"{table.kind}: {type(error).__name__}: {error}"
            ) from None
        if value is None and not live.nullable:
            self._doubt(
                f"{about} may not be null, and `{column.expression}` may: "
                "events without it go to quarantine"
            )
            fitting = [
                one for one in self._fillers(live) if self._rejection(column, live, one) is None
            ]
            if not fitting:
                raise _Untried(f"no value for `{column.name}`")
            return fitting[0]
        reason = None if value is None else self._rejection(column, live, value)
        if reason is not None:
            shown = repr(value) if len(repr(value)) <= 80 else f"{len(str(value))} characters"  # noqa: PLR2004
            raise _Fault(
                f"{about} is {type_text(live.type, self._live)}, and does not take what "
                f"`{column.expression}` gives, such as {shown} ({reason.value}): "
                "change its type, or the mapping"
            )
        return value

    def _fillers(self, live: sa.Column[Any]) -> Sequence[Any]:
        labels = live.type.enums if isinstance(live.type, sa.Enum) else ()
        return (*labels, *_FILLERS, self._now_ms)

    def _rejection(self, column: Column, live: sa.Column[Any], value: Any) -> Reason | None:
        """Return why the column rejects the value, or None where it takes it."""
        sqlite = self._live.dialect.name == "sqlite"
        try:
            encoder_for(live, json_text=column.type == "json", sqlite=sqlite)(value)
        except InvalidValue as error:
            return error.reason
        return None

    def _make_unlike(
        self, table: TableMapping, row: dict[str, Any], other: Names[str, Any]
    ) -> None:
        """Replace what every example has, such as a name, where a unique key asks for its own."""
        theirs = table.row(other)
        live = self._live.tables[table.table]
        columns = {column.name: column for column in table.columns}
        for names in unique_keys(live):
            ours = sorted(names & row.keys())
            if table.key in names or any(row[name] != theirs[name] for name in ours):
                continue
            for name in ours:
                text = "".join(secrets.choice(_LETTERS) for _ in str(row[name]))
                if isinstance(row[name], str) and not self._rejection(
                    columns[name], live.c[name], text
                ):
                    row[name] = text
                    break

    # What went wrong

    def _note_engine(self, table: TableMapping, error: sa.exc.DBAPIError) -> None:
        """Note a failure of SQLAlchemy's way. Raises what is not the table's fault."""
        number, text = _said(error)
        if number in _DENIED:
            raise AccessDenied(f"`{table.table}`: {text}") from error
        if error.connection_invalidated or not text:
            raise error
        self._found.faults.append(f"{table.at}: `{table.table}`: {text}")

    def _unavailable(self, table: TableMapping, error: DatabaseUnavailable) -> DatabaseUnavailable:
        """Note a failure of the driver's way, with the database's own words."""
        if isinstance(error, Contention | LockWaitTimeout):
            return type(error)(str(error))
        number, text = _said(error)
        if number in _USED_UP:
            text = f"{text}: {_used_up(self._live.tables[table.table])}"
        return (AccessDenied if number in _DENIED else DatabaseUnavailable)(
            f"`{table.table}`: {error}: {text}"
        )

    def _note(self, table: TableMapping, error: RejectedByDatabase | SchemaChanged) -> None:
        number, text = _said(error)
        reason = error.reason if isinstance(error, RejectedByDatabase) else None
        if reason is Reason.NOT_NULL and unfilled(table, self._live):
            return  # it is among the advice already
        used_up = _used_up(self._live.tables[table.table])
        if number in _USED_UP or (number == ER.DUP_ENTRY and used_up and ".PRIMARY'" in text):
            self._found.faults.append(f"{table.at}: `{table.table}`: {text}: {used_up}")
            return
        if reason is Reason.CONFLICT:
            self._doubt(
                f"{table.at}: `{table.table}` is not tried: another row has what the probe row "
                f"would have in a unique column: {text}"
            )
            return
        mapped = {one.table for one in self._mapped}
        foreign = sorted(self._live.details[table.table].refers - set(self._written(mapped)))
        if number in _PARENTLESS and foreign:
            self._doubt(
                f"{table.at}: `{table.table}` is not tried: a foreign key asks for a row of "
                f"`{'`, `'.join(foreign)}`, where the probe has none"
            )
            return
        named = re.search(r"[Cc]olumn '([^']+)'", text)
        place = self._place(table, named[1] if named else "")
        self._found.faults.append(
            f"{place}: `{table.table}` refuses a row such as Clerk's events make"
            f"{f' ({reason.value})' if reason else ''}: {text}; {OFF}"
        )

    def _written(self, mapped: set[str]) -> set[str]:
        """Return the mapped tables in which the probe has a row."""
        failed = {one for one in mapped if any(f"`{one}`" in f for f in self._found.faults)}
        return mapped - failed

    def _doubt(self, text: str) -> None:
        if text not in self._found.warnings:
            self._found.warnings.append(text)

    def _place(self, table: TableMapping, column: str) -> object:
        if column == table.key:
            return table.places["key"]
        return next((one.at for one in table.columns if one.name == column), table.at)


def _said(error: Exception) -> tuple[int, str]:
    """Return the database's number and words, which quote at most the probe row."""
    cause = error.__cause__
    if isinstance(cause, MySQLError) and len(cause.args) > 1:
        return int(cause.args[0]), str(cause.args[1])
    return 0, str(cause) if isinstance(cause, sqlite3.Error) else str(error)


def _used_up(table: sa.Table) -> str:
    """Return the remedy for a used-up AUTO_INCREMENT, empty where the table has none."""
    numbered = [column.name for column in table.columns if column.autoincrement is True]
    return (
        f"the AUTO_INCREMENT `{numbered[0]}` is used up: give it a wider type" if numbered else ""
    )


def _ids() -> dict[str, str]:
    """Return an id for each kind: as long as Clerk's, and none of Clerk's."""
    ids = {}
    for kind in KINDS:
        real = samples.IDS[kind]
        prefix, _, rest = real.rpartition("_")
        token = "".join(secrets.choice(_LETTERS) for _ in rest)
        ids[kind] = f"{prefix}_{_MARK}{token}"[: len(real)]
    return ids
