"""clerk-sync's own tables: state, ledger, quarantine."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

TABLES = {"clerk_sync_entities", "clerk_sync_events", "clerk_sync_quarantine"}
# Each step may find its own work half done: DDL is no transaction on MySQL. Plain indexes are
# added by `Migration`, which looks whether they are there.
# Written out, not imported from `tables`: a migration stays what it was when it ran.
_OPTIONS = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}
_TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=3), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "clerk_sync_entities",
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("clerk_id", sa.String(128), primary_key=True),
        sa.Column("version_ms", sa.BigInteger, nullable=False),
        sa.Column("event_ms", sa.BigInteger, nullable=False),
        sa.Column("source", sa.String(255), nullable=False),
        sa.Column("deleted_at", _TIME),
        sa.Column("synced_at", _TIME, nullable=False),
        if_not_exists=True,
        **_OPTIONS,
    )
    op.create_table(
        "clerk_sync_events",
        sa.Column("svix_id", sa.String(255), primary_key=True),
        sa.Column("type", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32)),
        sa.Column("clerk_id", sa.String(128)),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32)),
        sa.Column("event_at", _TIME),
        sa.Column("committed_at", _TIME, nullable=False),
        if_not_exists=True,
        **_OPTIONS,
    )
    op.create_table(
        "clerk_sync_quarantine",
        sa.Column("svix_id", sa.String(255), primary_key=True),
        sa.Column("type", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32)),
        sa.Column("clerk_id", sa.String(128)),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("detail", sa.String(255)),
        sa.Column("payload", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")),
        sa.Column("quarantined_at", _TIME, nullable=False),
        if_not_exists=True,
        **_OPTIONS,
    )
