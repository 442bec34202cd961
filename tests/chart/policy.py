"""What an API server does with the policy that injects the sidecar, with CEL in Python.

It evaluates, but does not check types as a server does. `make test-cluster` has a server do that.
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
    from tests.chart.helm import Object

# Typed literals, as `Object.spec.initContainers{…}`: in a server, the types come from the schema.
_TYPE: Final = re.compile(r"\b(?:Object|JSONPatch)(?:\.\w+)*(?=\s*\{)")


class Literal(celtypes.MapType):
    """A typed literal: its fields, by name."""

    def __init__(self, *positional: Any, **fields: Any) -> None:
        given = dict(positional[0]) if positional else {}
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


def _plain(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, celtypes.BoolType):
        return bool(value)
    if isinstance(value, (celtypes.IntType, celtypes.UintType)):
        return int(value)
    if isinstance(value, celtypes.DoubleType):
        return float(value)
    return None if value is None else str(value)
