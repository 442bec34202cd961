"""A mapping file in memory: which Clerk object goes to which table.

Pure: it knows names and expressions, no SQL. `schema` binds the names to the live tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections import abc
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the mapping file, for errors that name it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column and the expression that fills it.

    `type` and `index` are for columns that `migrate` makes.
    """

    name: str
    expression: str
    type: str | None
    index: bool
    at: Place


@dataclass(frozen=True, slots=True)
class Owned:
    """Rows of another table that are deleted with the row: `column` there is `references` here."""

    table: str
    column: str
    references: str
    at: Place


@dataclass(frozen=True, slots=True)
class Constant:
    """A column, mapped or not, and the value that a soft delete writes to it."""

    name: str
    value: str | float | bool | None
    at: Place


@dataclass(frozen=True, slots=True)
class TableMapping:
    """One Clerk object's table.

    `mark` is the column that a soft delete fills, None where a delete removes the row; `sets` are
    further columns that it writes. A soft-deleted row is purged after `purge_after_ms`, or never if
    that is None. `adopt` pairs columns with expressions. `create` says that `migrate` creates the
    table.
    """

    kind: str
    table: str
    key: str
    columns: tuple[Column, ...]
    adopt: tuple[Column, ...]
    mark: str | None
    sets: tuple[Constant, ...]
    purge_after_ms: int | None
    owns: tuple[Owned, ...]
    create: bool
    at: Place
    places: abc.Mapping[str, Place]
    row: Callable[[abc.Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    claims: Callable[[abc.Mapping[str, Any]], dict[str, Any]] = field(repr=False)

    def column_of(self, expression: str) -> str | None:
        """Return the column that holds exactly this Clerk field, or None."""
        return next((c.name for c in self.columns if c.expression == expression), None)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A whole mapping file, read and compiled."""

    source: str
    tables: abc.Mapping[str, TableMapping]
    warnings: tuple[str, ...]
