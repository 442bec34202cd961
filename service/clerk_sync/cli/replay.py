"""`clerk-sync replay`."""

from __future__ import annotations

import base64
import itertools
import json
from typing import TYPE_CHECKING, Any

import click

from clerk_sync.clerk import signature
from clerk_sync.cli.applying import AT_ONCE, apply
from clerk_sync.cli.common import command, load
from clerk_sync.cli.target import signers_of
from clerk_sync.outcomes import Answer, Outcome, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from standardwebhooks import Webhook

    from clerk_sync.clerk.signature import Delivery
    from clerk_sync.cli.applying import Group


@command("clerk-sync replay deliveries.ndjson")
@click.argument("file", type=click.File("r", encoding="utf-8", errors="replace"))
async def replay(file: Any) -> int:
    """Apply recorded deliveries from FILE, or from stdin with `-`.

    One JSON object per line with `headers` and `body_b64`, as Clerk's own CLI listener prints
    them. Their signatures are checked, their age is not. Exit code 1 if any was not accepted.
    """
    settings, mapping = load(signing=True)
    signers = signers_of(settings)

    async def groups() -> AsyncIterator[Group]:
        lines = (
            (f"line {number}", _recorded(line, signers))
            for number, line in enumerate(file, start=1)
            if line.strip()
        )
        while group := list(itertools.islice(lines, AT_ONCE)):
            yield group

    return await apply(settings, mapping, groups())


def _recorded(line: str, signers: Sequence[Webhook]) -> Delivery | Answer:
    try:
        record = json.loads(line)
        headers = {str(name).lower(): str(value) for name, value in record["headers"].items()}
        body = base64.b64decode(record["body_b64"], validate=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Answer(Outcome.REJECTED, Reason.MALFORMED)
    try:
        return signature.recorded(headers, body, signers=signers)
    except signature.InvalidSignature as error:
        return Answer(Outcome.REJECTED, error.reason)
