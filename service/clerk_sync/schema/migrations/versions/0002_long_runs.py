"""Three more: leases, cursors and runs, for work that only one may do and that takes long."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"

TABLES = {"clerk_sync_leases", "clerk_sync_cursors", "clerk_sync_runs"}
_OPTIONS = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}
_TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=3), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "clerk_sync_leases",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        if_not_exists=True,
        **_OPTIONS,
    )
    op.create_table(
        "clerk_sync_cursors",
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("part", sa.Integer, primary_key=True),
        sa.Column("from_ms", sa.BigInteger),
        sa.Column("to_ms", sa.BigInteger),
        sa.Column("after", sa.String(128)),
        sa.Column("reached_ms", sa.BigInteger),
        sa.Column("seen", sa.BigInteger, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Column("begun_at", _TIME, nullable=False),
        sa.Column("moved_at", _TIME, nullable=False),
        if_not_exists=True,
        **_OPTIONS,
    )
    op.create_table(
        "clerk_sync_runs",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME),
        sa.Column("result", sa.String(16)),
        sa.Column("report", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")),
        if_not_exists=True,
        **_OPTIONS,
    )
