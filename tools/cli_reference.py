"""Writes docs/reference/cli.md from the commands themselves: `python -m tools.cli_reference`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Final

import click

from clerk_sync.cli import cli

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"

_HEAD: Final = """\
# Commands

`clerk-sync` is one program with these commands. `python -m clerk_sync` is the same. `clerk-sync
COMMAND --help` prints what is written here. Exit code 0 means success.

An unexpected failure ends with one sentence and exit code 1. `LOG_LEVEL=debug` adds the
traceback, which may quote personal data.

`make generate` writes this page from the code.
"""


def commands(group: click.Group, prefix: str) -> dict[str, click.Command]:
    """Every command that does something, by its full name."""
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


def _described(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record
    name, text = record
    return f"| `{name}` | {' '.join(text.split())} |"


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    lines = [f"## `{name}`", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```", " ".join([name, *command.collect_usage_pieces(context)]), "```", ""]
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    if options:
        lines += ["| Option | Meaning |", "|---|---|"]
        lines += [_described(option, context) for option in options] + [""]
    if command.epilog:
        example = inspect.cleandoc(command.epilog).removeprefix("\b").strip()
        lines += ["```sh", inspect.cleandoc(example.removeprefix("Example:")).strip(), "```", ""]
    return "\n".join(lines)


def text() -> str:
    """The whole page."""
    found = commands(cli, "clerk-sync")
    rows = [
        f"| [`{name}`](#{name.replace(' ', '-')}) | {command.get_short_help_str(200)} |"
        for name, command in found.items()
    ]
    table = ["<!-- table: commands -->", "| Command | What it does |", "|---|---|", *rows, ""]
    return "\n".join([_HEAD, *table, *(_section(*one) for one in found.items())]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
