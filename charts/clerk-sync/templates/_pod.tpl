{{/* Annotations of hooks that are created before the rest of the release and deleted on success. */}}
{{- define "clerk-sync.hook.before" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/*
The pod `template` of the chart's own workloads. Takes a dict: root, component, annotations,
serviceAccountName, and perhaps own: the part of the values that is for these pods alone.
*/}}
{{- define "clerk-sync.pod.metadata" -}}
{{- $values := .root.Values -}}
{{- $own := .own | default dict -}}
metadata:
  labels:
    {{- $labels := include "clerk-sync.labels" .root | fromYaml }}
    {{- $_ := set $labels "app.kubernetes.io/component" .component }}
    {{- merge $labels ($own.podLabels | default dict) $values.podLabels $values.commonLabels | toYaml | nindent 4 }}
  {{- with merge (dict) (.annotations | default dict) ($own.podAnnotations | default dict) $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "clerk-sync.pod.spec" -}}
{{- $values := .root.Values -}}
{{- $own := .own | default dict -}}
serviceAccountName: {{ .serviceAccountName | quote }}
automountServiceAccountToken: {{ $values.serviceAccount.automount }}
enableServiceLinks: false
{{- with include "clerk-sync.imagePullSecrets" .root | fromYamlArray }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $context := $values.podSecurityContext }}
{{- if include "clerk-sync.onOpenshift" .root }}{{ $context = omit $context "runAsUser" "runAsGroup" "fsGroup" }}{{ end }}
{{- with $context }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if not (kindIs "invalid" $values.hostUsers) }}
hostUsers: {{ $values.hostUsers }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $values.schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- with $values.dnsPolicy }}
dnsPolicy: {{ . | quote }}
{{- end }}
{{- with $values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.nodeSelector | default $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations | default $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The given constraints, or the default ones. A missing selector is filled in. */}}
{{- define "clerk-sync.topologySpreadConstraints" -}}
{{- $selector := dict "matchLabels" (include "clerk-sync.webhookPods" . | fromYaml) -}}
{{- $given := .Values.topologySpreadConstraints -}}
{{- $constraints := list -}}
{{- if kindIs "invalid" $given -}}
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" -}}
    {{- /* Per revision, so that a rollout spreads the new pods without counting the old ones. */ -}}
    {{- $constraints = append $constraints (dict "maxSkew" 1 "topologyKey" . "whenUnsatisfiable" "ScheduleAnyway" "matchLabelKeys" (list "pod-template-hash") "labelSelector" $selector) -}}
  {{- end -}}
{{- else -}}
  {{- range $given }}{{ $constraints = append $constraints (merge (dict) . (dict "labelSelector" $selector)) }}{{ end -}}
{{- end -}}
{{- with $constraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
