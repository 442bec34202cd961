{{/*
`template` of what makes the chart's own pods. Takes a dict: root, component, labels, annotations,
serviceAccountName.
*/}}
{{- define "clerk-sync.pod.metadata" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- $labels := include "clerk-sync.labels" .root | fromYaml }}
    {{- $_ := set $labels "app.kubernetes.io/component" .component }}
    {{- merge $labels (.labels | default dict) $values.podLabels $values.commonLabels | toYaml | nindent 4 }}
  {{- with merge (dict) (.annotations | default dict) $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "clerk-sync.pod.spec" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ .serviceAccountName | quote }}
automountServiceAccountToken: {{ $values.serviceAccount.automount }}
enableServiceLinks: false
{{- with $values.imagePullSecrets }}
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
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where it is possible, or as it is given; each with the selector that it lacks. */}}
{{- define "clerk-sync.topologySpreadConstraints" -}}
{{- $selector := dict "matchLabels" (include "clerk-sync.webhookPods" . | fromYaml) -}}
{{- $given := .Values.topologySpreadConstraints -}}
{{- $constraints := list -}}
{{- if kindIs "invalid" $given -}}
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" -}}
    {{- /* By the revision, so that the pods of a new one are spread among themselves. */ -}}
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
