"""The commands. The only place that reads the environment and sets exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from typing import Final

import click

from clerk_sync import __version__
from clerk_sync.cli.exits import TERMINATED, fail

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: Final = {
    "backfill": ("sync", "Write all users, organizations and memberships that Clerk has."),
    "check": ("check", "Check settings, secrets, database, schema, mapping and Clerk's key."),
    "ensure": ("sync", "Read one user from Clerk, write the row, and print it."),
    "erase": ("erase", "Erase a person from every mapped table and from clerk-sync's own tables."),
    "migrate": (
        "migrate",
        "Create clerk-sync's tables, and the tables and columns that the mapping needs.",
    ),
    "probe": ("probe", "Send a signed event through the public URL; say whether it was committed."),
    "quarantine": ("quarantine", "List, replay or drop events that could not be applied."),
    "reconcile": ("sync", "Find missing, outdated, drifted and orphaned rows, and repair them."),
    "replay": ("replay", "Apply recorded deliveries from FILE, or from stdin with `-`."),
    "serve": ("serve", "Receive Clerk's webhooks until SIGTERM."),
    "trigger": ("trigger", "Post a signed, realistic event of this TYPE, such as user.created."),
}
"""Each command's module in this package, and its summary."""


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name, whose modules are imported when a command is used.

    All of them together take a second to import, most of it for SQLAlchemy and aiohttp.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            module, _ = COMMANDS[name]
            self._loaded[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**COMMANDS, **self._loaded})

    def __len__(self) -> int:
        return len({**COMMANDS, **self._loaded})


class LazyGroup(click.Group):
    """A group whose help needs no command's module: it shows the summaries from COMMANDS."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names and summaries of all commands."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, COMMANDS[name][1]) for name in self.list_commands(ctx) if name in COMMANDS]
            )


@click.group(
    cls=LazyGroup,
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  clerk-sync COMMAND --help",
)
@click.version_option(__version__, prog_name="clerk-sync")
def cli() -> None:
    """Keep an app's MySQL tables in sync with Clerk.

    Settings come from the environment: DATABASE_URL, CLERK_WEBHOOK_SIGNING_SECRET and others;
    `clerk-sync check` says what is wrong with them.
    """


def main() -> None:
    """Run a command."""
    # The kernel delivers to a container's first process only signals that it handles. Commands
    # that have to clean up first, such as `serve`, install their own handler.
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
            "which is a defect of clerk-sync. Run it again with LOG_LEVEL=debug, and report the "
            "output (read it first: it may contain personal data)"
        )
