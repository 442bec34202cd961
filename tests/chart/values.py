"""The chart's values.yaml as a manual: its comments make the schema and the README's tables.

A comment block stands directly above its key:

    # -- What the value is for. Plain text, over as
    # many lines as it takes.
    # @default -- what is shown instead of the default below
    # @schema type:[string,null]; pattern:^sha256:[a-f0-9]{64}$
    digest:

`@schema` gives keywords of JSON Schema as `name:value`, values in YAML's flow style, several
separated by a semicolon and a space; it may also stand behind the value. Where it names no type,
the default tells it. `# @section -- Title` above a key at the root begins a part of the README.
An object is closed, unless its `@schema` says what else it may hold.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml
from jsonschema import Draft7Validator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yaml.nodes import Node

DRAFT: Final = Draft7Validator
"""The newest draft that the validators of both Helms and editors know alike."""

_TYPES: Final = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
_VERBATIM: Final = ("pattern", "title", "description")
_APPLIED_TO_CHILDREN: Final = ("additionalProperties", "patternProperties", "propertyNames")


class UnreadableError(Exception):
    """The comments of values.yaml cannot be read. Says where and why."""


@dataclass(frozen=True)
class Value:
    """One key of values.yaml."""

    path: tuple[str, ...]
    text: str
    """What is written behind `# --`; empty without it."""
    default: Any
    shown: str | None
    """What is written behind `# @default --`."""
    schema: dict[str, Any]
    """What is written behind `# @schema`."""
    section: str | None
    children: tuple[Value, ...]
    line: int

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def is_open(self) -> bool:
        return any(keyword in self.schema for keyword in _APPLIED_TO_CHILDREN)

    def walk(self) -> Iterator[Value]:
        """Yield this value and, depth first, those in it."""
        yield self
        for child in self.children:
            yield from child.walk()


def read(text: str) -> tuple[Value, ...]:
    """Return the keys at the root of values.yaml, with those in them."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise UnreadableError("values.yaml has to be a mapping")
    return _children(root, text.splitlines(), ())


def everything(values: Sequence[Value]) -> Iterator[Value]:
    for value in values:
        yield from value.walk()


def _children(node: Node, lines: list[str], path: tuple[str, ...]) -> tuple[Value, ...]:
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return ()
    return tuple(_value(key, value, lines, path) for key, value in node.value)


def _value(key: Node, node: Node, lines: list[str], path: tuple[str, ...]) -> Value:
    line = key.start_mark.line
    path = (*path, str(key.value))
    block = [*_block_above(lines, line), *re.findall(r"\s#\s(@schema .*)$", lines[line])]
    schema = _keywords(block, ".".join(path), line + 1)
    children = _children(node, lines, path)
    if any(keyword in schema for keyword in _APPLIED_TO_CHILDREN) and not any(
        child.text for child in children
    ):
        children = ()  # an open map's default is an example, not a list of what there is
    return Value(
        path=path,
        text=_text(block),
        default=_construct(node),
        shown=_tagged(block, "@default -- "),
        schema=schema,
        section=_tagged(block, "@section -- "),
        children=children,
        line=line + 1,
    )


def _construct(node: Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _block_above(lines: list[str], line: int) -> list[str]:
    """The comment lines directly above a key, as deep as it, without their `# `."""
    indent = len(lines[line]) - len(lines[line].lstrip())
    block: list[str] = []
    for above in reversed(lines[:line]):
        if not above.startswith(" " * indent + "#"):
            break
        block.insert(0, above.strip()[1:].removeprefix(" ").rstrip())
    return block


def _text(block: list[str]) -> str:
    begins = [number for number, line in enumerate(block) if line.startswith("-- ")]
    words: list[str] = []
    for line in block[begins[-1] :] if begins else ():
        if not line or line.startswith("@"):
            break
        words.append(line.removeprefix("-- ").strip())
    return " ".join(words)


def _tagged(block: list[str], tag: str) -> str | None:
    return next((line.removeprefix(tag) for line in block if line.startswith(tag)), None)


def _keywords(block: list[str], name: str, line: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for text in block:
        if not text.startswith("@schema "):
            continue
        for part in re.split(r";\s+(?=\w+:\S)", text.removeprefix("@schema ").strip().rstrip(";")):
            keyword, _, value = part.partition(":")
            if keyword not in DRAFT.META_SCHEMA["properties"]:
                raise UnreadableError(f"values.yaml:{line}: {name}: no keyword begins `{part}`")
            try:
                schema[keyword] = value if keyword in _VERBATIM else yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UnreadableError(f"values.yaml:{line}: {name}: {part}: {error}") from None
    if isinstance(schema.get("type"), list):  # YAML reads the name of that type as none
        schema["type"] = [kind or "null" for kind in schema["type"]]
    return schema


def defaults(values: Sequence[Value], indent: str = "") -> str:
    """Return the defaults as YAML for the chart's templates, which cannot read values.yaml.

    A list holds the default of one value, also of a map that users fill: where that is given,
    nothing is added to it. All other maps are those of values.yaml.
    """
    lines = []
    for value in values:
        name = f"{indent}{value.path[-1]}:"
        if value.children:
            lines.append(f"{name}\n{defaults(value.children, indent + '  ')}")
        else:
            lines.append(f"{name} {json.dumps([value.default], ensure_ascii=False)}\n")
    return "".join(lines)


def schema(values: Sequence[Value]) -> dict[str, Any]:
    """Return the JSON Schema of values.yaml. Null is allowed everywhere: it is no value given."""
    return {
        "$schema": DRAFT.META_SCHEMA["$id"],
        "title": "Values of the chart clerk-sync",
        **_object(values),
    }


def _object(children: Sequence[Value]) -> dict[str, Any]:
    properties = {child.path[-1]: _schema_of(child) for child in children}
    return {"type": ["object", "null"], "additionalProperties": False, "properties": properties}


def _schema_of(value: Value) -> dict[str, Any]:
    said = dict(value.schema)
    made: dict[str, Any] = {"description": value.text} if value.text else {}
    if value.children:
        return made | _object(value.children) | said
    if not {"type", "enum", "const", "anyOf", "oneOf"} & said.keys():
        if value.default is None:
            raise UnreadableError(
                f"values.yaml:{value.line}: {value.name} has no default: give its type"
                " in a comment, `# @schema type:[string,null]`"
            )
        made["type"] = _TYPES[type(value.default)]
    if made.get("type", said.get("type")) == "object" and not value.is_open:
        raise UnreadableError(
            f"values.yaml:{value.line}: {value.name}: say what the map holds,"
            " `# @schema additionalProperties:true` or `additionalProperties:{type: string}`"
        )
    if made.get("type", said.get("type")) == "array" and "items" not in said:
        raise UnreadableError(
            f"values.yaml:{value.line}: {value.name}: say what the list holds,"
            " `# @schema items:{type: string}` or `items:{type: object}`"
        )
    return made | _nullable(said | made) | {"default": value.default}


def _nullable(said: dict[str, Any]) -> dict[str, Any]:
    """Return what allows null as well, also for the entries of a map that users fill."""
    more: dict[str, Any] = dict(said)
    if "type" in said:
        kinds = said["type"] if isinstance(said["type"], list) else [said["type"]]
        more["type"] = [*kinds, *({"null"} - set(kinds))]
    if None not in said.get("enum", [None]):
        more["enum"] = [*said["enum"], None]
    if isinstance(said.get("additionalProperties"), dict):
        more["additionalProperties"] = _nullable(said["additionalProperties"])
    return more


def tables(values: Sequence[Value]) -> str:
    """Return the tables of values for the chart's README, a part for each section."""
    parts: list[str] = []
    for value in values:
        if value.section or not parts:
            title = f"### {value.section}\n\n" if value.section else ""
            parts.append(f"{title}| Value | Default | Meaning |\n|---|---|---|\n")
        for one in value.walk():
            if one.text or not one.children:
                default = "" if one.children else _shown(one)
                parts[-1] += f"| `{one.name}` | {default} | {_cell(one.text)} |\n"
    return "\n".join(parts)


def _shown(value: Value) -> str:
    if value.shown is not None:
        return _cell(value.shown)
    if value.default in (None, ""):
        return ""
    text = value.default
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False)
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
