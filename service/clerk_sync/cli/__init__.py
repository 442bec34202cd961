"""The commands. The only place that reads the environment and sets exit codes."""

import os
import signal
import sys
import traceback

from clerk_sync.cli import deliveries, serve, sync  # noqa: F401 -- their commands join the group
from clerk_sync.cli.common import TERMINATED, cli, fail

__all__ = ["cli", "main"]


def main() -> None:
    """Run a command."""
    # The kernel keeps from a container's first process each signal that it does not ask for. What
    # has to tidy up first, such as `serve`, asks for it anew.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        cli(prog_name="clerk-sync")
    except Exception as error:  # noqa: BLE001 -- whatever it is, people get a sentence
        if os.environ.get("LOG_LEVEL", "").lower() == "debug":
            fail("".join(traceback.format_exception(error)))
        # Not its text, which may hold people's data.
        where = traceback.extract_tb(error.__traceback__)[-1]
        fail(
            f"{type(error).__name__} in {'/'.join(where.filename.split('/')[-2:])}:{where.lineno}, "
            "which nobody foresaw. Run it again with LOG_LEVEL=debug, and report what that shows "
            "(look it through first: it may show people's data)"
        )
