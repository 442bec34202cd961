"""Every pod that the chart makes takes what a cluster's rules and injectors ask of pods."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.chart import rules
from tests.chart.helm import HELMS, LEAST, PARENT, Object, merged, nested, render

ON: Final = "--kube-version=1.37"

# Where the values of one kind of pods are, by the component that these pods have as a label.
OWN: Final[dict[str, tuple[str, ...]]] = {
    "migrate": ("migrations",),
    "reconcile": ("reconcile", "cronJob"),
    "probe": ("probe",),
    "test": ("tests",),
}
EVERY: Final[dict[str, Any]] = {
    "clerk": {"secretKey": {"existingSecret": "clerk"}},
    "reconcile": {"mode": "cronJob"},
    "probe": {"enabled": True, "url": "https://hooks.example.com/webhooks/clerk"},
}
MODES: Final = ("standalone", "sidecar")
FOR_ALL: Final[dict[str, Any]] = {
    "affinity": {"podAffinity": {}},
    "dnsConfig": {"nameservers": ["10.0.0.10"]},
    "dnsPolicy": "None",
    "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db.internal"]}],
    "hostUsers": False,
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "general"},
    "priorityClassName": "high",
    "runtimeClassName": "gvisor",
    "schedulerName": "mine",
    "tolerations": [{"key": "general"}],
}
"""Each is a field of a pod, by the same name."""


def pods(values: dict[str, Any], **more: Any) -> dict[str, rules.Pod]:
    """Return the pods of a release, by their component."""
    objects = render(merged(merged(LEAST, EVERY), values), ON, **more)
    return {pod.labels["app.kubernetes.io/component"]: pod for pod in rules.pods(objects)}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_for_all_pods_is_in_each(mode: str) -> None:
    given: dict[str, Any] = {
        "extraEnv": {"A": "b"},
        "extraEnvFrom": [{"configMapRef": {"name": "c"}}],
        "extraVolumes": [{"name": "d", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "d", "mountPath": "/d"}],
        "podAnnotations": {"example.com/e": "f"},
        "podLabels": {"example.com/g": "h"},
        "resources": {"requests": {"memory": "200Mi"}},
    }
    made = pods({**FOR_ALL, **given, "mode": mode})
    assert made.keys() == {*OWN, *(["webhook"] if mode == "standalone" else [])}
    for component, pod in made.items():
        assert {name: pod.spec.get(name) for name in FOR_ALL} == FOR_ALL, component
        assert pod.labels["example.com/g"] == "h"
        assert pod.metadata["annotations"]["example.com/e"] == "f"
        (container,) = pod.containers
        assert {"name": "A", "value": "b"} in container["env"]
        assert container["envFrom"] == given["extraEnvFrom"]
        assert given["extraVolumeMounts"][0] in container["volumeMounts"]
        assert given["extraVolumes"][0] in pod.spec["volumes"]
        assert container["resources"]["requests"]["memory"] == "200Mi"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("component", OWN)
def test_what_is_for_one_kind_of_pods_is_in_no_other(component: str, mode: str) -> None:
    own: dict[str, Any] = {
        "extraEnv": {"A": "own", "B": "own"},
        "nodeSelector": {"pool": "jobs"},
        "podAnnotations": {"example.com/a": "own"},
        "podLabels": {"example.com/b": "own"},
        "resources": {"limits": {"memory": "1Gi"}},
        "tolerations": [{"key": "jobs"}],
    }
    general = {
        "extraEnv": {"A": "general"},
        "mode": mode,
        "nodeSelector": {"pool": "general"},
        "podAnnotations": {"example.com/a": "general"},
        "podLabels": {"example.com/b": "general"},
        "tolerations": [{"key": "general"}],
    }
    before = pods(general)
    after = pods(merged(general, nested(OWN[component], own)))
    for name in before.keys() - {component}:
        assert after[name] == before[name], name
    pod = after[component]
    (container,) = pod.containers
    assert {"name": "A", "value": "own"} in container["env"]
    assert {"name": "B", "value": "own"} in container["env"]
    assert container["resources"] == own["resources"]
    assert pod.spec["nodeSelector"] == own["nodeSelector"]
    assert pod.spec["tolerations"] == own["tolerations"]
    assert pod.labels["example.com/b"] == "own"
    assert pod.metadata["annotations"]["example.com/a"] == "own"


@pytest.mark.parametrize("component", ["migrate", "reconcile", "probe"])
def test_jobs_take_annotations_of_their_own(component: str) -> None:
    path = (*OWN[component], "annotations")
    given = merged(merged(LEAST, EVERY), nested(path, {"example.com/a": "b"}))
    objects = render(given, ON)
    kind = "Job" if component == "migrate" else "CronJob"
    job = rules.the(objects, kind, f"-{component}")
    annotated = [job["metadata"]]
    if kind == "CronJob":
        annotated.append(job["spec"]["jobTemplate"]["metadata"])
    else:
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    for metadata in annotated:
        assert metadata["annotations"]["example.com/a"] == "b"


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize(
    ("repository", "image"),
    [
        ("ghcr.io/clerk-sync/clerk-sync", "mirror.example.com/x/clerk-sync/clerk-sync:1"),
        ("localhost/clerk-sync", "mirror.example.com/x/clerk-sync:1"),
        ("localhost:5000/a/b", "mirror.example.com/x/a/b:1"),
        ("clerk-sync/clerk-sync", "mirror.example.com/x/clerk-sync/clerk-sync:1"),
        ("clerk-sync", "mirror.example.com/x/clerk-sync:1"),
    ],
)
def test_a_parent_chart_says_where_images_are(by: str, repository: str, image: str) -> None:
    shared = {"imageRegistry": "mirror.example.com/x/", "imagePullSecrets": ["a", {"name": "b"}]}
    own = {
        "image": {"repository": repository, "tag": "1"},
        "imagePullSecrets": [{"name": "b"}],
        "mode": "sidecar",
    }
    values = {"global": shared, "clerk-sync": merged(merged(LEAST, EVERY), own)}
    objects = render(values, ON, by=by, chart=PARENT)
    for pod in rules.pods(objects):
        mine = [one for one in pod.containers if "clerk-sync" in one["image"] or "a/b" in image]
        assert image in {one["image"] for one in mine}, pod.name
        if pod.owner["kind"] != "Deployment":  # the app's pods are the app's
            assert pod.spec["imagePullSecrets"] == [{"name": "b"}, {"name": "a"}]


@pytest.mark.parametrize("service", ["service", "internalService"])
def test_services_take_the_families_of_addresses(service: str) -> None:
    families = {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]}
    objects = render(merged(LEAST, {service: families}))
    ending = "-internal" if service == "internalService" else "-sync"
    spec = rules.the(objects, "Service", ending)["spec"]
    assert {name: spec[name] for name in families} == families
    other = rules.the(objects, "Service", "-sync" if ending == "-internal" else "-internal")
    assert families.keys().isdisjoint(other["spec"])


def test_the_deployment_takes_how_long_a_rollout_may_take() -> None:
    given = {"minReadySeconds": 5, "progressDeadlineSeconds": 90}
    spec = rules.the(render(merged(LEAST, given)), "Deployment")["spec"]
    assert {name: spec[name] for name in given} == given
    assert given.keys().isdisjoint(rules.the(render(LEAST), "Deployment")["spec"])


EXTERNAL: Final[dict[str, Any]] = {
    "database": {"existingSecret": "", "externalSecret": {"url": {"key": "shop"}}},
    "clerk": {"signingSecret": {"existingSecret": "", "externalSecret": {"key": "clerk"}}},
    "externalSecrets": {"store": {"name": "vault"}},
}


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize(
    ("known", "given", "version"),
    [
        ((), "", "v1"),
        (("v1",), "", "v1"),
        (("v1", "v1beta1"), "", "v1"),
        (("v1beta1",), "", "v1beta1"),
        (("v1", "v1beta1"), "v1beta1", "v1beta1"),
        (("v1beta1",), "v1", "v1"),
    ],
)
def test_external_secrets_are_of_a_version_that_is_there(
    by: str, known: tuple[str, ...], given: str, version: str
) -> None:
    options = [f"--api-versions=external-secrets.io/{one}/ExternalSecret" for one in known]
    asked = {"apiVersion": f"external-secrets.io/{given}"} if given else {}
    objects = render(merged(EXTERNAL, {"externalSecrets": asked}), *options, by=by)
    made: list[Object] = rules.of_kind(objects, "ExternalSecret")
    assert len(made) == 2, "one of them is the migration's"
    assert {one["apiVersion"] for one in made} == {f"external-secrets.io/{version}"}
