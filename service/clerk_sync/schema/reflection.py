"""The live tables: what SQLAlchemy reflects, and what it leaves out.

Servers compare names in their own ways: columns never by case; tables by case or not, as
`lower_case_table_names` says, and SQLite never. Here they have the names that the mapping gives
them; what is not mapped may have any name and type.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql import mariadb

from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store import tables as own_tables
from clerk_sync.store.values import Other, declared

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping

Spelling = dict[str, set[str]]
"""Tables, each with the names by which the mapping knows its columns."""

_TABLES: Final = ("BASE TABLE", "SYSTEM VERSIONED")


@dataclass(slots=True)
class Details:
    """Properties of a table besides its columns and keys.

    `engine` is its storage engine where that has no transactions. `prefixes` has unique keys of
    one column that cover only its beginning: (index, column, characters). `generated` are columns
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
    """The live tables that matter, by the mapping's names. A missing one is absent.

    `details` also has them by the server's names. `names` are all tables of the database, `views`
    all views.
    """

    tables: dict[str, sa.Table]
    details: dict[str, Details]
    names: frozenset[str]
    views: frozenset[str]
    dialect: sa.Dialect

    def quoted(self, *names: str) -> tuple[str, ...]:
        """Return the names as a statement for people has them."""
        return tuple(quoted(name, self.dialect) for name in names)


def quoted(name: str, dialect: sa.Dialect) -> str:
    """Return a name as a statement has it that is not formatted again."""
    text = dialect.identifier_preparer.quote(name)
    return text if dialect.name == "sqlite" else text.replace("%%", "%")


class TableNames:
    """Tables' names, as the server compares them."""

    def __init__(self, connection: sa.Connection, names: Iterable[str]) -> None:
        self._folds = connection.dialect.name == "sqlite" or bool(
            connection.exec_driver_sql("SELECT @@lower_case_table_names").scalar_one()
        )
        self._names = {self._folded(name): name for name in names}

    @classmethod
    def there(cls, connection: sa.Connection) -> TableNames:
        """Return the names of all tables of the database."""
        return cls(connection, sa.inspect(connection).get_table_names())

    def __contains__(self, name: str) -> bool:
        return self._folded(name) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.values())

    def of(self, name: str) -> str:
        """Return the table's name on the server. Raises KeyError."""
        return self._names[self._folded(name)]

    def _folded(self, name: str) -> str:
        return name.lower() if self._folds else name


def _own_names() -> Spelling:
    return {name: set(table.c.keys()) for name, table in own_tables.metadata.tables.items()}


def names_of(mapping: Mapping) -> Spelling:
    """Return the tables that matter, with the mapping's spelling of their columns."""
    names = _own_names()
    for table in mapping.tables.values():
        columns = names.setdefault(table.table, set())
        columns |= {table.key, *([table.mark] if table.mark else [])}
        columns |= {one.name for one in (*table.columns, *table.adopt)}
        columns |= {one.name for one in table.sets}
        for owned in table.owns:
            columns.add(owned.references)
            names.setdefault(owned.table, set()).add(owned.column)
    return names


async def live_tables(engine: AsyncEngine, mapping: Mapping | None = None) -> Live:
    """Reflect clerk-sync's own tables and those that the mapping names.

    Raises DatabaseUnavailable.
    """
    return await inspect_tables(engine, _own_names() if mapping is None else names_of(mapping))


async def inspect_tables(engine: AsyncEngine, names: Spelling) -> Live:
    """Reflect those of these tables that exist. Raises DatabaseUnavailable."""

    def inspect(connection: sa.Connection) -> Live:
        if connection.dialect.name == "sqlite":
            inspector = sa.inspect(connection)
            there, views = set(inspector.get_table_names()), set(inspector.get_view_names())
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
        server = TableNames(connection, there)
        actual = {name: server.of(name) for name in sorted(names) if name in server}
        columns: Spelling = defaultdict(set)
        for name, of_server in actual.items():
            columns[of_server] |= names[name]
        found = {name: reflected(connection, name, of) for name, of in columns.items()}
        details = {name: Details(versioned=name in versioned) for name in found}
        if connection.dialect.name == "sqlite":
            for table in found.values():
                _complete_sqlite(connection, table, details[table.name])
        elif found:
            _complete_columns(connection, found, details)
            _complete_tables(connection, found, details)
        return Live(
            {name: found[of_server] for name, of_server in actual.items()},
            details | {name: details[of_server] for name, of_server in actual.items()},
            frozenset(there),
            frozenset(views),
            _spelling(connection),
        )

    with translate_engine_errors():
        async with engine.connect() as connection:
            return await connection.run_sync(inspect)


def reflected(connection: sa.Connection, name: str, columns: Iterable[str]) -> sa.Table:
    """Reflect one table, whatever its columns' types, with the spelling of `columns`."""
    dialect: Any = connection.dialect
    spelled = {column.lower(): column for column in sorted(columns)}

    def respell(_: object, __: sa.Table, column: Any) -> None:
        actual = column["name"]
        if dialect.name != "sqlite":
            # SQLAlchemy reads SHOW CREATE TABLE, and leaves a back-tick within a name doubled.
            actual = actual.replace("``", "`")
        column["name"] = spelled.get(actual.lower(), actual)

    if dialect.name != "sqlite":
        dialect.ischema_names = _Types(dialect.ischema_names)
    with warnings.catch_warnings():
        # What SQLAlchemy does not understand, such as a PERIOD, says nothing about columns.
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        return sa.Table(
            name,
            sa.MetaData(),
            autoload_with=connection,
            resolve_fks=False,
            listeners=[("column_reflect", respell)],
        )


def _column(table: sa.Table, name: str) -> sa.Column[Any] | None:
    """Return a table's column by the server's name for it."""
    return next((one for one in table.columns if one.name.lower() == name.lower()), None)


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
    """Return rows about these tables, by name: without one MariaDB opens every table."""
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
    for name, actual, collation, charset, extra, expression in columns:
        column = _column(tables[name], actual)
        if column is None:
            continue
        type_: Any = column.type
        if collation is not None and isinstance(type_, sa.String):
            type_.collation = collation
            if isinstance(type_, mysql.TINYTEXT | mysql.TEXT | mysql.MEDIUMTEXT):
                type_.charset = charset
        if expression or re.search("(VIRTUAL|STORED) GENERATED", extra):
            details[name].generated.add(column.name)
        if "on update" in extra.lower():
            details[name].stamped.add(column.name)
    if getattr(connection.dialect, "is_mariadb", False):
        checks = _of_schema(
            connection,
            "check_constraints",
            "table_name, constraint_name",
            tables,
            where="check_clause = CONCAT('json_valid(`', constraint_name, '`)')",
            whose="constraint_schema",
        )
        for name, actual in checks:
            if (column := _column(tables[name], actual)) is not None:
                column.type = mysql.JSON()


def _complete_tables(
    connection: sa.Connection, tables: dict[str, sa.Table], details: dict[str, Details]
) -> None:
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
    for name, index, actual, length in keys:
        parts[name, index].append((actual, length))
    for (name, index), columns in parts.items():
        ((actual, length), *more) = columns
        column = _column(tables[name], actual)
        if length is not None and not more and column is not None:
            details[name].prefixes.append((index, column.name, int(length)))
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
            names = filter(None, index["column_names"])
            columns = (_column(table, name) for name in names)
            table.append_constraint(
                sa.UniqueConstraint(*(one for one in columns if one is not None))
            )
    rows = connection.exec_driver_sql("SELECT name, type FROM pragma_table_xinfo(?)", (table.name,))
    for actual, type_ in rows:
        known, column = declared(type_), _column(table, actual)
        if known is not None and column is not None:
            column.type = known
    details.generated = {column.name for column in table.columns if column.computed is not None}


def _spelling(connection: sa.Connection) -> sa.Dialect:
    """Return the dialect to compile for.

    SQLAlchemy writes `VALUES … AS new` for MySQL 8.0.20 and later; not every Vitess that calls
    itself that version understands it, while all understand `VALUES(column)`.
    """
    version = connection.dialect.server_version_info
    if connection.dialect.name != "sqlite":
        text = connection.exec_driver_sql("SELECT VERSION()").scalar_one()
        if version is None or "vitess" in str(text).lower():
            return mysql.asyncmy.dialect()
    return connection.dialect
