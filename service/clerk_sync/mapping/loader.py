"""Read a mapping file, and report all of its faults with file, line and nearest valid name."""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from collections import abc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import yaml

from clerk_sync.clerk import samples
from clerk_sync.clerk.catalog import KINDS, SECRET_KINDS, USER_PATHS
from clerk_sync.mapping.expressions import COMPUTED, InvalidExpression, names_in, row_of
from clerk_sync.mapping.model import Column, Constant, Mapping, Owned, Place, TableMapping

PRESETS: Final = ("mirror", "orbytal")
COLUMN_TYPES: Final = ("string(255)", "id", "text", "json", "integer", "boolean", "time")
_NEVER: Final = dict.fromkeys(
    SECRET_KINDS, "its events carry one-time codes, which are never stored"
)
_DURATION: Final = re.compile(r"([1-9]\d{0,4})([dh])")
_UNIT_MS: Final = {"d": 86_400_000, "h": 3_600_000}
_NUMBER_OR_FLAG: Final = re.compile(r"true|false|-?(?:0|[1-9][0-9]{0,30})(?:\.[0-9]{1,30})?")
_COLUMN_TYPE: Final = re.compile(r"string\([1-9]\d{0,3}\)|" + "|".join(COLUMN_TYPES[1:]))


class InvalidMapping(Exception):
    """The mapping file has faults: one message for each, with file and line."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def load(name: str) -> Mapping:
    """Read the preset of this name, or the file at this path. Raises InvalidMapping."""
    if name in PRESETS:
        text = (
            importlib.resources.files("clerk_sync.mapping")
            .joinpath(f"presets/{name}.yaml")
            .read_text()
        )
        return read(text, source=f"preset {name}")
    try:
        return read(Path(name).read_text(), source=name)
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise InvalidMapping(
            [f"{name}: {what}: give the path of a mapping file, or {' or '.join(PRESETS)}{hint}"]
        ) from None


def read(text: str, *, source: str) -> Mapping:
    """Read a mapping file's text. Raises InvalidMapping with all of its faults."""
    reader = _Reader(source)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidMapping([f"{source}:{line}: not YAML: {error.problem}"]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidMapping([f"{source}:{line}: not YAML text: {error.reason}"]) from None
    tables = dict(reader.tables(root))
    reader.faults += _ownership_faults(tables)
    if reader.faults:
        raise InvalidMapping(reader.faults)
    return Mapping(source, tables, tuple(reader.warnings))


def _ownership_faults(tables: abc.Mapping[str, TableMapping]) -> Iterator[str]:
    """Find `set` columns that say whose a row is.

    A delete would overwrite them. Then it would depend on the order of two deletes whether a row
    is removed with its owner.
    """
    for table in tables.values():
        theirs = [
            one for owner in tables.values() for one in owner.owns if one.table == table.table
        ]
        named = {one.column: f"`owns` at {one.at} finds rows by it" for one in theirs}
        named |= {one.references: f"`owns` at {one.at} refers to it" for one in table.owns}
        paths = USER_PATHS.get(table.kind, ())
        named |= {
            column.name: "`erase` finds a user's rows by it"
            for column in table.columns
            if column.expression.strip() in paths
        }
        for one in table.sets:
            if one.name in named:
                yield f"{one.at}: `set` may not change `{one.name}`: {named[one.name]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean …?`, or the valid names when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; there is: {', '.join(names) or '-'}"


class _Reader:
    """Reads the YAML nodes, which know their lines, and collects every fault."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def place(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1)

    def fault(self, node: yaml.Node | None, message: str) -> None:
        where = self.place(node) if node is not None else f"{self.source}:1"
        self.faults.append(f"{where}: {message}")

    def entries(
        self,
        node: yaml.Node | None,
        what: str,
        known: Iterable[str] | None = None,
        never: dict[str, str] | None = None,
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return a mapping node as name → (its name's node, its value's node).

        `never` has names that are refused for a reason of their own.
        """
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, f"{what} must be `name: value` pairs")
            return {}
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self.fault(name, f"{what}: a name must be plain text")
            elif name.value in found:
                self.fault(name, f"{what}: `{name.value}` is there twice")
            elif never and name.value in never:
                self.fault(name, f"{what} may not have `{name.value}`: {never[name.value]}")
            elif known is not None and name.value not in known:
                self.fault(name, f"{what} has no `{name.value}`{nearest(name.value, known)}")
            else:
                found[name.value] = (name, value)
        return found

    def text(self, node: yaml.Node, what: str) -> str:
        if isinstance(node, yaml.ScalarNode) and node.value:
            return str(node.value)
        self.fault(node, f"{what} must be text")
        return ""

    def tables(self, root: yaml.Node | None) -> Iterator[tuple[str, TableMapping]]:
        top = self.entries(root, "the mapping file", ("tables",))
        if "tables" not in top:
            if not self.faults:
                self.fault(root, "the mapping file needs `tables:`")
            return
        used: dict[str, str] = {}
        kinds = self.entries(top["tables"][1], "`tables`", KINDS, _NEVER)
        for kind, (name, node) in kinds.items():
            table = self.table(kind, name, node)
            if table is None:
                continue
            if table.table in used:
                self.fault(name, f"`{table.table}` already holds the {used[table.table]}s")
            used[table.table] = kind
            yield kind, table

    def table(self, kind: str, name: yaml.Node, node: yaml.Node) -> TableMapping | None:
        entries = self.entries(
            node, f"`{kind}`", ("table", "key", "columns", "adopt", "on_delete", "owns", "create")
        )
        missing = [needed for needed in ("table", "key", "columns") if needed not in entries]
        for needed in missing:
            self.fault(name, f"`{kind}` needs `{needed}:`")
        if missing:
            return None
        create = self.flag(entries["create"][1]) if "create" in entries else False
        table = self.text(entries["table"][1], "`table`")
        key = self.text(entries["key"][1], "`key`")
        columns = tuple(self.columns(kind, entries["columns"][1], "`columns`", typed=create))
        adopt = (
            tuple(self.columns(kind, entries["adopt"][1], "`adopt`", typed=False))
            if "adopt" in entries
            else ()
        )
        mark, sets, purge_after_ms = (
            self.on_delete(entries["on_delete"][1]) if "on_delete" in entries else (None, (), None)
        )
        owns = tuple(self.owned(entries["owns"][1])) if "owns" in entries else ()
        filled = [(one.at, one.name) for one in columns] + [(one.at, one.name) for one in sets]
        for at, column in filled:
            if column in (key, mark):
                self.faults.append(f"{at}: `{column}` is filled by clerk-sync already")
        places = {part: self.place(value) for part, (_, value) in entries.items()}
        if self.faults:
            return None
        return TableMapping(
            kind=kind,
            table=table,
            key=key,
            columns=columns,
            adopt=adopt,
            mark=mark,
            sets=sets,
            purge_after_ms=purge_after_ms,
            owns=owns,
            create=create,
            at=self.place(name),
            places=places,
            row=row_of({column.name: column.expression for column in columns}),
            claims=row_of({column.name: column.expression for column in adopt}),
        )

    def columns(self, kind: str, node: yaml.Node, what: str, *, typed: bool) -> Iterator[Column]:
        for name, (at, value) in self.entries(node, what).items():
            type_ = None
            index = False
            source = value
            if isinstance(value, yaml.MappingNode):
                parts = self.entries(value, f"`{name}`", ("value", "type", "index"))
                if "value" not in parts:
                    self.fault(at, f"`{name}` needs `value:`")
                    continue
                source = parts["value"][1]
                if "type" in parts:
                    type_ = self.type(parts["type"][1])
                if "index" in parts:
                    index = self.flag(parts["index"][1])
            if typed and type_ is None:
                self.fault(at, f"`{name}` needs a `type:`, as `create: true` makes its column")
            expression = self.text(source, f"`{name}`")
            if not expression:
                continue
            try:
                names = names_in(expression)
            except InvalidExpression as error:
                self.fault(source, f"`{name}`: `{expression}` is not an expression: {error}")
                continue
            known = samples.fields_of(kind) | COMPUTED.keys()
            for unknown in sorted(names - known):
                self.warnings.append(
                    f"{self.place(source)}: `{unknown}` is no field of Clerk's {kind} known to "
                    f"this version, and will be null unless Clerk sends it{nearest(unknown, known)}"
                )
            yield Column(name, expression, type_, index, self.place(at))

    def type(self, node: yaml.Node) -> str:
        text = self.text(node, "`type`")
        if not _COLUMN_TYPE.fullmatch(text):
            self.fault(node, f"no column type `{text}`{nearest(text, COLUMN_TYPES)}")
        return text

    def flag(self, node: yaml.Node) -> bool:
        text = self.text(node, "the flag")
        if text not in ("true", "false"):
            self.fault(node, f"`{text}` must be true or false")
        return text == "true"

    def on_delete(self, node: yaml.Node) -> tuple[str | None, tuple[Constant, ...], int | None]:
        """Return the column that a delete marks, those it sets, and `purge_after` in ms."""
        if isinstance(node, yaml.ScalarNode):
            if node.value != "remove":
                self.fault(node, "`on_delete` must be `remove` or `{mark: column}`")
            return None, (), None
        entries = self.entries(node, "`on_delete`", ("mark", "set", "purge_after"))
        if "mark" not in entries:
            if len(entries) == len(node.value):  # else its fault is reported already
                self.fault(
                    node, "`on_delete` needs `mark:`: only what is marked can be changed or purged"
                )
            return None, (), None
        mark = self.text(entries["mark"][1], "`mark`")
        sets = tuple(self.constants(entries["set"][1])) if "set" in entries else ()
        after = entries.get("purge_after")
        return mark, sets, self.duration(after[1]) if after else None

    def constants(self, node: yaml.Node) -> Iterator[Constant]:
        for name, (at, value) in self.entries(node, "`set`").items():
            text = value.value if isinstance(value, yaml.ScalarNode) else ""
            match value.tag.removeprefix("tag:yaml.org,2002:"):
                case "null":
                    yield Constant(name, None, self.place(at))
                case "str":
                    yield Constant(name, text, self.place(at))
                # YAML would also take `no`, `012` and `1:30` for these.
                case "bool" | "int" | "float" if _NUMBER_OR_FLAG.fullmatch(text):
                    yield Constant(name, json.loads(text), self.place(at))
                case _:
                    self.fault(
                        value,
                        f"`{name}` must be set to null, true, false, a number, or text in quotes",
                    )

    def duration(self, node: yaml.Node) -> int | None:
        """Return `30d` or `12h` in milliseconds."""
        text = self.text(node, "`purge_after`")
        found = _DURATION.fullmatch(text)
        if found:
            return int(found[1]) * _UNIT_MS[found[2]]
        if text:
            self.fault(node, f"`{text}` is no time: write days as `30d`, hours as `12h`")
        return None

    def owned(self, node: yaml.Node) -> Iterator[Owned]:
        if not isinstance(node, yaml.SequenceNode):
            self.fault(node, "`owns` must be a list of `{table: …, column: …, references: …}`")
            return
        for item in node.value:
            entries = self.entries(item, "`owns`", ("table", "column", "references"))
            if len(entries) != 3:  # noqa: PLR2004 -- the three names just above
                self.fault(item, "`owns` needs `table`, `column` and `references`")
                continue
            table, column, references = (
                self.text(entries[part][1], f"`{part}`")
                for part in ("table", "column", "references")
            )
            yield Owned(table, column, references, self.place(item))
