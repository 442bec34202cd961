"""Running DDL, or printing it: own tables by Alembic's versions, mapped ones by need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from clerk_sync.schema.reflection import quoted
from clerk_sync.store import tables

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

    from alembic.script import Script

    from clerk_sync.mapping.model import TableMapping


class Migration:
    """One run over one connection; with `print_to`, SQL is written there and nothing runs."""

    def __init__(
        self, connection: sa.Connection, version_table: str, print_to: io.StringIO | None
    ) -> None:
        self._script = ScriptDirectory(__path__[0], version_locations=[f"{__path__[0]}/versions"])
        self._connection = connection
        self._version_table = version_table
        self._print_to = print_to
        self._operations = Operations(self._context(lambda _, __: []))

    def _context(self, steps: Callable[[Any, Any], Any], starting: str | None = None) -> Any:
        opts: dict[str, Any] = {"version_table": self._version_table, "fn": steps}
        if self._print_to is not None:
            opts |= {"as_sql": True, "output_buffer": self._print_to, "starting_rev": starting}
            return MigrationContext.configure(
                dialect=self._connection.dialect,
                environment_context=None,
                opts=opts,
            )
        return MigrationContext.configure(self._connection, opts=opts)

    def own_tables(self, there: set[str]) -> list[str]:
        """Bring clerk-sync's own tables to this version; `there` are the tables of the database.

        With no version recorded, tables that are there came as printed SQL: they begin at the
        version that has them all.
        """
        recorded = MigrationContext.configure(
            self._connection, opts={"version_table": self._version_table}
        ).get_current_revision()
        if recorded is not None and recorded not in {one.revision for one in self._versions()}:
            newer = f"clerk-sync's own tables are of version {recorded}, newer than this clerk-sync"
            return [f"{newer}: left as they are"]
        current = recorded or self._version_of(there)
        head = self._script.get_current_head()
        done = []
        if current != recorded and self._print_to is None:
            self._context(lambda _, __: []).stamp(self._script, str(current))
            done.append(f"recorded version {current}, whose tables were there")
        done += self._restored(recorded, there)
        if current == head:
            return done
        context = self._context(
            lambda revision, _: self._script._upgrade_revs("head", revision),  # noqa: SLF001
            current or "base",
        )
        ours = {self._version_table, *tables.metadata.tables}
        with Operations.context(context):
            # The version table is there without a row, or is not there, after a deploy request:
            # SQL that is right for both leaves it alone.
            if self._print_to is not None and recorded is None and ours & there:
                for version in self._versions(since=current):
                    version.module.upgrade()
            else:
                context.run_migrations()
        return [*done, f"clerk-sync's own tables: from {current or 'nothing'} to version {head}"]

    def _restored(self, recorded: str | None, there: set[str]) -> list[str]:
        """Make those tables anew, and empty, that a recorded version has made, and that are gone.

        A backup may have left them out, or somebody dropped them.
        """
        made = self._script.iterate_revisions(recorded, "base") if recorded else ()
        lost = [version for version in made if version.module.TABLES - there]
        context = self._context(lambda _, __: [])
        with Operations.context(context):
            for version in lost[::-1]:
                version.module.upgrade()
        gone = sorted(name for version in lost for name in version.module.TABLES - there)
        return [f"made table {name} anew, as it was gone" for name in gone]

    def first_made(self, wanted: sa.Table) -> sa.Table:
        """A table of clerk-sync's own as its version makes it: without what later ones add."""
        later = {
            column
            for version in self._versions()
            for column in getattr(version.module, "COLUMNS", {}).get(wanted.name, ())
        }
        columns = [
            sa.Column(column.name, column.type) for column in wanted.c if column.name not in later
        ]
        return sa.Table(wanted.name, sa.MetaData(), *columns)

    def _versions(self, since: str | None = None) -> list[Script]:
        return list(self._script.iterate_revisions("head", since or "base"))[::-1]

    def _version_of(self, there: set[str]) -> str | None:
        """The newest version whose tables, and those of all before it, are there."""
        newest = None
        for version in self._versions():
            if version.module.TABLES - there:
                break
            newest = version.revision
        return newest

    def created(self, table: sa.Table) -> list[str]:
        """Make a table that the mapping asks for."""
        self._operations.impl.create_table(table)
        return [f"made table {table.name}"]

    def keyed(self, mapping: TableMapping, live: sa.Table) -> list[str]:
        """Add the key column to a table of the app's: unique, and null in the rows before it."""
        # Names that differ by case alone are one to the database.
        if mapping.key.lower() in {column.name.lower() for column in live.columns}:
            return []
        table, key = self._quoted(live.name), self._quoted(mapping.key)
        index = self._quoted(f"{live.name}_{mapping.key}")
        type_ = tables.key_type().compile(self._connection.dialect)
        if self._connection.dialect.name == "sqlite":
            self._operations.execute(f"ALTER TABLE {table} ADD COLUMN {key} {type_}")
            self._operations.execute(f"CREATE UNIQUE INDEX {index} ON {table} ({key})")
        else:  # one statement, so that it is there whole or not at all
            self._operations.execute(
                f"ALTER TABLE {table} ADD COLUMN {key} {type_} NULL, "
                f"ADD UNIQUE INDEX {index} ({key})"
            )
        return [f"added column {live.name}.{mapping.key}"]

    def _quoted(self, name: str) -> str:
        """A name for the text of a statement, which takes `:name` for a parameter."""
        return quoted(name, self._connection.dialect).replace(":", r"\:")

    def completed(self, wanted: sa.Table, live: sa.Table) -> list[str]:
        """Add the columns and plain indexes that an existing table of ours lacks.

        A column that is added takes null: the rows before it have no value for it.
        """
        done = []
        for column in wanted.columns:
            if column.name not in live.c:
                self._operations.add_column(live.name, sa.Column(column.name, column.type))
                done.append(f"added column {live.name}.{column.name}")
        return done + self.indexed(wanted, there={str(index.name) for index in live.indexes})

    def indexed(self, wanted: sa.Table, *, there: set[str]) -> list[str]:
        """Add the plain indexes that are not `there`; case makes no other name of an index."""
        done = []
        names = {name.lower() for name in there}
        for index in sorted(wanted.indexes, key=lambda index: str(index.name)):
            if str(index.name).lower() not in names:
                self._operations.impl.create_index(index)
                done.append(f"added index {index.name}")
        return done
