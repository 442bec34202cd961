"""Mistakes that values can hold, each with the beginning of the sentence that tells of it."""

from __future__ import annotations

from typing import Any

PIECES: dict[str, Any] = {
    "existingSecret": "database",
    "host": "db",
    "name": "app",
    "username": "u",
}
FILES = {"existingSecret": "", "files": {"url": "/mnt/url"}}
SIDECAR = {"mode": "sidecar"}
SHORT = {"preStopSleepSeconds": 20}
INGRESS = {"enabled": True, "hosts": ["hooks.example.com"]}
ROUTE = {"enabled": True, "hostnames": ["hooks.example.com"], "parentRefs": [{"name": "gateway"}]}
LIST = {"enabled": True, "ingressAnnotation": "a.example.com/ranges"}
OBJECT = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}}

# What goes wrong, told by the beginning of its sentence, and the values that do it, over `LEAST`.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("`enabled: false` is for a chart that depends", {"enabled": False}),
    ("`image.repository` holds a tag", {"image": {"repository": "ghcr.io/x/y:1"}}),
    ("`image.tag` is no tag", {"image": {"tag": "sha256:" + 64 * "0"}}),
    # Database
    ("No database is given", {"database": {"existingSecret": ""}}),
    (
        "`database.existingSecret`, `database.url` are all set",
        {"database": {"url": "mysql://u:p@db/app"}},
    ),
    (
        "`database.existingSecret` is not the name of a Secret",
        {"database": {"existingSecret": "mysql://u:p@db/app"}},
    ),
    (
        "`database.keys.url` is for `database.existingSecret`",
        {"database": {**FILES, "keys": {"url": "url"}}},
    ),
    (
        "`database.keys.url` has to be the name of a key",
        {"database": {"keys": {"url": "mysql://u:p@db/app"}}},
    ),
    (
        "`database.files.user` is no piece of an address",
        {
            "database": {
                **PIECES,
                "existingSecret": "",
                "files": {"password": "/mnt/password", "user": "/mnt/user"},
            }
        },
    ),
    (
        "`database.files.url` has to be the path of a file",
        {"database": {"existingSecret": "", "files": {"url": "mnt/url"}}},
    ),
    (
        "`database.externalSecret.url` has to say what to fetch",
        {
            "database": {"existingSecret": "", "externalSecret": {"url": "prod/url"}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    (
        "`database.keys` names a URL and pieces of one (`url`, `password`)",
        {"database": {"keys": {"url": "url", "password": "password"}}},
    ),
    (
        "`database.host` is no host",
        {
            "database": {
                **PIECES,
                "host": "mysql://u:p@db/app",
                "keys": {"password": "password"},
            }
        },
    ),
    ("`database.host` is set, but the URL holds it already", {"database": {"host": "db"}}),
    ("`database.tls` is for the pieces", {"database": {"tls": {"mode": "verify"}}}),
    (
        "The database's password is missing: give it in `database.keys.password`",
        {"database": {"keys": {"host": "h", "name": "n", "username": "u"}}},
    ),
    (
        "`database.host` is written down and comes from `database.existingSecret`",
        {"database": {**PIECES, "keys": {"host": "host", "password": "password"}}},
    ),
    (
        "The database's username is missing: write it into `database.username`, or",
        {"database": {**PIECES, "username": "", "keys": {"password": "password"}}},
    ),
    (
        "`database.port` is written down and comes from",
        {"database": {**PIECES, "port": 3306, "keys": {"password": "password", "port": "port"}}},
    ),
    (
        "`database.tls.ca.existingSecret` and `database.tls.ca.existingConfigMap` are both set",
        {
            "database": {
                **PIECES,
                "keys": {"password": "password"},
                "tls": {"ca": {"existingSecret": "a", "existingConfigMap": "b"}},
            }
        },
    ),
    (
        "`database.tls.mode` is `verify-ca`, but `database.tls.ca` names no CA",
        {
            "database": {
                **PIECES,
                "keys": {"password": "password"},
                "tls": {"mode": "verify-ca"},
            }
        },
    ),
    (
        "`database.tls.mode` is `disable`, but `database.tls.ca` names a CA",
        {
            "database": {
                **PIECES,
                "keys": {"password": "password"},
                "tls": {"mode": "disable", "ca": {"existingSecret": "a"}},
            }
        },
    ),
    (
        "`migrations.existingSecret` stands in for `database.existingSecret`",
        {"database": FILES, "migrations": {"existingSecret": "ddl"}},
    ),
    (
        "`database.url` has to begin with mysql://",
        {"database": {"existingSecret": "", "url": "sqlite:///app.db"}},
    ),
    (
        "`migrations.serviceAccountName` is the account that this release makes",
        {"migrations": {"serviceAccountName": "events-clerk-sync"}},
    ),
    (
        "`migrations.existingSecret` is not the name of a Secret",
        {"migrations": {"existingSecret": "mysql://u:p@db/app"}},
    ),
    # Clerk's secrets
    (
        "`clerk.signingSecret.existingSecret`, `clerk.signingSecret.value` are all set",
        {"clerk": {"signingSecret": {"value": "whsec_c2VjcmV0"}}},
    ),
    ("The signing secret is not given", {"clerk": {"signingSecret": {"existingSecret": ""}}}),
    (
        "`clerk.secretKey.existingSecret` is not the name of a Secret",
        {"clerk": {"secretKey": {"existingSecret": "sk_test_secret"}}},
    ),
    (
        "`clerk.signingSecret.key` has to be the name of a key",
        {"clerk": {"signingSecret": {"key": "whsec_c2VjcmV0/+="}}},
    ),
    (
        "`clerk.secretKey.file` has to be the path of a file",
        {"clerk": {"secretKey": {"file": "sk_test_secret"}}},
    ),
    (
        "`clerk.secretKey.externalSecret` has to say what to fetch",
        {
            "clerk": {"secretKey": {"externalSecret": {"property": "key"}}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    (
        "`clerk.secretKey.value` has to begin with `sk_`",
        {"clerk": {"secretKey": {"value": "whsec_c2VjcmV0"}}},
    ),
    (
        "An `externalSecret` is set, but no store",
        {"clerk": {"secretKey": {"externalSecret": {"key": "clerk"}}}},
    ),
    # The app's token
    (
        "`appToken.existingSecret`, `appToken.file` are all set",
        {"appToken": {"existingSecret": "app", "file": "/mnt/app-token"}},
    ),
    (
        "`appToken.existingSecret` is not the name of a Secret",
        {"appToken": {"existingSecret": "6A09E667F3BCC908"}},
    ),
    ("`appToken.key` has to be the name of a key", {"appToken": {"key": "6a09/+="}}),
    ("`appToken.file` has to be the path of a file", {"appToken": {"file": "6a09e667f3bcc908"}}),
    (
        "`appToken.externalSecret` has to say what to fetch",
        {
            "appToken": {"externalSecret": {"property": "token"}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    ("`appToken.value` has to be a token of 16", {"appToken": {"value": "short"}}),
    ("`appToken.value` has to be a token", {"appToken": {"value": "6a09e667f3bcc908 short"}}),
    ("`appToken.value` has to be a token of 16", {"appToken": {"value": " "}}),
    (
        "An `externalSecret` is set, but no store",
        {"appToken": {"externalSecret": {"key": "shop"}}},
    ),
    # Mapping, listeners
    (
        "`config.preset`, `config.existingConfigMap` are all set",
        {"config": {"preset": "mirror", "existingConfigMap": {"name": "mapping"}}},
    ),
    ("`config.mapping` is no mapping", {"config": {"mapping": "mapping.yaml"}}),
    (
        "`listen.webhookPort` and `listen.internalPort` are the same",
        {"listen": {"webhookPort": 9000, "internalPort": 9000}},
    ),
    ("`terminationGracePeriodSeconds` is too short", SHORT | {"terminationGracePeriodSeconds": 29}),
    # Reconcile
    ("`reconcile.mode: cronJob` needs Clerk's secret key", {"reconcile": {"mode": "cronJob"}}),
    (
        "`reconcile.cronJob.schedule` has to have five fields",
        {"reconcile": {"cronJob": {"schedule": "6h"}}},
    ),
    # Sidecar
    (
        "`autoscaling` is for `mode: standalone`",
        SIDECAR | {"autoscaling": {"type": "hpa"}},
    ),
    (
        "`extraContainers` is for `mode: standalone`",
        SIDECAR | {"extraContainers": [{"name": "a", "image": "b"}]},
    ),
    (
        "`monitor.kind: ServiceMonitor` does not find a sidecar's port",
        SIDECAR | {"monitor": {"enabled": True, "kind": "ServiceMonitor"}},
    ),
    ("`sidecar.podLabels.a` is no label's value", SIDECAR | {"sidecar": {"podLabels": {"a": ""}}}),
    (
        "`sidecar.podLabels.app.kubernetes.io/managed-by` would select other apps' pods",
        SIDECAR | {"sidecar": {"podLabels": {"app.kubernetes.io/managed-by": "Helm"}}},
    ),
    (
        "`sidecar.injection` needs Kubernetes 1.36, this is v1.35.0",
        SIDECAR | {"sidecar": {"injection": {"enabled": True}}},
    ),
    (
        "`sidecar` is set, but `mode` is `standalone`",
        {"sidecar": {"podLabels": {"app": "shop"}}},
    ),
    # Scaling
    (
        "`autoscaling.maxReplicas` is less than",
        {"autoscaling": {"type": "hpa", "minReplicas": 3, "maxReplicas": 2}},
    ),
    (
        "`autoscaling.type: hpa` measures CPU by its request",
        {"autoscaling": {"type": "hpa"}, "resources": {"requests": {"cpu": None}}},
    ),
    ("`autoscaling.type: keda` needs `autoscaling.triggers`", {"autoscaling": {"type": "keda"}}),
    (
        "`autoscaling.triggers` and `autoscaling.scaledObject` are for",
        {"autoscaling": {"triggers": [{"type": "cpu"}]}},
    ),
    (
        "`autoscaling.scaledObject.triggers` is the chart's",
        {
            "autoscaling": {
                "type": "keda",
                "triggers": [{"type": "cpu"}],
                "scaledObject": {"triggers": []},
            }
        },
    ),
    # What is published
    ("`ingress.hosts` is empty", {"ingress": {"enabled": True}}),
    (
        "`allowList` needs to know your Ingress controller's annotation",
        {"ingress": INGRESS, "allowList": {"enabled": True}},
    ),
    (
        "`ingress.annotations` has the annotation that `allowList.ingressAnnotation` names",
        {
            "ingress": {**INGRESS, "annotations": {"a.example.com/ranges": "10.0.0.0/8"}},
            "allowList": LIST,
        },
    ),
    ("`httpRoute.parentRefs` is empty", {"httpRoute": {**ROUTE, "parentRefs": []}}),
    ("`httpRoute.hostnames` is empty", {"httpRoute": {**ROUTE, "hostnames": []}}),
    (
        "`https://hooks.example.com` is no host",
        {"ingress": {**INGRESS, "hosts": ["https://hooks.example.com"]}},
    ),
    ("`*.example.com` is no host", {"httpRoute": {**ROUTE, "hostnames": ["*.example.com"]}}),
    ("`allowList` has nothing to work on", {"allowList": LIST}),
    (
        "`service.loadBalancerSourceRanges` is for",
        {"service": {"loadBalancerSourceRanges": ["10.0.0.0/8"]}},
    ),
    ("`service.loadBalancerClass` is for", {"service": {"loadBalancerClass": "x"}}),
    (
        "`service.nodePort` and `service.externalTrafficPolicy` are for",
        {"service": {"externalTrafficPolicy": "Local"}},
    ),
    # Monitoring
    (
        "A ServiceMonitor needs `internalService.enabled`",
        {"monitor": {"enabled": True}, "internalService": {"enabled": False}},
    ),
    (
        "The cluster knows no ServiceMonitor",
        {"monitor": {"enabled": True, "renderMode": "failIfMissing"}},
    ),
    (
        "The cluster knows no PrometheusRule",
        {"alerts": {"enabled": True, "renderMode": "failIfMissing"}},
    ),
    (
        "`alerts` names `ClerkSyncSilence`, which is no alert: there are ClerkSyncAbsent, ",
        {"alerts": {"excludeRules": ["ClerkSyncSilence"]}},
    ),
    (
        "`alerts` names `ReconcileOld`, which is no alert",
        {"alerts": {"rules": {"ReconcileOld": {"threshold": 1}}}},
    ),
    (
        "`alerts.rules.ClerkSyncAbsent.expr` cannot be changed",
        {"alerts": {"rules": {"ClerkSyncAbsent": {"expr": "up == 0"}}}},
    ),
    (
        "`alerts.rules.ClerkSyncAbsent` has no `threshold` to change",
        {"alerts": {"rules": {"ClerkSyncAbsent": {"threshold": 1}}}},
    ),
    (
        "`alerts.rules.ClerkSyncReconcileOld.threshold` has to be a number",
        {"alerts": {"rules": {"ClerkSyncReconcileOld": {"threshold": "14d"}}}},
    ),
    (
        "`alerts.rules.ClerkSyncReconcileOld.for` has to be a span of time",
        {"alerts": {"rules": {"ClerkSyncReconcileOld": {"for": 10}}}},
    ),
    (
        "`extraEnv.OTEL_EXPORTER_OTLP_ENDPOINT` comes from elsewhere",
        {
            "extraEnv": {"OTEL_EXPORTER_OTLP_ENDPOINT": {"configMapKeyRef": {"name": "otel"}}},
            "networkPolicy": {"enabled": True},
        },
    ),
    (
        "`networkPolicy.egress.collector` has no port",
        {"networkPolicy": {"enabled": True, "egress": {"collector": [{"podSelector": {}}]}}},
    ),
    (
        "`probe.enabled` needs the URL that Clerk posts to",
        {"probe": {"enabled": True}},
    ),
    (
        "`probe.url` is no URL",
        {"probe": {"enabled": True, "url": "https://user:secret@hooks.example.com"}},
    ),
    # Pods and Services
    (
        "`progressDeadlineSeconds` has to be more than `minReadySeconds`",
        {"minReadySeconds": 60, "progressDeadlineSeconds": 60},
    ),
    ("`dnsPolicy: None` leaves pods without DNS", {"dnsPolicy": "None"}),
    (
        "`internalService.ipFamilies` names two families",
        {"internalService": {"ipFamilies": ["IPv4", "IPv6"]}},
    ),
    # Labels, extras
    (
        "`podLabels` sets app.kubernetes.io/name",
        {"podLabels": {"app.kubernetes.io/name": "x"}},
    ),
    (
        "`tests.podLabels` sets clerk-sync.dev/instance",
        {"tests": {"podLabels": {"clerk-sync.dev/instance": "x"}}},
    ),
    (
        "`probe.podLabels` sets app.kubernetes.io/component",
        {"probe": {"podLabels": {"app.kubernetes.io/component": "webhook"}}},
    ),
    ("`extraEnv.LOG_LEVEL` is a setting of clerk-sync", {"extraEnv": {"LOG_LEVEL": "debug"}}),
    (
        "`extraEnv.DATABASE_URL_FILE` is a setting of clerk-sync",
        {"extraEnv": {"DATABASE_URL_FILE": "/x"}},
    ),
    ("`extraEnv.A B` is no name of a variable", {"extraEnv": {"A B": "c"}}),
    (
        "`migrations.extraEnv.DATABASE_URL` is a setting of clerk-sync",
        {"migrations": {"extraEnv": {"DATABASE_URL": "mysql://u:p@db/app"}}},
    ),
    (
        "`reconcile.cronJob.extraEnv.A B` is no name of a variable",
        {"reconcile": {"cronJob": {"extraEnv": {"A B": "c"}}}},
    ),
    (
        "`extraVolumes` has the volume `clerk-sync-secrets`, which is there already",
        {"extraVolumes": [{"name": "clerk-sync-secrets", "emptyDir": {}}]},
    ),
    (
        "`extraVolumeMounts` mounts `/etc/clerk-sync/x`, where something is mounted",
        {
            "extraVolumes": [{"name": "x", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "x", "mountPath": "/etc/clerk-sync/x"}],
        },
    ),
    (
        "`extraVolumeMounts` mounts `/var/run/secrets/kubernetes.io/serviceaccount`, where",
        SIDECAR
        | {
            "extraVolumes": [{"name": "x", "emptyDir": {}}],
            "extraVolumeMounts": [
                {"name": "x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
            ],
        },
    ),
    (
        "`extraVolumeMounts` mounts the volume `x`, which is not there",
        {"extraVolumeMounts": [{"name": "x", "mountPath": "/x"}]},
    ),
    (
        "There are two containers `clerk-sync` in the pod",
        {"extraContainers": [{"name": "clerk-sync", "image": "x"}]},
    ),
    ("`extraObjects.a` is no object", {"extraObjects": {"a": {"kind": "ConfigMap"}}}),
    (
        "`extraObjects.a` and `extraObjects.b` are the same ConfigMap `mine`",
        {"extraObjects": {"a": OBJECT, "b": OBJECT}},
    ),
    (
        "`extraObjects.a` has the name `events-clerk-sync-internal`, which is kept",
        {
            "extraObjects": {
                "a": {**OBJECT, "metadata": {"name": "{{ .Release.Name }}-clerk-sync-internal"}}
            }
        },
    ),
]
