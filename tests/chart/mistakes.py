"""Mistakes in values, each with the beginning of the sentence that reports it."""

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

# The beginning of the error message, and the values that cause it, over `LEAST`.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("`enabled: false` only works in a chart that depends", {"enabled": False}),
    ("`image.repository` contains a tag", {"image": {"repository": "ghcr.io/x/y:1"}}),
    ("`image.tag` is not a tag", {"image": {"tag": "sha256:" + 64 * "0"}}),
    # Database
    ("No database is set", {"database": {"existingSecret": ""}}),
    (
        "`database.existingSecret`, `database.url` are all set",
        {"database": {"url": "mysql://u:p@db/app"}},
    ),
    (
        "`database.existingSecret` is not the name of a Secret",
        {"database": {"existingSecret": "mysql://u:p@db/app"}},
    ),
    (
        "`database.keys.url` needs `database.existingSecret`",
        {"database": {**FILES, "keys": {"url": "url"}}},
    ),
    (
        "`database.keys.url` must be the name of a key",
        {"database": {"keys": {"url": "mysql://u:p@db/app"}}},
    ),
    (
        "`database.files.user` is not part of a database URL",
        {
            "database": {
                **PIECES,
                "existingSecret": "",
                "files": {"password": "/mnt/password", "user": "/mnt/user"},
            }
        },
    ),
    (
        "`database.files.url` must be the path of a file",
        {"database": {"existingSecret": "", "files": {"url": "mnt/url"}}},
    ),
    (
        "`database.externalSecret.url` must say what to fetch",
        {
            "database": {"existingSecret": "", "externalSecret": {"url": "prod/url"}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    (
        "`database.keys` names a URL and parts of one (`url`, `password`)",
        {"database": {"keys": {"url": "url", "password": "password"}}},
    ),
    (
        "`database.host` is not a host name",
        {
            "database": {
                **PIECES,
                "host": "mysql://u:p@db/app",
                "keys": {"password": "password"},
            }
        },
    ),
    ("`database.host` is set, but the URL already contains it", {"database": {"host": "db"}}),
    ("`database.tls` has no effect on a URL", {"database": {"tls": {"mode": "verify"}}}),
    (
        "The database's password is missing: set `database.keys.password`",
        {"database": {"keys": {"host": "h", "name": "n", "username": "u"}}},
    ),
    (
        "`database.host` is set, and also comes from `database.existingSecret`",
        {"database": {**PIECES, "keys": {"host": "host", "password": "password"}}},
    ),
    (
        "The database's username is missing: set `database.username`, or",
        {"database": {**PIECES, "username": "", "keys": {"password": "password"}}},
    ),
    (
        "`database.port` is set, and also comes from",
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
        "`migrations.existingSecret` replaces `database.existingSecret`",
        {"database": FILES, "migrations": {"existingSecret": "ddl"}},
    ),
    (
        "`database.url` must begin with mysql://",
        {"database": {"existingSecret": "", "url": "sqlite:///app.db"}},
    ),
    (
        "`migrations.serviceAccountName` is the account that this release creates",
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
    ("The signing secret is not set", {"clerk": {"signingSecret": {"existingSecret": ""}}}),
    (
        "`clerk.secretKey.existingSecret` is not the name of a Secret",
        {"clerk": {"secretKey": {"existingSecret": "sk_test_secret"}}},
    ),
    (
        "`clerk.signingSecret.key` must be the name of a key",
        {"clerk": {"signingSecret": {"key": "whsec_c2VjcmV0/+="}}},
    ),
    (
        "`clerk.secretKey.file` must be the path of a file",
        {"clerk": {"secretKey": {"file": "sk_test_secret"}}},
    ),
    (
        "`clerk.secretKey.externalSecret` must say what to fetch",
        {
            "clerk": {"secretKey": {"externalSecret": {"property": "key"}}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    (
        "`clerk.secretKey.value` must begin with `sk_`",
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
    ("`appToken.key` must be the name of a key", {"appToken": {"key": "6a09/+="}}),
    ("`appToken.file` must be the path of a file", {"appToken": {"file": "6a09e667f3bcc908"}}),
    (
        "`appToken.externalSecret` must say what to fetch",
        {
            "appToken": {"externalSecret": {"property": "token"}},
            "externalSecrets": {"store": {"name": "vault"}},
        },
    ),
    ("`appToken.value` must be a token of 16", {"appToken": {"value": "short"}}),
    ("`appToken.value` must be a token", {"appToken": {"value": "6a09e667f3bcc908 short"}}),
    ("`appToken.value` must be a token of 16", {"appToken": {"value": " "}}),
    (
        "An `externalSecret` is set, but no store",
        {"appToken": {"externalSecret": {"key": "shop"}}},
    ),
    # Mapping, listeners
    (
        "`config.preset`, `config.existingConfigMap` are all set",
        {"config": {"preset": "mirror", "existingConfigMap": {"name": "mapping"}}},
    ),
    ("`config.mapping` is not a mapping", {"config": {"mapping": "mapping.yaml"}}),
    (
        "`listen.webhookPort` and `listen.internalPort` are the same",
        {"listen": {"webhookPort": 9000, "internalPort": 9000}},
    ),
    ("`terminationGracePeriodSeconds` is too short", SHORT | {"terminationGracePeriodSeconds": 29}),
    # Reconcile
    ("`reconcile.mode: cronJob` needs Clerk's secret key", {"reconcile": {"mode": "cronJob"}}),
    (
        "`reconcile.cronJob.schedule` must have five fields",
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
        "`monitor.kind: ServiceMonitor` may not find a sidecar's port",
        SIDECAR | {"monitor": {"enabled": True, "kind": "ServiceMonitor"}},
    ),
    ("`sidecar.podLabels.a` is not a label value", SIDECAR | {"sidecar": {"podLabels": {"a": ""}}}),
    (
        "`sidecar.podLabels.app.kubernetes.io/managed-by` would also select other apps' pods",
        SIDECAR | {"sidecar": {"podLabels": {"app.kubernetes.io/managed-by": "Helm"}}},
    ),
    (
        "`sidecar.injection` needs Kubernetes 1.36, but this is v1.35.0",
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
        "`autoscaling.type: hpa` measures CPU relative to its request",
        {"autoscaling": {"type": "hpa"}, "resources": {"requests": {"cpu": None}}},
    ),
    (
        "`autoscaling.type: keda` needs at least one entry in `autoscaling.triggers`",
        {"autoscaling": {"type": "keda"}},
    ),
    (
        "`autoscaling.triggers` and `autoscaling.scaledObject` are for",
        {"autoscaling": {"triggers": [{"type": "cpu"}]}},
    ),
    (
        "`autoscaling.scaledObject.triggers` is set by the chart",
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
        "`allowList` needs your Ingress controller's annotation",
        {"ingress": INGRESS, "allowList": {"enabled": True}},
    ),
    (
        "`ingress.annotations` contains the annotation that `allowList.ingressAnnotation` names",
        {
            "ingress": {**INGRESS, "annotations": {"a.example.com/ranges": "10.0.0.0/8"}},
            "allowList": LIST,
        },
    ),
    ("`httpRoute.parentRefs` is empty", {"httpRoute": {**ROUTE, "parentRefs": []}}),
    ("`httpRoute.hostnames` is empty", {"httpRoute": {**ROUTE, "hostnames": []}}),
    (
        "`https://hooks.example.com` is not a host name",
        {"ingress": {**INGRESS, "hosts": ["https://hooks.example.com"]}},
    ),
    (
        "`*.example.com` is not a host name",
        {"httpRoute": {**ROUTE, "hostnames": ["*.example.com"]}},
    ),
    ("`allowList` has no effect", {"allowList": LIST}),
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
        "The cluster does not have ServiceMonitor",
        {"monitor": {"enabled": True, "renderMode": "failIfMissing"}},
    ),
    (
        "The cluster does not have PrometheusRule",
        {"alerts": {"enabled": True, "renderMode": "failIfMissing"}},
    ),
    (
        "`alerts` names `ClerkSyncSilence`, which is not an alert: choose from ClerkSyncAbsent, ",
        {"alerts": {"excludeRules": ["ClerkSyncSilence"]}},
    ),
    (
        "`alerts` names `ReconcileOld`, which is not an alert",
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
        "`alerts.rules.ClerkSyncReconcileOld.threshold` must be a number",
        {"alerts": {"rules": {"ClerkSyncReconcileOld": {"threshold": "14d"}}}},
    ),
    (
        "`alerts.rules.ClerkSyncReconcileOld.for` must be a duration",
        {"alerts": {"rules": {"ClerkSyncReconcileOld": {"for": 10}}}},
    ),
    (
        "`extraEnv.OTEL_EXPORTER_OTLP_ENDPOINT` has no literal value",
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
        "`probe.url` is not a URL",
        {"probe": {"enabled": True, "url": "https://user:secret@hooks.example.com"}},
    ),
    # Pods and Services
    (
        "`progressDeadlineSeconds` must be more than `minReadySeconds`",
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
    ("`extraEnv.A B` is not the name of an environment variable", {"extraEnv": {"A B": "c"}}),
    (
        "`migrations.extraEnv.DATABASE_URL` is a setting of clerk-sync",
        {"migrations": {"extraEnv": {"DATABASE_URL": "mysql://u:p@db/app"}}},
    ),
    (
        "`reconcile.cronJob.extraEnv.A B` is not the name of an environment variable",
        {"reconcile": {"cronJob": {"extraEnv": {"A B": "c"}}}},
    ),
    (
        "`extraVolumes` has the volume `clerk-sync-secrets`, which already exists",
        {"extraVolumes": [{"name": "clerk-sync-secrets", "emptyDir": {}}]},
    ),
    (
        "`extraVolumeMounts` mounts `/etc/clerk-sync/x`, where something is already mounted",
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
        "`extraVolumeMounts` mounts the volume `x`, which does not exist",
        {"extraVolumeMounts": [{"name": "x", "mountPath": "/x"}]},
    ),
    (
        "The pod has two containers named `clerk-sync`",
        {"extraContainers": [{"name": "clerk-sync", "image": "x"}]},
    ),
    ("`extraObjects.a` is not an object", {"extraObjects": {"a": {"kind": "ConfigMap"}}}),
    (
        "`extraObjects.a` and `extraObjects.b` are the same ConfigMap `mine`",
        {"extraObjects": {"a": OBJECT, "b": OBJECT}},
    ),
    (
        "`extraObjects.a` has the name `events-clerk-sync-internal`, which is reserved",
        {
            "extraObjects": {
                "a": {**OBJECT, "metadata": {"name": "{{ .Release.Name }}-clerk-sync-internal"}}
            }
        },
    ),
]
