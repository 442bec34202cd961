{{/* A Secret with the plain-text entries of the values. Takes a dict: root, name, entries, annotations. */}}
{{- define "clerk-sync.madeSecret" -}}
{{- $data := dict -}}
{{- range .entries -}}
  {{- if .value }}{{ $_ := set $data .key (b64enc .value) }}{{ end -}}
{{- end -}}
{{- if $data }}
---
apiVersion: v1
kind: Secret
metadata:
  {{- include "clerk-sync.metadata" . | nindent 2 }}
type: Opaque
data:
  {{- toYaml $data | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "clerk-sync.externalSecrets.apiVersion" -}}
{{- $newest := .Capabilities.APIVersions.Has "external-secrets.io/v1/ExternalSecret" -}}
{{- $older := .Capabilities.APIVersions.Has "external-secrets.io/v1beta1/ExternalSecret" -}}
{{- .Values.externalSecrets.apiVersion | default (printf "external-secrets.io/%s" (and $older (not $newest) | ternary "v1beta1" "v1")) -}}
{{- end -}}

{{/* An ExternalSecret for the entries that the operator fetches. Takes the same. */}}
{{- define "clerk-sync.externalSecret" -}}
{{- $data := list -}}
{{- range .entries -}}
  {{- if .remote }}{{ $data = append $data (dict "secretKey" .key "remoteRef" .remote) }}{{ end -}}
{{- end -}}
{{- if $data }}
---
apiVersion: {{ include "clerk-sync.externalSecrets.apiVersion" .root }}
kind: ExternalSecret
metadata:
  {{- include "clerk-sync.metadata" . | nindent 2 }}
spec:
  refreshInterval: {{ .root.Values.externalSecrets.refreshInterval }}
  secretStoreRef:
    kind: {{ .root.Values.externalSecrets.store.kind }}
    name: {{ .root.Values.externalSecrets.store.name | quote }}
  target:
    name: {{ include "clerk-sync.fullname" .root }}-{{ .name }}
    creationPolicy: Owner
  data:
    {{- toYaml $data | nindent 4 }}
{{- end }}
{{- end -}}
