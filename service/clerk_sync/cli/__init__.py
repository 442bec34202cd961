"""The commands. The only place that reads the environment and sets exit codes."""

import signal
import sys

from clerk_sync.cli import deliveries, serving, walking  # noqa: F401 -- their commands join the group
from clerk_sync.cli.frame import TERMINATED, cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run a command."""
    # The kernel keeps from a container's first process each signal that it does not ask for. What
    # has to tidy up first, such as `serve`, asks for it anew.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    cli(prog_name="clerk-sync")
