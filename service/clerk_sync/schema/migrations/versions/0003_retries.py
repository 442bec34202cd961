"""When an event in quarantine is tried again by itself."""

revision = "0003"
down_revision = "0002"

TABLES: set[str] = set()
COLUMNS = {"clerk_sync_quarantine": {"retry_at"}}


def upgrade() -> None:
    pass
