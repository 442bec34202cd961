"""Whose a backfill's checkpoint is: it holds for one mapping of one instance."""

revision = "0004"
down_revision = "0003"

TABLES: set[str] = set()
COLUMNS = {"clerk_sync_cursors": {"mapping"}}


def upgrade() -> None:
    pass
