"""How commands end."""

from __future__ import annotations

import sys
from typing import Final, NoReturn

import click

INTERRUPTED: Final = 130
"""The exit code of shells for SIGINT."""
TERMINATED: Final = 143
"""And for SIGTERM."""


def fail(*faults: str) -> NoReturn:
    """End with exit code 1, after a line for each fault."""
    for fault in faults:
        click.echo(f"clerk-sync: {fault}", err=True)
    sys.exit(1)
