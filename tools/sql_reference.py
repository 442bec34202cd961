"""Writes docs/reference/sql.md from the statements as they are compiled: see `make generate`."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from clerk_sync.mapping import loader
from clerk_sync.store import tables
from clerk_sync.store.sql import Compiler, ForIds, OwnStatements, union
from clerk_sync.store.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clerk_sync.database.connection import Statement

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "sql.md"
ENGINES: Final = ("MySQL", "MariaDB", "SQLite")
MARKING: Final = """
tables:
  user:
    table: members
    key: clerk_id
    columns: {email: primary_email}
    on_delete: {mark: deleted_at, set: {email: null}}
"""

_HEAD: Final = """\
# SQL

Every statement that the service sends for webhooks, backfills and reconciles, in the order of a
transaction. Values are shown as `?`; on MySQL and MariaDB the driver writes them into the
statement. An INSERT has as many rows, and an `IN` as many ids, as the batch. Your tables are
those of the presets: `clerk_users` and `clerk_organization_memberships` of `mirror`, and `users`
and `blocks` of `orbytal`, where `users` has other unique keys than the Clerk id. `members` is a
table that marks deleted rows.

A transaction needs two packets. The first advances the state and reads back what was decided, the
second writes rows, ledger and quarantine, and ends with `COMMIT`. The first statement opens the
transaction; on SQLite, `BEGIN IMMEDIATE` does. See [Two round trips for a batch of any
size](../explanation/decisions/two-round-trips.md).

`make generate` writes this page from the code.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A statement of the page: its name in the code, a heading, and why it is sent.

    `name` is an attribute of OwnStatements, or one of a Target after the table's name.
    """

    name: str
    title: str
    why: str


SECTIONS: Final[dict[str, tuple[Entry, ...]]] = {
    "The first packet": (
        Entry(
            "lease",
            "Check the fencing token",
            "In a run, every transaction locks the lease's row first, so that no other process "
            "can acquire it before the COMMIT; another token than the run's own ends the "
            "transaction.",
        ),
        Entry(
            "advance",
            "Advance the state",
            "One statement locks the entities of the batch in key order and decides who is "
            "newest: each row's version and deletion only ever move forward, whatever order the "
            "events arrive in.",
        ),
        Entry(
            "states",
            "Read the states back",
            "A change that finds its own version here has won: its row is written in the second "
            "packet.",
        ),
        Entry(
            "users.present",
            "Find the rows that exist",
            "For tables with other unique keys than the Clerk id, and for adoption: it decides "
            "between UPDATE and INSERT, as an upsert could update another's row there.",
        ),
        Entry(
            "known",
            "Look deliveries up in the ledger",
            "A delivery that had its effect is answered as a duplicate.",
        ),
        Entry(
            "users.owned.references",
            "Find what owned rows refer to",
            "Before a delete, where owned rows refer to another column than the Clerk id.",
        ),
    ),
    "Between the packets": (
        Entry(
            "users.find",
            "Find a row to adopt",
            "A row without a Clerk id may belong to this user; its values are compared once "
            "more, byte by byte.",
        ),
        Entry(
            "users.claim",
            "Adopt it",
            "It sets the Clerk id only where there still is none.",
        ),
    ),
    "The second packet": (
        Entry(
            "users.vacate",
            "Give up unique values",
            "Where two rows of a batch swap a unique value, each gives up its own before it "
            "gets the other's.",
        ),
        Entry(
            "users.owned.delete",
            "Delete owned rows",
            "They go before the row that they belong to, as a foreign key may demand.",
        ),
        Entry(
            "clerk_users.delete",
            "Delete rows",
            "Deletes come before upserts, as they free unique values.",
        ),
        Entry(
            "members.mark",
            "Mark a row as deleted",
            "Instead of a delete, with `on_delete: {mark: …}`: the time of the deletion, and "
            "what `set` says.",
        ),
        Entry(
            "clerk_users.upsert",
            "Insert or update rows",
            "Where the Clerk id is the only unique key: one statement for any number of rows.",
        ),
        Entry(
            "users.update",
            "Update a row",
            "Where the table has other unique keys: a row that exists, by its Clerk id alone.",
        ),
        Entry(
            "users.insert",
            "Insert rows",
            "Where the table has other unique keys: rows that do not exist yet. A backfill's "
            "first pages, too.",
        ),
        Entry(
            "record",
            "Record deliveries in the ledger",
            "Only an outcome without effect, `ignored` or `quarantined`, may still be replaced "
            "by another.",
        ),
        Entry(
            "detain",
            "Put events in quarantine",
            "An event that fails again keeps its row, with the newest reason.",
        ),
        Entry(
            "keep",
            "Note another failure of a retry",
            "An UPDATE, so that an event that was erased or dropped meanwhile does not come back.",
        ),
        Entry(
            "release",
            "Take events out of quarantine",
            "A retry that had its effect removes the row in the same transaction.",
        ),
    ),
    "Checking for locks": (
        Entry(
            "present",
            "Find the states that exist",
            "A held event waits for no lock: what exists here, and is missing in the next "
            "answer, is locked by another transaction.",
        ),
        Entry(
            "free", "Find the states that are not locked", "The other half of the same question."
        ),
        Entry("users.free", "Find the rows that are not locked", "The same for a mapped table."),
        Entry(
            "clerk_organization_memberships.referred.there",
            "Find the parents that exist",
            "A foreign key of the table locks its parent's row as well.",
        ),
        Entry(
            "clerk_organization_memberships.referred.free",
            "Find the parents that are not locked",
            "With a shared lock, which is what a foreign key takes.",
        ),
        Entry(
            "users.owned_free.there",
            "Find the rows whose owned rows exist",
            "A delete needs the locks of the owned rows as well.",
        ),
        Entry(
            "users.owned_free.free",
            "Find the rows whose owned rows are not locked",
            "The other half of the same question.",
        ),
    ),
    "Backfill and reconcile": (
        Entry(
            "clerk_users.read",
            "Read rows to compare",
            "A run compares before it writes, so that what is in sync costs one read.",
        ),
        Entry(
            "clerk_users.ids",
            "Read all Clerk ids, page by page",
            "A reconcile looks for rows whose object Clerk no longer has, by the key's index.",
        ),
        Entry(
            "clerk_users.count",
            "Count rows",
            "The table's side of the comparison of counts.",
        ),
        Entry(
            "begin",
            "Insert the state of new rows",
            "A page that is entirely new is inserted without reading; a key that exists rolls "
            "it back.",
        ),
        Entry(
            "lower",
            "Rewind a version that is ahead",
            "The only statement that lowers a version: only under the run's lease, and only if "
            "the state is still the one that was read.",
        ),
        Entry(
            "move",
            "Save a checkpoint",
            "It commits together with the page, and only under the run's lease.",
        ),
    ),
}


def _dialect(engine: str) -> sa.Dialect:
    if engine == "SQLite":
        return sqlite.dialect()
    url = f"{engine.lower()}+asyncmy://"
    dialect: Any = sa.make_url(url).get_dialect()()
    if engine == "MySQL":  # as it finds a server of 8.0.20 or later
        dialect._requires_alias_for_on_duplicate_key = True  # noqa: SLF001
    return cast("sa.Dialect", dialect)


def _tutorial() -> tuple[sa.Table, sa.Table]:
    """The tutorial's tables, `username` made unique."""
    metadata = sa.MetaData()
    users = sa.Table(
        "users",
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("clerk_id", sa.String(128), unique=True),
        sa.Column("username", sa.String(255), unique=True),
        sa.Column("display_name", sa.String(255)),
        sa.Column("img_url", sa.String(255)),
    )
    blocks = sa.Table(
        "blocks",
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("user_id", sa.BigInteger),
    )
    return users, blocks


def _targets(compiler: Compiler) -> dict[str, Target]:
    """The mapped tables of the page, by name."""
    mirror = loader.load("mirror")
    made = {table.table: tables.made_table(table) for table in mirror.tables.values()}
    memberships = made["clerk_organization_memberships"]
    memberships.append_constraint(
        sa.ForeignKeyConstraint(["user_id"], ["clerk_users.clerk_id"], link_to_name=True)
    )
    found = {
        table.table: Target(
            table,
            made[table.table],
            owned={owned.table: made[owned.table] for owned in table.owns},
            owners=(),
            compiler=compiler,
        )
        for table in mirror.tables.values()
    }
    users, blocks = _tutorial()
    (tutorial,) = loader.load("orbytal").tables.values()
    found["users"] = Target(tutorial, users, owned={"blocks": blocks}, owners=(), compiler=compiler)
    (marking,) = loader.read(MARKING, source="sql.md").tables.values()
    members = sa.Table(
        "members",
        sa.MetaData(),
        sa.Column("clerk_id", sa.String(128), primary_key=True),
        sa.Column("email", sa.String(320)),
        sa.Column("deleted_at", sa.DateTime),
    )
    found["members"] = Target(marking, members, owned={}, owners=(), compiler=compiler)
    return found


def statements(engine: str) -> dict[str, str]:
    """Every statement of the page as this engine gets it, on one line, by its entry's name."""
    compiler = Compiler(_dialect(engine))
    found: dict[str, str] = {}

    def add(name: str, statement: Statement | ForIds | None) -> None:
        if isinstance(statement, ForIds):
            statement, _ = statement.of(["id"])
        if statement is not None:
            found[name] = normal(statement)

    own = OwnStatements(compiler)
    for name, value in vars(own).items():
        if name == "states":
            add(name, union([value[kind].of(["id"]) for kind in sorted(tables_of_mirror())])[0])
        else:
            add(name, value["user"] if isinstance(value, dict) else value)
    for table, target in _targets(compiler).items():
        for name, value in vars(target).items():
            parts: dict[str, Any] = {name: value}
            if name == "owned" and value:
                parts = dict(zip(("owned.references", "owned.delete"), value[0][1:], strict=True))
            elif name in ("owned_free", "referred") and value:
                parts = dict(zip((f"{name}.there", f"{name}.free"), value[0][-2:], strict=True))
            for part, statement in parts.items():
                if isinstance(statement, ForIds) or hasattr(statement, "head"):
                    add(f"{table}.{part}", statement)
    return found


def tables_of_mirror() -> set[str]:
    """The kinds whose states one statement reads, for a membership: its owners' and its own."""
    return set(loader.load("mirror").tables)


def normal(statement: Statement) -> str:
    """A statement's text on one line, with `?` for its values."""
    text = f"{statement.head}{statement.values}{statement.tail}"
    return " ".join(text.replace("%s", "?").split())


_BREAKS: Final = re.compile(
    r" (?=(?:FROM|WHERE|VALUES|SET|ORDER BY|LIMIT|FOR UPDATE|FOR SHARE|LOCK IN|UNION ALL|SELECT"
    r"|ON DUPLICATE KEY|ON CONFLICT|AS new)\b)"
)


def laid_out(text: str) -> str:
    """The statement over several lines, for people: a clause each, and an assignment each."""
    head, update, assignments = text.partition(" UPDATE ")
    if not update or "INSERT" not in head:
        return _outer(text)
    setting = f"{update}SET" if assignments.startswith("SET ") else update.rstrip()
    apart = re.sub(r", (?=\w+ = )", ",\n  ", assignments.removeprefix("SET "))
    return f"{_outer(head)}{setting}\n  {apart}"


def _outer(text: str) -> str:
    """Break before the clauses that are in no parenthesis."""
    depth, lines, start = 0, [], 0
    for place, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth == 0 and _BREAKS.match(text, place):
            lines.append(text[start:place])
            start = place + 1
    return "\n".join([*lines, text[start:]])


def _blocks(by_engine: dict[str, str]) -> Iterator[str]:
    """The statement for each engine, and only once for those that get the same."""
    alike: dict[str, list[str]] = defaultdict(list)
    for engine, text in by_engine.items():
        alike[text].append(engine)
    for text, engines in alike.items():
        if len(alike) > 1:
            yield f"{' and '.join(engines)}:\n"
        yield f"```sql\n{laid_out(text)}\n```\n"


def text() -> str:
    """The whole page."""
    compiled = {engine: statements(engine) for engine in ENGINES}
    parts = [_HEAD]
    for section, entries in SECTIONS.items():
        parts.append(f"## {section}\n")
        for entry in entries:
            parts.append(f"### {entry.title}\n\n{entry.why}\n")
            parts += _blocks(
                {e: found[entry.name] for e, found in compiled.items() if entry.name in found}
            )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
