{{/* The port of a URL, or that of its scheme. Takes the URL. */}}
{{- define "clerk-sync.portOf" -}}
{{- $port := regexReplaceAll "^[^:/]+://(?:[^/?#]*@)?(?:\\[[^]]*\\]|[^:/?#]*)(?::([0-9]+))?(?:[/?#].*)?$" . "${1}" -}}
{{- if regexMatch "^[0-9]+$" $port -}}
{{- $port -}}
{{- else -}}
{{- hasPrefix "http" . | ternary (hasPrefix "https:" . | ternary 443 80) 3306 -}}
{{- end -}}
{{- end -}}

{{/* The variables that contain the URL of a trace collector or a proxy, as a YAML list. */}}
{{- define "clerk-sync.collectorVariables" -}}["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]{{- end -}}
{{- define "clerk-sync.proxyVariables" -}}["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"]{{- end -}}

{{/*
The ports that pods have to reach, as a YAML list. Takes a dict: root, and name, which is database, clerk,
collector or probe.
*/}}
{{- define "clerk-sync.portsTo" -}}
{{- $values := .root.Values -}}
{{- $env := $values.extraEnv -}}
{{- $egress := $values.networkPolicy.egress -}}
{{- $ports := list -}}
{{- if eq .name "database" -}}
  {{- $written := $values.database.url | empty | ternary "" (include "clerk-sync.portOf" $values.database.url) -}}
  {{- $ports = $egress.databasePorts | default (list ($values.database.port | default $written | default 3306)) -}}
{{- else if eq .name "clerk" -}}
  {{- $ports = list (include "clerk-sync.portOf" ($values.clerk.apiUrl | default "https://api.clerk.com")) -}}
{{- else if eq .name "collector" -}}
  {{- $ports = $egress.collectorPorts -}}
  {{- range include "clerk-sync.collectorVariables" . | fromJsonArray -}}
    {{- $endpoint := get $env . -}}
    {{- if and (not $egress.collectorPorts) $endpoint (kindIs "string" $endpoint) }}{{ $ports = append $ports (include "clerk-sync.portOf" $endpoint) }}{{ end -}}
  {{- end -}}
{{- else if eq .name "probe" -}}
  {{- $ports = $egress.probePorts -}}
  {{- if not $ports -}}
    {{- $ports = list (include "clerk-sync.portOf" ($values.probe.url | default (include "clerk-sync.publicUrl" .root))) -}}
    {{- range include "clerk-sync.proxyVariables" . | fromJsonArray -}}
      {{- $proxy := get $values.probe.extraEnv . | default (get $env .) -}}
      {{- if and $proxy (kindIs "string" $proxy) }}{{ $ports = append $ports (include "clerk-sync.portOf" $proxy) }}{{ end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $numbers := list -}}
{{- range $ports }}{{ $numbers = append $numbers (int .) | uniq }}{{ end -}}
{{ toYaml $numbers }}
{{- end -}}

{{/*
Rules of egress, as a YAML list. Ports are those of pods, as policies are applied behind Services. Takes a
dict: root, and to, a list of dns, database, clerk, collector, probe, webhook.
*/}}
{{- define "clerk-sync.egress" -}}
{{- $root := .root -}}
{{- $egress := $root.Values.networkPolicy.egress -}}
{{- range $name := .to }}
{{- if eq $name "dns" }}
{{- /* 5353: OpenShift's. */}}
- ports:
    {{- range list 53 5353 }}
    - {protocol: UDP, port: {{ . }}}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with $egress.dns }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if eq $name "webhook" }}
- ports:
    - {protocol: TCP, port: {{ include "clerk-sync.webhookPort" $root }}}
  to:
    - podSelector:
        matchLabels:
          {{- include "clerk-sync.webhookPods" $root | nindent 10 }}
{{- else }}
{{- with include "clerk-sync.portsTo" (dict "root" $root "name" $name) | fromYamlArray }}
- ports:
    {{- range . }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
  {{- with index $egress $name }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with $egress.extra }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
The policy of one kind of Job: on its own for a hook, otherwise in addition to the policy of all pods. No one
may connect to the Job. Takes a dict: root, name, component, to, annotations.
*/}}
{{- define "clerk-sync.networkPolicy" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if $policy.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "clerk-sync.metadata" (merge (dict "annotations" (merge (dict) (.annotations | default dict) $policy.annotations)) .) | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "clerk-sync.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
  {{- if $policy.egress.enabled }}
  policyTypes: [Ingress, Egress]
  egress:
    {{- include "clerk-sync.egress" . | trim | nindent 4 }}
  {{- else }}
  policyTypes: [Ingress]
  {{- end }}
{{- end }}
{{- end -}}
