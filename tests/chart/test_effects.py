"""No value is there in vain: each changes what is rendered, somewhere."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart import values
from tests.chart.helm import CHART, LEAST, HelmError, merged, scenarios, template
from tests.chart.values import Value

READ: tuple[Value, ...] = values.read((CHART / "values.yaml").read_text("utf-8"))

# What the pods of a Job, of a CronJob and of the test may have of their own.
OWN: dict[str, Any] = {
    "extraEnv": {"A": "b"},
    "nodeSelector": {"a": "b"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"a": "b"},
    "resources": {"limits": {"memory": "64Mi"}},
    "tolerations": [{"operator": "Exists"}],
}

# What no scenario sets, as nobody needs it often.
RARELY: list[dict[str, Any]] = [
    {
        "affinity": {"podAffinity": {}},
        "clerk": {"apiUrl": "https://clerk.example.com", "secretKey": {"existingSecret": "clerk"}},
        "fullnameOverride": "hooks",
        "image": {"pullPolicy": "Always", "tag": "1.2.3"},
        "internalService": {"annotations": {"a": "b"}, "labels": {"a": "b"}, "port": 81},
        "limits": {"batch": 10, "ledgerDays": 20, "quarantineDays": 7, "queue": 50},
        "listen": {"host": "::", "internalPort": 9001, "webhookPort": 9000},
        "log": {"format": "console", "level": "debug"},
        "migrations": {
            **OWN,
            "activeDeadlineSeconds": 60,
            "annotations": {"a": "b"},
            "backoffLimit": 0,
            "probeRows": False,
            "serviceAccountName": "migrator",
        },
        "podSecurityContext": {"fsGroup": 1},
        "preStopSleepSeconds": 0,
        "probes": {
            "liveness": {"failureThreshold": 2, "periodSeconds": 3, "timeoutSeconds": 4},
            "readiness": {"failureThreshold": 3, "periodSeconds": 4, "timeoutSeconds": 5},
            "startup": {"failureThreshold": 4, "periodSeconds": 5, "timeoutSeconds": 6},
        },
        "reconcile": {"interval": "1d"},
        "resources": {"requests": {"cpu": "1"}},
        "revisionHistoryLimit": 1,
        "securityContext": {"runAsUser": 1000},
        "service": {"labels": {"a": "b"}},
        "serviceAccount": {"annotations": {"a": "b"}, "automount": True, "labels": {"a": "b"}},
        "strategy": {"type": "Recreate", "rollingUpdate": None},
        "terminationGracePeriodSeconds": 60,
        "tests": {"enabled": False},
    },
    {"nameOverride": "hooks"},
    {
        "clerk": {"signingSecret": {"existingSecret": "", "externalSecret": {"key": "clerk"}}},
        "externalSecrets": {
            "apiVersion": "external-secrets.io/v1beta1",
            "store": {"name": "vault"},
        },
    },
    {"global": {"imageRegistry": "registry.example.com", "imagePullSecrets": ["registry"]}},
    {
        "dnsConfig": {"options": [{"name": "ndots", "value": "1"}]},
        "dnsPolicy": "Default",
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db.internal"]}],
        "internalService": {"ipFamilies": ["IPv6"], "ipFamilyPolicy": "SingleStack"},
        "minReadySeconds": 3,
        "progressDeadlineSeconds": 120,
        "runtimeClassName": "gvisor",
        "schedulerName": "mine",
        "service": {"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "PreferDualStack"},
        "tests": OWN,
    },
    {"enabled": False},
    {"openshift": {"adaptSecurityContext": "force"}, "podSecurityContext": {"runAsUser": 1}},
    {
        "podDisruptionBudget": {
            "maxUnavailable": "50%",
            "unhealthyPodEvictionPolicy": "IfHealthyBudget",
        }
    },
    {"podDisruptionBudget": {"enabled": False}},
    {
        "database": {
            "existingSecret": "",
            "host": "h",
            "name": "n",
            "password": "p",
            "username": "u",
        }
    },
    {
        "database": {
            "host": "h",
            "keys": {"password": "password"},
            "name": "n",
            "port": 3307,
            "username": "u",
        }
    },
    {
        "clerk": {"secretKey": {"existingSecret": "clerk"}},
        "reconcile": {
            "mode": "cronJob",
            "cronJob": {
                **OWN,
                "activeDeadlineSeconds": 60,
                "annotations": {"a": "b"},
                "backoffLimit": 0,
                "failedJobsHistoryLimit": 1,
                "startingDeadlineSeconds": 60,
                "successfulJobsHistoryLimit": 0,
                "suspend": True,
            },
        },
    },
    {"mode": "sidecar", "sidecar": {"injection": {"enabled": True, "failurePolicy": "Fail"}}},
    {
        "autoscaling": {
            "minReplicas": 3,
            "targetCPUUtilizationPercentage": 50,
            "type": "hpa",
        }
    },
    {"autoscaling": {"metrics": [{"type": "Resource"}], "type": "hpa"}},
    {"service": {"nodePort": 30080, "type": "NodePort"}},
    {
        "service": {
            "loadBalancerClass": "x",
            "loadBalancerSourceRanges": ["10.0.0.0/8"],
            "type": "LoadBalancer",
        }
    },
    {
        "ingress": {
            "enabled": True,
            "hosts": ["a.example.com"],
            "labels": {"a": "b"},
            "tls": {"secretName": "tls"},
        }
    },
    {"ingress": {"enabled": True, "hosts": ["a.example.com"], "tls": {"enabled": False}}},
    {
        "httpRoute": {
            "annotations": {"a": "b"},
            "enabled": True,
            "filters": [{"type": "RequestMirror"}],
            "hostnames": ["a.example.com"],
            "labels": {"a": "b"},
            "parentRefs": [{"name": "gateway"}],
        }
    },
    {
        "networkPolicy": {
            "annotations": {"a": "b"},
            "egress": {
                "clerk": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
                "collector": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
                "collectorPorts": [4318],
                "probe": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
                "probePorts": [8443],
                "extra": [{"ports": [{"port": 1}]}],
            },
            "enabled": True,
        },
        "probe": {"enabled": True, "url": "https://hooks.example.com/webhooks/clerk"},
    },
    {"networkPolicy": {"egress": {"enabled": False}, "enabled": True}},
    {"monitor": {"enabled": True, "renderMode": "skipIfMissing"}},
    {
        "monitor": {
            "annotations": {"a": "b"},
            "enabled": True,
            "relabelings": [{"action": "drop"}],
            "scrapeTimeout": "5s",
        }
    },
    {"alerts": {"annotations": {"a": "b"}, "enabled": True, "namespace": "monitoring"}},
    {"alerts": {"enabled": True, "renderMode": "skipIfMissing"}},
    {"dashboard": {"enabled": True, "labels": {"grafana_dashboard": "yes"}}},
    {
        "probe": {
            **OWN,
            "annotations": {"a": "b"},
            "enabled": True,
            "failedJobsHistoryLimit": 1,
            "schedule": "*/10 * * * *",
            "seconds": 20,
            "successfulJobsHistoryLimit": 0,
            "suspend": True,
            "url": "https://hooks.example.com/webhooks/clerk",
        }
    },
]
ON = "--kube-version=1.37"
GIVEN = [
    *((scenario.values, scenario.options("1.37")) for scenario in scenarios()),
    *((merged(LEAST, rare), [ON]) for rare in RARELY),
]


@pytest.mark.parametrize("root", READ, ids=lambda one: one.name)
def test_every_value_has_an_effect(root: Value) -> None:
    """Taken out of values that hold it, it changes what is rendered: in one of them at least."""
    never, idle = [], []
    for value in (one for one in root.walk() if not one.children):
        having = [
            (given, options)
            for given, options in GIVEN
            if at(given, value.path) not in (value.default, None)
        ]
        if not having:
            never.append(value.name)
        elif not any(
            result(given, options) != result(without(given, value.path), options)
            for given, options in having
        ):
            idle.append(value.name)
    assert never == [], "set it in a scenario, or above"
    assert idle == []


def result(given: dict[str, Any], options: list[str]) -> str:
    try:
        return template(given, *options)
    except HelmError as error:
        return str(error)


def at(given: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        given = given.get(key) if isinstance(given, dict) else None
    return given


def without(given: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {key: value for key, value in given.items() if key != first}
    return given | {first: without(given[first], tuple(rest))}
