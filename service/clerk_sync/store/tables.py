"""clerk-sync's own tables, and the tables that a mapping asks `migrate` to make.

No foreign keys (Vitess rewrites upserts badly around them) and one unique key each (with two,
MySQL may update the wrong row of a multi-row upsert). Every id is compared byte by byte:
Clerk's ids are case-sensitive, MySQL's default collation is not.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from clerk_sync.mapping.model import TableMapping

ID_LENGTH: Final = 128
_MYSQL: Final = ("mysql", "mariadb")
_INNODB: Final[dict[str, Any]] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}
_EXACT: Final[dict[str, Any]] = {**_INNODB, "mysql_collate": "utf8mb4_bin"}
_TIME: Final = sa.DateTime().with_variant(mysql.DATETIME(fsp=3), *_MYSQL)
_LONG: Final = sa.Text().with_variant(mysql.LONGTEXT(), *_MYSQL)

# Declared once: `migrate` adds what a database lacks of these, and `serve` and `check` compare the
# live tables with them. A column that a later version adds takes null, as rows are there before it.
metadata: Final = sa.MetaData()

# Where order is decided: the newest content seen of each entity, and its deletion. Both only
# ever move forward, whatever order facts arrive in.
entities: Final = sa.Table(
    "clerk_sync_entities",
    metadata,
    sa.Column("kind", sa.String(32), primary_key=True),
    sa.Column("clerk_id", sa.String(ID_LENGTH), primary_key=True),
    sa.Column("version_ms", sa.BigInteger, nullable=False),
    sa.Column("event_ms", sa.BigInteger, nullable=False),
    # The delivery that brought the content: it breaks ties, and shows which change won.
    sa.Column("source", sa.String(255), nullable=False),
    sa.Column("deleted_at", _TIME),
    sa.Column("synced_at", _TIME, nullable=False),
    **_EXACT,
)

# The ledger: one row per delivery answered with 2xx. No payload.
events: Final = sa.Table(
    "clerk_sync_events",
    metadata,
    sa.Column("svix_id", sa.String(255), primary_key=True),
    sa.Column("type", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(32)),
    sa.Column("clerk_id", sa.String(ID_LENGTH)),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(32)),
    sa.Column("event_at", _TIME),
    sa.Column("committed_at", _TIME, nullable=False),
    sa.Index("clerk_sync_events_committed_at", "committed_at"),
    **_EXACT,
)

quarantine: Final = sa.Table(
    "clerk_sync_quarantine",
    metadata,
    sa.Column("svix_id", sa.String(255), primary_key=True),
    sa.Column("type", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(32)),
    sa.Column("clerk_id", sa.String(ID_LENGTH)),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("detail", sa.String(255)),
    # Null where even the envelope was unreadable: it could be a mail with a one-time code.
    sa.Column("payload", _LONG),
    sa.Column("quarantined_at", _TIME, nullable=False),
    # When it is retried: null where only an operator can help.
    sa.Column("retry_at", _TIME),
    sa.Index("clerk_sync_quarantine_quarantined_at", "quarantined_at"),
    sa.Index("clerk_sync_quarantine_retry_at", "retry_at"),
    **_EXACT,
)

# Who holds each lease. The fencing token grows with every acquisition: a write that carries an old
# one fails.
leases: Final = sa.Table(
    "clerk_sync_leases",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("holder", sa.String(255), nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    # By the database's clock; 0 once it was given back.
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    **_EXACT,
)

# The checkpoints of a backfill: a part of a kind is a range of creation times.
cursors: Final = sa.Table(
    "clerk_sync_cursors",
    metadata,
    sa.Column("kind", sa.String(32), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    sa.Column("from_ms", sa.BigInteger),
    sa.Column("to_ms", sa.BigInteger),
    sa.Column("after", sa.String(ID_LENGTH)),
    sa.Column("reached_ms", sa.BigInteger),
    sa.Column("seen", sa.BigInteger, nullable=False),
    sa.Column("finished", sa.Boolean, nullable=False),
    sa.Column("begun_at", _TIME, nullable=False),
    sa.Column("moved_at", _TIME, nullable=False),
    # A hash of what the checkpoint holds for: the mapping of this kind, and Clerk's instance.
    sa.Column("mapping", sa.String(64)),
    **_EXACT,
)

# How the last run of each command ended.
runs: Final = sa.Table(
    "clerk_sync_runs",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("started_at", _TIME, nullable=False),
    sa.Column("finished_at", _TIME),
    sa.Column("result", sa.String(16)),
    sa.Column("report", _LONG),
    **_EXACT,
)


def key_type() -> sa.types.TypeEngine[Any]:
    """Return the type of a column that holds a Clerk id."""
    return sa.String(ID_LENGTH).with_variant(
        mysql.VARCHAR(ID_LENGTH, charset="utf8mb4", collation="utf8mb4_bin"), *_MYSQL
    )


def column_type(type_: str) -> sa.types.TypeEngine[Any]:
    """Return the SQL type for a mapping file's column type, such as `string(255)`."""
    sized = re.fullmatch(r"string\((\d+)\)", type_)
    if sized:
        return sa.String(int(sized[1]))
    types: dict[str, sa.types.TypeEngine[Any]] = {
        "id": key_type(),
        "text": sa.Text(),
        "json": sa.JSON(),
        "integer": sa.BigInteger(),
        "boolean": sa.Boolean(),
        "time": _TIME,
    }
    return types[type_]


def made_table(mapping: TableMapping) -> sa.Table:
    """Return the table that `create: true` asks for."""
    columns = [sa.Column(mapping.key, key_type(), primary_key=True)]
    columns += [
        sa.Column(column.name, column_type(column.type or "text")) for column in mapping.columns
    ]
    if mapping.mark:
        columns.append(sa.Column(mapping.mark, _TIME))
    indexes = [
        sa.Index(f"{mapping.table}_{column.name}", column.name)
        for column in mapping.columns
        if column.index
    ]
    return sa.Table(mapping.table, sa.MetaData(), *columns, *indexes, **_INNODB)
