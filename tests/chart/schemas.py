"""Kubernetes' own schemas and those of custom resources: what a strict API server would refuse."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kubernetes_validate import utils

from tools import programs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.chart.helm import Object

# It reads a megabyte of definitions for each object: a hundred times the time of the check.
utils.schema_contents = cache(utils.schema_contents)
utils.all_versions = cache(utils.all_versions)

_GROUPS: Final = {
    "",
    "admissionregistration.k8s.io",
    "apps",
    "autoscaling",
    "batch",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
}


def is_native(one: Object) -> bool:
    """Tell whether Kubernetes itself knows the kind."""
    return str(one["apiVersion"]).rpartition("/")[0] in _GROUPS


def native_faults(one: Object, version: str) -> list[str]:
    """Say what Kubernetes of this version (`1.29`) would refuse, unknown fields included."""
    return list(_native_faults(json.dumps(one, sort_keys=True), version))


@cache
def _native_faults(one: str, version: str) -> tuple[str, ...]:
    try:
        utils.validate(json.loads(one), version, strict=True)
    except utils.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message}",)
    except utils.SchemaNotFoundError as error:
        return (error.message,)
    return ()


def custom_faults(resources: Iterable[Object]) -> dict[str, list[str]]:
    """Say, by object, what its CRD's schema would refuse, unknown fields included."""
    distinct = {json.dumps(one, sort_keys=True): one for one in resources}
    done = subprocess.run(
        [
            programs.need("node"),
            Path(__file__).with_name("custom_resources.mjs"),
            programs.modules(),
        ],
        input=json.dumps(list(distinct.values())),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {
        f"{one['kind']} {one['metadata']['name']}: {key}": faults
        for (key, one), faults in zip(distinct.items(), found, strict=True)
        if faults
    }
