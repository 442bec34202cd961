"""Adopt existing rows that have no Clerk id yet, by the columns that `adopt` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clerk_sync.store.values import as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.database.connection import Connection
    from clerk_sync.mapping.change import Upsert
    from clerk_sync.store.target import Target


async def adopt(
    connection: Connection,
    target: Target,
    missing: Sequence[tuple[Upsert, Sequence[Any]]],
) -> set[str]:
    """Adopt rows that have no Clerk id yet; return the Clerk ids that got one."""
    wanted = [
        (row, claims)
        for upsert, row in missing
        if (claims := target.claims(upsert.claims)) is not None
    ]
    if not wanted:
        return set()
    found = await connection.run([(target.adoptable, [claims for _, claims in wanted])])
    claimed: list[list[Any]] = []
    for (row, claims), result in zip(wanted, found, strict=True):
        taken = {claim[-1] for claim in claimed}
        for primary, *values in result.rows:
            # The column's collation may consider "jose" and "josé" equal. We do not.
            same = [as_text(v).casefold() for v in values] == [
                as_text(v).casefold() for v in claims
            ]
            if same and primary not in taken:
                claimed.append([*row, primary])
                break
    if not claimed:
        return set()
    results = await connection.run([(target.adopt, claimed)])
    return {row[0] for row, result in zip(claimed, results, strict=True) if result.affected == 1}
