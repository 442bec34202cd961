"""The live tables as the database tells of them: reflection, and what reflection leaves out."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql import mariadb

from clerk_sync.columns import Other, declared
from clerk_sync.database_errors import engine_errors_told

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

_TABLES: Final = ("BASE TABLE", "SYSTEM VERSIONED")


@dataclass(slots=True)
class Details:
    """What is known of a table beside its columns and keys.

    `engine` is its storage engine where that has no transactions. `prefixes` has unique keys of
    one column that look at its beginning only: (index, column, how much). `generated` are columns
    that the database fills, `stamped` those that get the time of every UPDATE. `versioned` says
    that what is deleted stays in the table's history. `refers` are the tables of foreign keys.
    """

    engine: str | None = None
    prefixes: list[tuple[str, str, int]] = field(default_factory=list)
    generated: set[str] = field(default_factory=set)
    stamped: set[str] = field(default_factory=set)
    versioned: bool = False
    triggers: list[str] = field(default_factory=list)
    refers: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Live:
    """The tables that matter, as they are; a missing one is absent.

    `names` are all tables there are, `views` all views.
    """

    tables: dict[str, sa.Table]
    details: dict[str, Details]
    names: frozenset[str]
    views: frozenset[str]
    dialect: sa.Dialect

    def quoted(self, *names: str) -> tuple[str, ...]:
        """The names as a statement for people has them."""
        return tuple(quoted(name, self.dialect) for name in names)


def quoted(name: str, dialect: sa.Dialect) -> str:
    """A name as a statement has it, where nothing formats the statement any more."""
    text = dialect.identifier_preparer.quote(name)
    return text if dialect.name == "sqlite" else text.replace("%%", "%")


async def inspected(engine: AsyncEngine, names: set[str]) -> Live:
    """Those of the tables that are there. Raises Unavailable."""

    def inspect(connection: sa.Connection) -> Live:
        if connection.dialect.name == "sqlite":
            looked = sa.inspect(connection)
            there, views = set(looked.get_table_names()), set(looked.get_view_names())
            versioned: set[str] = set()
        else:
            kinds = dict[str, str](
                connection.exec_driver_sql(
                    "SELECT table_name, table_type FROM information_schema.tables"
                    " WHERE table_schema = DATABASE()"
                ).all()
            )
            there = {name for name, kind in kinds.items() if kind in _TABLES}
            views = {name for name, kind in kinds.items() if kind == "VIEW"}
            versioned = {name for name, kind in kinds.items() if kind == _TABLES[1]}
        found = {name: reflected(connection, name) for name in sorted(names & there)}
        details = {name: Details(versioned=name in versioned) for name in found}
        if connection.dialect.name == "sqlite":
            for table in found.values():
                _complete_sqlite(connection, table, details[table.name])
        elif found:
            _complete_columns(connection, found, details)
            _complete_tables(connection, details)
        return Live(found, details, frozenset(there), frozenset(views), _spelling(connection))

    with engine_errors_told():
        async with engine.connect() as connection:
            return await connection.run_sync(inspect)


def reflected(connection: sa.Connection, name: str) -> sa.Table:
    """One table, whatever the types of its columns."""
    dialect: Any = connection.dialect
    if dialect.name != "sqlite":
        dialect.ischema_names = _Types(dialect.ischema_names)
    with warnings.catch_warnings():
        # What SQLAlchemy does not understand, such as a PERIOD, says nothing about columns.
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        return sa.Table(name, sa.MetaData(), autoload_with=connection, resolve_fks=False)


class _Types(dict[str, type[sa.types.TypeEngine[Any]]]):
    """MySQL's types by their names; SQLAlchemy fails at a VECTOR(3), and at what comes later."""

    def __init__(self, known: dict[str, type[sa.types.TypeEngine[Any]]]) -> None:
        super().__init__(known)
        self.update(inet4=mariadb.INET4, inet6=mariadb.INET6)

    def __missing__(self, name: str) -> type[sa.types.TypeEngine[Any]]:
        return type(name.upper(), (Other,), {})


def _of_schema(
    connection: sa.Connection,
    what: str,
    columns: str,
    names: Iterable[str],
    *,
    where: str = "1 = 1",
    whose: str = "table_schema",
) -> Sequence[Any]:
    """Rows about these tables, whose name is the first column. Without it MariaDB opens all."""
    first, wanted = columns.partition(",")[0], tuple(names)
    marks = ", ".join(["%s"] * len(wanted))
    select = f"SELECT {columns} FROM information_schema.{what}"  # noqa: S608 -- our own words
    of = f"WHERE {whose} = DATABASE() AND {first} IN ({marks}) AND {where}"
    rows = connection.exec_driver_sql(f"{select} {of}", wanted)
    return [row for row in rows if row[0] in wanted]  # names that differ by case are two


def _complete_columns(
    connection: sa.Connection, tables: dict[str, sa.Table], details: dict[str, Details]
) -> None:
    """Add inherited collations, what fills columns, and which of MariaDB's texts are JSON."""
    columns = _of_schema(
        connection,
        "columns",
        "table_name, column_name, collation_name, character_set_name, extra, generation_expression",
        tables,
        where="(collation_name IS NOT NULL OR extra <> '' OR generation_expression IS NOT NULL)",
    )
    for name, column, collation, charset, extra, expression in columns:
        if column not in tables[name].c:
            continue
        type_: Any = tables[name].c[column].type
        if collation is not None and isinstance(type_, sa.String):
            type_.collation = collation
            if isinstance(type_, mysql.TINYTEXT | mysql.TEXT | mysql.MEDIUMTEXT):
                type_.charset = charset
        if expression or re.search("(VIRTUAL|STORED) GENERATED", extra):
            details[name].generated.add(column)
        if "on update" in extra.lower():
            details[name].stamped.add(column)
    if getattr(connection.dialect, "is_mariadb", False):
        checks = _of_schema(
            connection,
            "check_constraints",
            "table_name, constraint_name",
            tables,
            where="check_clause = CONCAT('json_valid(`', constraint_name, '`)')",
            whose="constraint_schema",
        )
        for name, column in checks:
            if column in tables[name].c:
                tables[name].c[column].type = mysql.JSON()


def _complete_tables(connection: sa.Connection, details: dict[str, Details]) -> None:
    """Add the engines, the prefixes of unique keys, the triggers and the foreign keys."""
    engines = connection.exec_driver_sql(
        "SELECT engine, transactions FROM information_schema.engines"
    )
    transactional = {str(engine).lower() for engine, can in engines if can == "YES"}
    of_tables = _of_schema(
        connection, "tables", "table_name, engine", details, where="engine IS NOT NULL"
    )
    for name, engine in of_tables:
        if transactional and engine.lower() not in transactional:
            details[name].engine = engine
    keys = _of_schema(
        connection,
        "statistics",
        "table_name, index_name, column_name, sub_part",
        details,
        where="non_unique = 0",
    )
    parts: dict[tuple[str, str], list[tuple[str, int | None]]] = defaultdict(list)
    for name, index, column, length in keys:
        parts[name, index].append((column, length))
    for (name, index), columns in parts.items():
        ((column, length), *more) = columns
        if length is not None and not more:
            details[name].prefixes.append((index, column, int(length)))
    triggers = _of_schema(
        connection,
        "triggers",
        "event_object_table, trigger_name",
        details,
        whose="trigger_schema",
    )
    for name, trigger in triggers:
        details[name].triggers.append(trigger)
    foreign = _of_schema(
        connection,
        "key_column_usage",
        "table_name, referenced_table_name",
        details,
        where="referenced_table_name IS NOT NULL",
    )
    for name, other in foreign:
        details[name].refers.add(other)


def _complete_sqlite(connection: sa.Connection, table: sa.Table, details: Details) -> None:
    """Add inline UNIQUEs, and MySQL's types: as MySQL's they say what may be in the column."""
    for index in sa.inspect(connection).get_indexes(table.name, include_auto_indexes=True):
        if index["unique"]:
            table.append_constraint(sa.UniqueConstraint(*filter(None, index["column_names"])))
    rows = connection.exec_driver_sql("SELECT name, type FROM pragma_table_xinfo(?)", (table.name,))
    for column, type_ in rows:
        known = declared(type_)
        if known is not None and column in table.c:
            table.c[column].type = known
    details.generated = {column.name for column in table.columns if column.computed is not None}


def _spelling(connection: sa.Connection) -> sa.Dialect:
    """The dialect to compile for.

    SQLAlchemy writes `VALUES … AS new` for MySQL 8.0.20 and later; not every Vitess that calls
    itself that version understands it, while all understand `VALUES(column)`.
    """
    version = connection.dialect.server_version_info
    if connection.dialect.name != "sqlite":
        text = connection.exec_driver_sql("SELECT VERSION()").scalar_one()
        if version is None or "vitess" in str(text).lower():
            return mysql.asyncmy.dialect()
    return connection.dialect
