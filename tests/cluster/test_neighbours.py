"""Several installations in one namespace: each has objects of its own, and its own pods alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart import rules
from tests.chart.helm import CHART, FULLNAME, HELMS, LEAST, PARENT, merged, umbrella
from tests.cluster.access import RefusedError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.space import Space

_KEY: dict[str, Any] = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}
_OVERRIDES: list[dict[str, dict[str, Any]]] = [
    {},
    {"eu": {"fullnameOverride": "one"}, "us": {"fullnameOverride": "two"}},
]
_MODES: dict[str, dict[str, Any]] = {
    "standalone": {},
    "sidecar": {"mode": "sidecar", **_KEY},
}


def _where(space: Space) -> tuple[str, ...]:
    return f"--namespace={space.name}", f"--timeout={space.patience}", "--wait"


def _apart(space: Space, *names: str) -> None:
    """See that each of these Services has its own pods, each of them under one budget."""
    behind = [space.behind(name)[1] for name in names]
    assert [len(pods) for pods in behind] == [2] * len(names)
    assert len(set().union(*behind)) == 2 * len(names)
    selectors = [
        one["spec"]["selector"]["matchLabels"] for one in space.find("poddisruptionbudgets")
    ]
    for pod in space.pods("app.kubernetes.io/component=webhook"):
        chosen = [one for one in selectors if rules.matches(one, pod["metadata"]["labels"])]
        assert len(chosen) == 1, pod["metadata"]["name"]


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("override", _OVERRIDES, ids=["aliases", "fullnameOverride"])
def test_twice_in_one_umbrella(space: Space, override: dict[str, Any], by: str) -> None:
    space.secrets()
    values = {alias: space.values(override.get(alias)) for alias in ("eu", "us")}
    chart = str(umbrella("eu", "us"))
    space.cluster.helm("install", "auth", chart, *_where(space), values=values, by=by)
    names = [one["fullnameOverride"] for one in override.values()] or ["auth-eu", "auth-us"]
    _apart(space, *names)
    # Each has its own after an upgrade, too.
    changed = {alias: merged(one, {"podLabels": {"a": "b"}}) for alias, one in values.items()}
    space.cluster.helm("upgrade", "auth", chart, *_where(space), values=changed, by=by)
    _apart(space, *names)


@pytest.mark.parametrize("by", HELMS)
def test_twice_in_one_umbrella_beside_apps(space: Space, by: str) -> None:
    """Without pods of its own, each has Services and a CronJob."""
    space.secrets()
    values = {alias: space.values(_MODES["sidecar"]) for alias in ("eu", "us")}
    chart = str(umbrella("eu", "us"))
    space.cluster.helm("install", "auth", chart, *_where(space), values=values, by=by)
    cronjobs = {one["metadata"]["name"] for one in space.find("cronjobs")}
    assert cronjobs == {"auth-eu-reconcile", "auth-us-reconcile"}
    selectors = [one["spec"]["selector"] for one in space.find("services")]
    assert len({str(one) for one in selectors}) == 2, "two Services for each app"


@pytest.mark.parametrize("by", HELMS)
def test_releases_whose_names_begin_alike(space: Space, by: str) -> None:
    space.secrets()
    names = [f"{'a' * 42}-{end}" for end in ("one", "two")]
    for name in names:
        space.cluster.helm(
            "install", name, str(CHART), *_where(space), values=space.values(), by=by
        )
    services = sorted(
        one["metadata"]["name"]
        for one in space.find("services", "app.kubernetes.io/component=webhook")
    )
    assert len(services) == 2
    _apart(space, *services)


def test_releases_of_the_example_are_apart(space: Space) -> None:
    space.secrets()
    for name in ("shop-eu", "shop-us"):
        values = {"clerk-sync": space.values(_MODES["sidecar"])}
        space.cluster.helm("install", name, str(PARENT), *_where(space), values=values)
    _, eu = space.behind("shop-eu-clerk-sync")
    _, us = space.behind("shop-us-clerk-sync")
    assert (len(eu), len(us), len(eu | us)) == (2, 2, 4)
    for name in ("shop-eu", "shop-us"):
        deployment = space.get("deployment", name)
        assert deployment["status"]["replicas"] == 2
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert len(space.pods(",".join(f"{key}={value}" for key, value in selector.items()))) == 2


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", _MODES.values(), ids=list(_MODES))
def test_the_values_of_an_older_chart_are_enough(
    space: Space, mode: dict[str, Any], by: str, tmp_path: Path
) -> None:
    """`--reuse-values` gives the new chart what the old one had, and none of its own defaults."""
    space.secrets()
    older = tmp_path / "clerk-sync"
    shutil.copytree(CHART, older)
    known = merged(LEAST, {"replicas": 2})
    (older / "values.yaml").write_text(yaml.safe_dump(known), "utf-8")
    given = space.values(mode)
    where = _where(space)
    space.cluster.helm("install", "events", str(older), *where, values=given, by=by)
    before = _revisions(space)
    space.cluster.helm("upgrade", "events", str(CHART), *where, "--reuse-values", by=by)
    assert _revisions(space) == before, "it is the same release"
    nothing = {"podAnnotations": None, "image": None, "networkPolicy": {"egress": None}}
    reused = *where, "--reuse-values"
    space.cluster.helm("upgrade", "events", str(CHART), *reused, values=nothing, by=by)


def _revisions(space: Space) -> list[str]:
    """Return what pods are made of: a ReplicaSet for each template that there was."""
    return sorted(one["metadata"]["name"] for one in space.find("replicasets"))


@pytest.mark.parametrize("by", HELMS)
def test_the_migration_has_the_releases_account_once_it_is_there(space: Space, by: str) -> None:
    space.secrets()
    space.ensure_account("default")
    own = {"migrations": {"serviceAccountName": FULLNAME}}
    with pytest.raises(RefusedError, match="is the account that this release makes"):
        space.helm("install", own, "--wait", by=by)
    space.helm("install", {}, "--wait", by=by)
    assert _account(space) == "default"
    space.helm("upgrade", {"podLabels": {"a": "b"}}, "--wait", by=by)
    assert _account(space) == FULLNAME
    space.helm("upgrade", own, "--wait", by=by)
    assert _account(space) == FULLNAME
    # One that the upgrade makes is not there yet.
    space.helm("upgrade", {"serviceAccount": {"name": "another"}}, "--wait", by=by)
    assert _account(space) == "default"


def _account(space: Space) -> str:
    """Return whose account the last migration had."""
    hooks = space.cluster.helm("get", "hooks", "events", f"-n={space.name}")
    job = rules.the([one for one in yaml.safe_load_all(hooks) if one], "Job")
    return str(job["spec"]["template"]["spec"]["serviceAccountName"])
