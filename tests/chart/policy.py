"""What an API server does with the policy that injects the sidecar, with CEL in Python.

A server also checks what a literal is called: its type has to be the path at which it stands, and
what is not of such a type has to be a list, or a map, of scalars of one type. Here it is the same.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Final

import celpy
import jsonpatch
from celpy import celtypes
from celpy.adapter import json_to_cel

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chart.helm import Object

# Typed literals, as `Object.spec.initContainers{…}`: in a server, the types come from the schema.
_TYPE: Final = re.compile(r"\b(?:Object|JSONPatch)(?:\.\w+)*(?=\s*\{)")

_SCALARS: Final[dict[type, Callable[[Any], Any]]] = {
    celtypes.BoolType: bool,
    celtypes.IntType: int,
    celtypes.UintType: int,
    celtypes.DoubleType: float,
    celtypes.StringType: str,
}


class Literal(celtypes.MapType):
    """A typed literal: its fields, by name."""

    def __init__(self, *positional: Any, **fields: Any) -> None:
        given = dict(positional[0] or {}) if positional else {}
        super().__init__({celtypes.StringType(k): v for k, v in (given | fields).items()})


def evaluate(expression: str, pod: Object) -> Any:
    """Return what an expression says about a pod, as plain Python."""
    names = {one: one.replace(".", "_") for one in _TYPE.findall(expression)}
    rewritten = _TYPE.sub(lambda found: names[found[0]], expression)
    types: dict[str, Any] = {name: type(name, (Literal,), {}) for name in names.values()}
    environment = celpy.Environment(annotations=types)
    program = environment.program(environment.compile(rewritten))
    return _plain(program.evaluate({"object": json_to_cel(pod)}))


def admit(policy: Object, pod: Object) -> Object:
    """Return the pod as it is after the policy: the same where a condition or the labels say no."""
    spec = policy["spec"]
    selector = spec["matchConstraints"]["objectSelector"]["matchLabels"]
    if not selector.items() <= (pod["metadata"].get("labels") or {}).items():
        return pod
    if not all(evaluate(one["expression"], pod) for one in spec.get("matchConditions") or []):
        return pod
    admitted = copy.deepcopy(pod)
    for mutation in spec["mutations"]:
        operations = evaluate(mutation["jsonPatch"]["expression"], admitted)
        admitted = jsonpatch.apply_patch(admitted, operations)
    return admitted


def _plain(value: Any, path: str = "") -> Any:
    """Return plain Python of a value that stands at a path, such as `Object.spec.volumes`."""
    if isinstance(value, Exception):
        raise value
    if isinstance(value, Literal):
        return _typed(value, path)
    if isinstance(value, (dict, list)):
        return _untyped(value, path)
    for kind, plain in _SCALARS.items():
        if isinstance(value, kind):
            return plain(value)
    raise TypeError(f"{value!r} at {path}")  # as null, which compiles, and fails when it is used


def _typed(value: Literal, path: str) -> dict[str, Any]:
    name = type(value).__name__
    fields = {str(key): one for key, one in value.items()}
    if name == "JSONPatch":
        steps = str(_plain(fields["path"])).split("/")
        place = ".".join(["Object", *(one for one in steps[1:] if one.isalpha())])
        return {key: _plain(one, place) for key, one in fields.items()}
    if name != path.replace(".", "_"):
        raise TypeError(f"{name} stands at {path}")
    return {key: _plain(one, f"{path}.{key}") for key, one in fields.items()}


def _untyped(value: dict[Any, Any] | list[Any], path: str) -> Any:
    parts = list(value.values()) if isinstance(value, dict) else value
    if len({type(one) for one in parts}) > 1:
        raise TypeError(f"values of different types at {path}")
    if isinstance(value, list):
        return [_plain(one, path) for one in value]
    if any(isinstance(one, (dict, list)) for one in parts):
        raise TypeError(f"a map of more than scalars at {path}")
    return {str(key): _plain(one) for key, one in value.items()}
