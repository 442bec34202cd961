"""The commands. The only place that reads the environment and sets exit codes."""

from clerk_sync.cli import deliveries, serving, walking  # noqa: F401 -- their commands join the group
from clerk_sync.cli.frame import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run a command."""
    cli(prog_name="clerk-sync")
