"""Compile column expressions: Jinja over one Clerk object, where a missing field is null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from jinja2 import ChainableUndefined, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where `a.b` and `a['b']` are Clerk's field, never a method of dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict):
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, dict) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)


_environment: Final = _Environment(undefined=ChainableUndefined, autoescape=False)
# `range` and the like have no use in a column, and `range(10 ** 9)` would be a way to stall.
_environment.globals.clear()


class InvalidExpression(ValueError):
    """Not a Jinja expression; the message is Jinja's own."""


def names_in(expression: str) -> set[str]:
    """Return the Clerk fields and computed names that it reads. Raises InvalidExpression."""
    if "{{" in expression:
        raise InvalidExpression("write it without the braces")
    try:
        _environment.compile_expression(expression)
        parsed = _environment.parse("{{ (" + expression + "\n) }}")
    except TemplateSyntaxError as error:
        raise InvalidExpression(error.message or "not an expression") from None
    # Something such as `a }} {{ b` would parse as a template, but is no expression.
    if len(parsed.body) != 1 or not isinstance(parsed.body[0], nodes.Output):
        raise InvalidExpression("more than one expression")
    return meta.find_undeclared_variables(parsed)


def row_of(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return a function from a Clerk object to its column values, by column.

    A bare name is looked up, which costs a tenth of entering a template. All others are
    compiled into one, so that there is one to enter. The function raises whatever an
    expression raises.
    """
    plain = {column: text for column, text in columns.items() if names_in(text) == {text}}
    others = {column: text for column, text in columns.items() if column not in plain}
    names = frozenset().union(*(names_in(text) for text in others.values()))
    source = ", ".join(f"{column!r}: ({text}\n)" for column, text in others.items())
    evaluate = _environment.compile_expression("{" + source + "}") if others else None
    computed = tuple((name, COMPUTED[name]) for name in COMPUTED.keys() & names)
    order = tuple(
        (column, name, COMPUTED.get(name or ""))
        for column, name in ((column, plain.get(column)) for column in columns)
    )

    def row(data: Mapping[str, Any]) -> dict[str, Any]:
        values = None
        if evaluate:
            values = evaluate({**data, **{name: compute(data) for name, compute in computed}})
        found: dict[str, Any] = {}
        for column, name, compute in order:
            if compute is not None:
                found[column] = compute(data)
            elif name is not None:
                found[column] = data.get(name)
            else:
                found[column] = _plain(values[column]) if values else None
        return found

    return row


def _plain(value: Any) -> Any:
    """Turn a missing field into None, and markup, such as that of `tojson`, into text."""
    if isinstance(value, Undefined):
        return None
    return str(value) if isinstance(value, str) else value


def _primary(data: Mapping[str, Any], of: str, key: str) -> Any:
    """Return a field of the element that Clerk's primary id names, or None.

    The id may point at nothing: Clerk's own user.created example does.
    """
    primary_id = data.get(f"primary_{of}_id")
    elements = data.get(f"{of}es" if of.endswith("s") else f"{of}s")
    if primary_id is None or not isinstance(elements, list):
        return None
    for element in elements:
        if isinstance(element, dict) and element.get("id") == primary_id:
            return element.get(key)
    return None


def _full_name(data: Mapping[str, Any]) -> str | None:
    names = (data.get("first_name"), data.get("last_name"))
    return " ".join(name for name in names if isinstance(name, str) and name) or None


COMPUTED: Final[dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "primary_email": lambda data: _primary(data, "email_address", "email_address"),
    "primary_phone": lambda data: _primary(data, "phone_number", "phone_number"),
    "full_name": _full_name,
}
