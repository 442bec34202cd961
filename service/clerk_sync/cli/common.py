"""What commands share: their group, their settings, their way to end."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from clerk_sync import __version__
from clerk_sync.check import signing_faults, token_faults
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.mapping.loader import InvalidMapping
from clerk_sync.mapping.loader import load as load_mapping
from clerk_sync.mapping.model import Mapping
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.settings import load as load_settings
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


INTERRUPTED = 130  # as shells tell of SIGINT
TERMINATED = 143  # and of SIGTERM


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  clerk-sync COMMAND --help",
)
@click.version_option(__version__, prog_name="clerk-sync")
def cli() -> None:
    """Keep an app's MySQL tables in step with Clerk.

    Settings come from the environment: DATABASE_URL, CLERK_WEBHOOK_SIGNING_SECRET and others;
    `clerk-sync check` says what is wrong with them.
    """
    logs.silence_noisy_loggers()


def command(example: str, **options: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group, whose help ends with an example."""

    def decorate(function: Callable[..., None]) -> click.Command:
        epilog = f"\b\nExample:\n  {example}"
        return cli.command(epilog=epilog, **options)(function)

    return decorate


def text(argument: str) -> str:
    """The type of an argument that is UTF-8, as all that is stored: a shell passes on any bytes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("is not UTF-8") from None
    return argument


def fail(*faults: str) -> NoReturn:
    """End with exit code 1, after a line for each fault."""
    for fault in faults:
        click.echo(f"clerk-sync: {fault}", err=True)
    sys.exit(1)


def run(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command's work on uvloop; its exit code is the process's."""
    try:
        import uvloop  # noqa: PLC0415 -- there is none for Windows
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            sys.exit(runner.run(work))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except DatabaseUnavailable as error:
        fail(str(error))
    except InvalidSettings as error:  # a file that was there when it began
        fail(*error.faults)


def unnamed(settings: Settings) -> list[str]:
    """What else may be wrong where tables are missing: that nobody named the database."""
    if settings.database_url is not None or settings.database_host is not None:
        return []
    return [f"DATABASE_URL: is not set, so this was {settings.DEFAULT_DATABASE} of this folder"]


def settled(
    *, signing: bool, mapped: bool, located: bool = True, token: bool = False
) -> tuple[Settings, Mapping | None]:
    """Settings and mapping, or the end: with every fault in them at once."""
    settings, faults = load_settings()
    if located:
        try:
            settings.locate()
        except InvalidSettings as error:
            faults += error.faults
    if signing:
        faults += signing_faults(settings)
    if token:
        faults += token_faults(settings)
    mapping = None
    if mapped:
        try:
            mapping = load_mapping(settings.config)
        except InvalidMapping as error:
            faults += [f"CLERK_SYNC_CONFIG: {fault}" for fault in error.faults]
    if faults:
        fail(*faults)
    return settings, mapping
