"""What commands share: their decorator, and their settings."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from asyncio import new_event_loop
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from clerk_sync import rotation
from clerk_sync.cli.exits import INTERRUPTED, TERMINATED, fail
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.mapping import loader
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.settings import load as load_environment
from clerk_sync.telemetry import logs

with contextlib.suppress(ImportError):  # there is none for Windows
    from uvloop import new_event_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from clerk_sync.mapping.model import Mapping

_P = ParamSpec("_P")


def command(
    example: str, *, name: str | None = None
) -> Callable[[Callable[_P, Coroutine[Any, Any, int]]], click.Command]:
    """Make a command of a coroutine function that returns the exit code.

    Its docstring is the command's help, which ends with the example. The first sentence is the
    summary in `clerk_sync.cli.COMMANDS`.
    """

    def decorate(work: Callable[_P, Coroutine[Any, Any, int]]) -> click.Command:
        @functools.wraps(work)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> NoReturn:
            _run(work(*args, **kwargs))

        return click.command(name, epilog=f"\b\nExample:\n  {example}")(run)

    return decorate


def _run(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command on uvloop; what it returns is the exit code."""
    logs.silence_noisy_loggers()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            sys.exit(runner.run(work))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except asyncio.CancelledError:  # by a command that asked for SIGTERM
        sys.exit(TERMINATED)
    except DatabaseUnavailable as error:
        fail(str(error))
    except InvalidSettings as error:  # a file that was there at the start
        fail(*error.faults)


def text(argument: str) -> str:
    """The type of an argument that is UTF-8, as all that is stored: a shell passes on any bytes."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("is not UTF-8") from None
    return argument


def load_settings(*, signing: bool = False, token: bool = False, located: bool = True) -> Settings:
    """The settings; or the end of the command, with every fault in them.

    `signing` needs the signing secret, `token` checks the app token, `located` the database's
    address.
    """
    settings, faults = _load(signing=signing, token=token, located=located)
    if faults:
        fail(*faults)
    return settings


def load(*, signing: bool = False, token: bool = False) -> tuple[Settings, Mapping]:
    """Settings and mapping; or the end of the command, with every fault in them."""
    settings, faults = _load(signing=signing, token=token, located=True)
    try:
        mapping = loader.load(settings.config)
    except loader.InvalidMapping as error:
        fail(*faults, *(f"CLERK_SYNC_CONFIG: {fault}" for fault in error.faults))
    if faults:
        fail(*faults)
    return settings, mapping


def _load(*, signing: bool, token: bool, located: bool) -> tuple[Settings, list[str]]:
    settings, faults = load_environment()
    if located:
        try:
            settings.locate()
        except InvalidSettings as error:
            faults += error.faults
    if signing:
        faults += rotation.signing_faults(settings)
    if token:
        faults += rotation.token_faults(settings)
    return settings, faults


def unnamed(settings: Settings) -> list[str]:
    """What else may be wrong if tables are missing: that nobody named the database."""
    if settings.database_url is not None or settings.database_host is not None:
        return []
    return [f"DATABASE_URL: is not set, so this was {settings.DEFAULT_DATABASE} of this folder"]
