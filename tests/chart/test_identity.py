"""What names an object and what selects it is one identity, whatever the release and the alias."""

from __future__ import annotations

import re
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.chart import rules
from tests.chart.helm import HELMS, LEAST, PARENT, merged, render, scenarios, umbrella

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tests.chart.helm import Object

ON: Final = "--kube-version=1.37"

# Every kind that the chart makes of itself.
_ALL: Final[dict[str, Any]] = {
    "alerts": {"enabled": True},
    "appToken": {"value": "0123456789abcdef"},
    "clerk": {"secretKey": {"value": "sk_test_1"}},
    "config": {"mapping": {"tables": {"user": {"table": "users"}}}},
    "dashboard": {"enabled": True},
    "ingress": {"enabled": True, "hosts": ["hooks.example.com"]},
    "httpRoute": {
        "enabled": True,
        "hostnames": ["hooks.example.com"],
        "parentRefs": [{"name": "public"}],
    },
    "monitor": {"enabled": True},
    "networkPolicy": {"enabled": True},
    "probe": {"enabled": True},
    "reconcile": {"mode": "cronJob"},
}
MODES: Final[dict[str, dict[str, Any]]] = {
    "standalone": {},
    "scaled": {"autoscaling": {"type": "hpa"}},
    "sidecar": {"mode": "sidecar"},
    "injection": {"mode": "sidecar", "sidecar": {"injection": {"enabled": True}}},
}
OWNER: Final = "example.com/owner"

# https://kubernetes.io/docs/concepts/overview/working-with-objects/names/: labels and names of
# Services and Jobs (whose pods carry them as a label) have 63 characters, CronJobs 52.
_LONGEST: Final = {"Service": 63, "Job": 63, "CronJob": 52, "Pod": 63}
_DNS_LABEL: Final = r"[a-z]([-a-z0-9]*[a-z0-9])?"


def owned(owner: str, *more: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that mark all objects and pods with their owner."""
    values = merged(merged(LEAST, _ALL), {"commonLabels": {OWNER: owner}})
    for one in more:
        values = merged(values, one)
    return values


def owners(objects: Iterable[Object]) -> dict[str, set[tuple[str, str]]]:
    """Return the kinds and names of each owner's objects."""
    found: dict[str, set[tuple[str, str]]] = {}
    for one in objects:
        of = one["metadata"]["labels"][OWNER]
        found.setdefault(of, set()).add((one["kind"], rules.name_of(one)))
    return found


def selectors(one: Object) -> Iterator[dict[str, str]]:
    """Yield each set of labels by which an object chooses pods or Services."""
    if one["kind"] == "Service":
        yield one["spec"]["selector"]
        return
    for key, value in walk(one.get("spec") or {}):
        if key in ("selector", "labelSelector", "podSelector", "objectSelector"):
            yield value.get("matchLabels") or {}


def walk(tree: object) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value)


def app_pods(objects: Iterable[Object]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield whose pods an app has beside clerk-sync, with their labels: the policy knows them."""
    for one in rules.of_kind(objects, "MutatingAdmissionPolicy"):
        labels = one["spec"]["matchConstraints"]["objectSelector"]["matchLabels"]
        yield one["metadata"]["labels"][OWNER], labels


def trespasses(objects: tuple[Object, ...]) -> Iterator[str]:
    """Say which objects choose what another owner has, or nothing at all."""
    choosable = [(pod.labels[OWNER], pod.labels) for pod in rules.pods(objects)]
    choosable += [
        (one["metadata"]["labels"][OWNER], one["metadata"]["labels"])
        for one in rules.of_kind(objects, "Service")
    ]
    choosable += list(app_pods(objects))
    for one in objects:
        own = one["metadata"]["labels"][OWNER]
        for selector in selectors(one):
            chosen = {owner for owner, labels in choosable if rules.matches(selector, labels)}
            if chosen - {own} or ("clerk-sync.dev/sidecar" not in selector and not chosen):
                yield f"{own}: {one['kind']} {rules.name_of(one)} chooses {sorted(chosen)}"


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    ("aliases", "override"),
    [
        (("eu", "us"), {}),
        (("clerk-sync", "eu"), {}),
        (("clerk-sync", "clerk-sync-internal"), {}),
        (("clerkSync", "clerksync"), {}),
        (("clerk_sync", "clerk-sync"), {}),
        (("a" * 60 + "b", "a" * 60 + "c"), {}),
        (("eu", "us"), {"eu": {"fullnameOverride": "one"}, "us": {"fullnameOverride": "two"}}),
        (("eu", "us"), {"eu": {"nameOverride": "one"}, "us": {"nameOverride": "two"}}),
    ],
    ids=str,
)
def test_twice_in_one_umbrella(
    by: str, mode: dict[str, Any], aliases: tuple[str, ...], override: dict[str, Any]
) -> None:
    given = {alias: owned(str(n), mode, override.get(alias, {})) for n, alias in enumerate(aliases)}
    objects = render(given, ON, by=by, chart=umbrella(*aliases))
    assert list(rules.objects_twice(objects)) == []
    first, second = owners(objects).values()
    assert len(first) == len(second)
    assert list(trespasses(objects)) == []
    assert list(over_limits(objects)) == []


@pytest.mark.parametrize("by", HELMS)
def test_a_release_that_holds_both_aliases(by: str) -> None:
    given = {alias: owned(alias) for alias in ("eu", "us")}
    objects = render(given, ON, by=by, chart=umbrella("eu", "us"), release="eu-us")
    assert list(rules.objects_twice(objects)) == []
    assert list(trespasses(objects)) == []


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a" * 42 + "-one", "a" * 42 + "-two"),
        ("a" * 52 + "1", "a" * 52 + "2"),
        ("clerk-sync-" + "a" * 40 + "1", "clerk-sync-" + "a" * 40 + "2"),
        ("clerk-sync", "clerk-sync-internal"),
        ("clerk-sync", "my-clerk-sync"),
        ("shop", "shop-eu"),
        ("shop.eu", "shop-eu"),
        ("1shop", "shop"),
    ],
)
def test_releases_in_a_namespace_are_apart(one: str, other: str, mode: dict[str, Any]) -> None:
    each = [render(owned(name, mode), ON, release=name) for name in (one, other)]
    both = (*each[0], *each[1])
    assert list(rules.objects_twice(both)) == []
    assert list(trespasses(both)) == []
    assert list(over_limits(both)) == []


def over_limits(objects: Iterable[Object]) -> Iterator[str]:
    """Say what is longer than Kubernetes takes, or no name at all."""
    for one in objects:
        name, kind = rules.name_of(one), one["kind"]
        part = _DNS_LABEL if kind in _LONGEST else rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
        if len(name) > _LONGEST.get(kind, 253) or not re.fullmatch(part, name):
            yield f"{kind} {name}"
        for key, labels in walk(one):
            if key in ("labels", "matchLabels"):
                for label in labels.values():
                    if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", label):
                        yield f"{kind} {name}: label {label}"


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
@pytest.mark.parametrize(
    ("release", "given"),
    [
        ("a" * 53, {}),
        ("0" * 53, {}),
        ("a" + ".b" * 26, {}),
        ("r", {"fullnameOverride": "f" * 42}),
        ("a" * 53, {"nameOverride": "n" * 53}),
    ],
    ids=str,
)
def test_names_are_as_long_as_they_may_be(
    release: str, given: dict[str, Any], mode: dict[str, Any]
) -> None:
    objects = render(owned("me", mode, given), ON, release=release)
    assert list(over_limits(objects)) == []
    assert list(rules.objects_twice(objects)) == []


@pytest.mark.parametrize(
    ("release", "fullname"),
    [
        ("clerk-sync", "clerk-sync"),
        ("my-clerk-sync", "my-clerk-sync"),
        ("events", "events-clerk-sync"),
    ],
)
def test_short_names_are_plain(release: str, fullname: str) -> None:
    assert rules.name_of(rules.the(render(LEAST, release=release), "Deployment")) == fullname


def test_no_name_is_put_together_in_two_ways() -> None:
    """What follows a release's name may not be the end of another's, with what follows that."""
    endings: dict[str, set[str]] = {}
    for scenario in scenarios():
        given = merged(merged(scenario.values, {"fullnameOverride": "x"}), {"extraObjects": None})
        for one in render(given, *scenario.options("1.37")):
            name = rules.name_of(one)
            if name.startswith("x-"):
                endings.setdefault(one["kind"], set()).add(name.removeprefix("x"))
    assert endings["Service"] == {"-internal"}, "one that ends so has a hash"
    for kind, known in endings.items():
        for first, second in combinations(sorted(known), 2):
            assert not first.endswith(second), kind
            assert not second.endswith(first), kind


def test_releases_of_the_example_are_apart() -> None:
    """Its Deployments choose their own pods; clerk-sync's are apart by the tests above."""
    values = {"clerk-sync": merged(LEAST, {"mode": "sidecar"})}
    made = [
        rules.the(render(values, ON, chart=PARENT, release=name), "Deployment")
        for name in ("shop-eu", "shop-us")
    ]
    for own in made:
        for other in made:
            labels = other["spec"]["template"]["metadata"]["labels"]
            selector = own["spec"]["selector"]["matchLabels"]
            assert rules.matches(selector, labels) == (own is other)


def test_what_is_kept_in_one_namespace_for_all_is_apart() -> None:
    """Two releases of the same name, in two namespaces, with their monitors in a third."""
    there = {name: {"namespace": "monitoring"} for name in ("monitor", "alerts", "dashboard")}
    each = [
        render(owned(name, there, {"namespaceOverride": name}), ON, release="clerk-sync")
        for name in ("eu", "us")
    ]
    both = (*each[0], *each[1])
    shared = [one for one in both if one["metadata"].get("namespace") == "monitoring"]
    assert len(shared) == 6
    assert list(rules.objects_twice(both)) == []
    assert list(over_limits(both)) == []
