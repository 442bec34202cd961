{{/* Names and labels. Every template takes the chart's root scope, unless it says otherwise. */}}

{{/*
Identity. A release and the chart's name in it (its alias in a parent chart) identify an installation.
`clerk-sync.fullname` contains both. It names every object and selects every pod, so two installations
with different names never select each other's pods.
*/}}
{{- define "clerk-sync.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end -}}

{{/*
A DNS label of at most 42 characters: a CronJob's name may have 52, and `-reconcile` is appended. A name
that was changed or cut ends in a hash of the original. So does `…-internal`, because the release without
`-internal` has a Service of that name.
*/}}
{{- define "clerk-sync.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := include "clerk-sync.name" . -}}
{{- $whole := printf "%s-%s" .Release.Name $name -}}
{{- /* Only for this one name: a release's name may hold two aliases. */ -}}
{{- if and (eq $name "clerk-sync") (contains $name .Release.Name) }}{{ $whole = .Release.Name }}{{ end -}}
{{- /* Releases may have dots, and aliases capitals and underscores; a Service begins with a letter. */ -}}
{{- $label := regexReplaceAll "[^a-z0-9-]+" (lower $whole) "-" -}}
{{- if not (regexMatch "^[a-z]" $label) }}{{ $label = printf "clerk-sync-%s" $label }}{{ end -}}
{{- if and (eq $label $whole) (le (len $label) 42) (not (hasSuffix "-internal" $label)) (not (hasSuffix "-" $label)) -}}
{{- $label -}}
{{- else -}}
{{- printf "%s-%s" ($label | trunc 33 | trimAll "-") (printf "%s/%s" .Release.Name $name | sha256sum | trunc 8) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "clerk-sync.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace -}}
{{- end -}}

{{/* What selects the chart's own pods and Services, and so never changes in a release's life. */}}
{{- define "clerk-sync.selectorLabels" -}}
clerk-sync.dev/instance: {{ include "clerk-sync.fullname" . | quote }}
{{- end -}}

{{/* Labels for people and tools. Argo CD may overwrite `instance`, so nothing selects by it. */}}
{{- define "clerk-sync.labels" -}}
{{ include "clerk-sync.selectorLabels" . }}
app.kubernetes.io/name: {{ .Values.nameOverride | default "clerk-sync" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: clerk-sync
{{- end -}}

{{/*
The content of an object's `metadata`. Takes a dict: root, and perhaps name (the suffix),
component, labels, annotations, namespace.
*/}}
{{- define "clerk-sync.metadata" -}}
{{- $root := .root -}}
{{- $own := include "clerk-sync.namespace" $root -}}
{{- $namespace := .namespace | default $own -}}
{{- $name := list (include "clerk-sync.fullname" $root) .name | compact | join "-" -}}
{{- /* In another namespace, such as Prometheus', objects of releases from several namespaces could clash. */ -}}
name: {{ eq $namespace $own | ternary $name (printf "%s.%s" $name $own) | quote }}
namespace: {{ $namespace | quote }}
{{ include "clerk-sync.metadata.labels" . }}
{{- end -}}

{{/* The same without name and namespace. */}}
{{- define "clerk-sync.metadata.labels" -}}
{{- $root := .root -}}
{{- $labels := include "clerk-sync.labels" $root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $_ := set $labels "helm.sh/chart" (printf "clerk-sync-%s" ($root.Chart.Version | replace "+" "_")) -}}
{{- with .component }}{{ $_ := set $labels "app.kubernetes.io/component" . }}{{ end -}}
labels:
  {{- merge $labels (.labels | default dict) $root.Values.commonLabels | toYaml | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The labels that select the app's pods in sidecar mode. */}}
{{- define "clerk-sync.sidecar.podLabels" -}}
{{- include "clerk-sync.values" . -}}
{{- with .Values.sidecar.podLabels -}}
{{ toYaml . }}
{{- else -}}
clerk-sync.dev/sidecar: {{ include "clerk-sync.fullname" . | quote }}
{{- end -}}
{{- end -}}

{{/* The labels of the pods that answer webhooks: the chart's, or the app's. */}}
{{- define "clerk-sync.webhookPods" -}}
{{- if eq .Values.mode "sidecar" -}}
{{ include "clerk-sync.sidecar.podLabels" . }}
{{- else -}}
{{ include "clerk-sync.selectorLabels" . }}
app.kubernetes.io/component: webhook
{{- end -}}
{{- end -}}

{{- define "clerk-sync.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "clerk-sync.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/*
Not empty if the release's service account exists before the hooks run: on an upgrade, unless that upgrade
creates it. Always empty in `helm template`, which asks no cluster.
*/}}
{{- define "clerk-sync.accountIsThere" -}}
{{- if lookup "v1" "ServiceAccount" (include "clerk-sync.namespace" .) (include "clerk-sync.serviceAccountName" .) }}true{{ end -}}
{{- end -}}

{{/* The migration's service account: as a hook, it runs before the release's own account exists. */}}
{{- define "clerk-sync.migrationAccountName" -}}
{{- if .Values.migrations.serviceAccountName -}}
{{- .Values.migrations.serviceAccountName -}}
{{- else if or (not .Values.serviceAccount.create) (not .Values.hooks.enabled) (include "clerk-sync.accountIsThere" .) -}}
{{- include "clerk-sync.serviceAccountName" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "clerk-sync.image" -}}
{{- $image := .Values.image -}}
{{- $repository := $image.repository -}}
{{- with .Values.global.imageRegistry -}}
  {{- /* The first part is a registry's name only with a dot, a port, or as `localhost`. */ -}}
  {{- $path := regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "" -}}
  {{- $repository = printf "%s/%s" (trimSuffix "/" .) $path -}}
{{- end -}}
{{- printf "%s:%s" $repository ($image.tag | default .Chart.AppVersion) -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{/* The pull secrets of the release and of a parent chart, without duplicates, as a YAML list. */}}
{{- define "clerk-sync.imagePullSecrets" -}}
{{- $secrets := .Values.imagePullSecrets -}}
{{- range .Values.global.imagePullSecrets -}}
  {{- $secrets = append $secrets (kindIs "map" . | ternary . (dict "name" .)) -}}
{{- end -}}
{{ $secrets | uniq | toYaml }}
{{- end -}}

{{- define "clerk-sync.webhookPort" -}}
{{- .Values.listen.webhookPort | default (eq .Values.mode "sidecar" | ternary 18080 8080) | int -}}
{{- end -}}

{{/* The webhook's path without and with a trailing slash, as a YAML list. */}}
{{- define "clerk-sync.paths" -}}
{{- $path := trimSuffix "/" .Values.listen.path -}}
{{ list $path (print $path "/") | compact | toYaml }}
{{- end -}}

{{- define "clerk-sync.internalPort" -}}
{{- .Values.listen.internalPort | default (eq .Values.mode "sidecar" | ternary 18081 8081) | int -}}
{{- end -}}

{{/* The URL that Clerk sends to, from the first host. Empty if the chart publishes none. */}}
{{- define "clerk-sync.publicUrl" -}}
{{- if .Values.ingress.enabled -}}
https://{{ first .Values.ingress.hosts }}{{ .Values.listen.path }}
{{- else if .Values.httpRoute.enabled -}}
https://{{ first .Values.httpRoute.hostnames }}{{ .Values.listen.path }}
{{- end -}}
{{- end -}}

{{/* Who reconciles: cronJob, inProcess or off. */}}
{{- define "clerk-sync.reconcile" -}}
{{- /* YAML reads a bare `off` as false. */ -}}
{{- if kindIs "bool" .Values.reconcile.mode -}}
off
{{- else if .Values.reconcile.mode -}}
{{- .Values.reconcile.mode -}}
{{- else if not (include "clerk-sync.given" (dict "root" . "secret" "key")) -}}
off
{{- else -}}
{{- eq .Values.mode "sidecar" | ternary "cronJob" "inProcess" -}}
{{- end -}}
{{- end -}}

{{/* ServiceMonitor, PodMonitor or empty. */}}
{{- define "clerk-sync.monitor" -}}
{{- $kind := .Values.monitor.kind | default (eq .Values.mode "sidecar" | ternary "PodMonitor" "ServiceMonitor") -}}
{{- $known := .Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" $kind) -}}
{{- if and .Values.monitor.enabled (or $known (ne .Values.monitor.renderMode "skipIfMissing")) -}}
{{- $kind -}}
{{- end -}}
{{- end -}}

{{/* The release's `job` in Prometheus. It distinguishes two releases in one namespace. */}}
{{- define "clerk-sync.job" -}}
{{- include "clerk-sync.fullname" . -}}
{{- end -}}

{{/* Whether the PrometheusRule is made. */}}
{{- define "clerk-sync.alerts" -}}
{{- $known := .Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PrometheusRule" -}}
{{- if and .Values.alerts.enabled (or $known (ne .Values.alerts.renderMode "skipIfMissing")) -}}true{{- end -}}
{{- end -}}

{{/* Whether there is a test pod: it is a hook, and without hooks it would run at once. */}}
{{- define "clerk-sync.tested" -}}
{{- if and .Values.tests.enabled .Values.hooks.enabled -}}true{{- end -}}
{{- end -}}

{{- define "clerk-sync.atLeastTwoPods" -}}
{{- $scaling := .Values.autoscaling -}}
{{- if eq $scaling.type "external" -}}true
{{- else if ne $scaling.type "none" -}}{{ if gt (int $scaling.maxReplicas) 1 }}true{{ end }}
{{- else -}}{{ if gt (int .Values.replicas) 1 }}true{{ end }}
{{- end -}}
{{- end -}}

{{/* Svix's address ranges and the extra ones, as a YAML list. */}}
{{- define "clerk-sync.allowedRanges" -}}
{{- $svix := .Files.Get "files/svix-source-ranges.yaml" | fromYaml -}}
{{- $ranges := list -}}
{{- range $svix.ranges -}}
  {{- if or $.Values.allowList.ipv6 (not (contains ":" .)) }}{{ $ranges = append $ranges . }}{{ end -}}
{{- end -}}
{{ concat $ranges .Values.allowList.extraRanges | toYaml }}
{{- end -}}
