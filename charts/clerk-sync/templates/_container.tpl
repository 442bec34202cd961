{{/*
clerk-sync's only container: the Deployment has it, a parent chart includes it as `clerk-sync.sidecar`,
and injection.yaml turns it into CEL.
*/}}

{{- define "clerk-sync.serving" -}}
{{- $needs := list "database" "signing" "key" "app" "mapping" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- if and $sidecar (not .Values.serviceAccount.automount) }}{{ $needs = append $needs "no-token" }}{{ end -}}
{{- $limits := .Values.limits -}}
{{- $settings := dict
  "CLERK_SYNC_PORT" (include "clerk-sync.webhookPort" .)
  "CLERK_SYNC_INTERNAL_PORT" (include "clerk-sync.internalPort" .)
  "CLERK_SYNC_WEBHOOK_PATH" .Values.listen.path -}}
{{- with .Values.listen.host }}{{ $_ := set $settings "CLERK_SYNC_HOST" . }}{{ end -}}
{{- /* In a sidecar, the app's replicas multiply the connections. */ -}}
{{- $own := dict
  "CLERK_SYNC_WRITERS" ($limits.writers | default ($sidecar | ternary 1 nil))
  "CLERK_SYNC_POOL_SIZE" ($limits.poolSize | default ($sidecar | ternary 2 nil))
  "CLERK_SYNC_BATCH_LIMIT" $limits.batch
  "CLERK_SYNC_QUEUE_LIMIT" $limits.queue
  "CLERK_SYNC_DEADLINE_SECONDS" $limits.deadlineSeconds
  "CLERK_SYNC_LEDGER_DAYS" $limits.ledgerDays
  "CLERK_SYNC_QUARANTINE_DAYS" $limits.quarantineDays -}}
{{- range $name, $value := $own -}}
  {{- /* A whole number from YAML is a float here, and a million would be 1e+06. */ -}}
  {{- with $value }}{{ $_ := set $settings $name (eq (floor .) (float64 .) | ternary (int64 .) . | toString) }}{{ end -}}
{{- end -}}
{{- if eq (include "clerk-sync.reconcile" .) "inProcess" -}}
  {{- $_ := set $settings "CLERK_SYNC_RECONCILE_INTERVAL" .Values.reconcile.interval -}}
{{- end -}}
{{ dict "needs" $needs "settings" $settings "before" false | toYaml }}
{{- end -}}

{{- define "clerk-sync.container" -}}
{{- $serving := include "clerk-sync.serving" . | fromYaml -}}
{{- $takes := merge (dict "root" .) $serving -}}
{{- $probes := .Values.probes -}}
{{- $internal := include "clerk-sync.internalPort" . | int -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
{{- include "clerk-sync.image.fields" (dict "root" . "name" "clerk-sync") }}
command: ["clerk-sync", "serve"]
{{- if $sidecar }}
restartPolicy: Always
{{- end }}
ports:
  - name: clerk-webhook
    containerPort: {{ include "clerk-sync.webhookPort" . }}
    protocol: TCP
  - name: clerk-internal
    containerPort: {{ $internal }}
    protocol: TCP
env:
  {{- include "clerk-sync.env" $takes | trim | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $probes.startup }}
startupProbe:
  httpGet:
    path: /livez
    port: {{ $internal }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $probes.liveness }}
livenessProbe:
  httpGet:
    path: /livez
    port: {{ $internal }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if not $sidecar }}
{{- with $probes.readiness }}
readinessProbe:
  httpGet:
    path: /readyz
    port: {{ $internal }}
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with int .Values.preStopSleepSeconds }}
lifecycle:
  preStop:
    {{- /* The handler `sleep` is on by default since 1.30. */}}
    {{- if semverCompare ">=1.30.0-0" $.Capabilities.KubeVersion.Version }}
    sleep:
      seconds: {{ . }}
    {{- else }}
    exec:
      command: ["sleep", "{{ . }}"]
    {{- end }}
{{- end }}
{{- end }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "clerk-sync.volumeMounts" $takes | trim }}
volumeMounts:
  {{- . | nindent 2 }}
{{- end }}
{{- include "clerk-sync.securityContext.field" . }}
{{- end -}}

{{/* A container's name and image. Takes a dict: root, name. */}}
{{- define "clerk-sync.image.fields" -}}
name: {{ .name }}
image: {{ include "clerk-sync.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end -}}

{{/* A container that runs one command and ends. Takes what clerk-sync.env takes, plus name and command. */}}
{{- define "clerk-sync.command" -}}
{{- $values := .root.Values -}}
{{- $own := .own | default dict -}}
{{- include "clerk-sync.image.fields" . }}
command: {{ toJson .command }}
{{- /* Copies the last line of the log, which says what is wrong, into the pod's status. */}}
terminationMessagePolicy: FallbackToLogsOnError
env:
  {{- include "clerk-sync.env" . | trim | nindent 2 }}
{{- with $values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.resources | default $values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "clerk-sync.volumeMounts" . | trim }}
volumeMounts:
  {{- . | nindent 2 }}
{{- end }}
{{- include "clerk-sync.securityContext.field" .root }}
{{- end -}}

{{/* OpenShift gives every namespace its own range of users, and refuses those outside of it. */}}
{{- define "clerk-sync.onOpenshift" -}}
{{- $adapt := .Values.openshift.adaptSecurityContext -}}
{{- if or (eq $adapt "force") (and (eq $adapt "auto") (.Capabilities.APIVersions.Has "security.openshift.io/v1")) }}true{{ end -}}
{{- end -}}

{{- define "clerk-sync.securityContext.field" -}}
{{- $context := .Values.securityContext -}}
{{- if include "clerk-sync.onOpenshift" . }}{{ $context = omit $context "runAsUser" "runAsGroup" }}{{ end -}}
{{- with $context }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/*
What a parent chart includes. Its scope is this chart's: (index .Subcharts "clerk-sync").

  spec.template.metadata.labels       {{ include "clerk-sync.sidecar.podLabels" . }}
  spec.template.metadata.annotations  {{ include "clerk-sync.sidecar.podAnnotations" . }}
  spec.template.spec.initContainers   {{ include "clerk-sync.sidecar" . }}
  spec.template.spec.volumes          {{ include "clerk-sync.sidecar.volumes" . }}
*/}}
{{- define "clerk-sync.sidecar" -}}
{{- include "clerk-sync.values" . -}}
{{- include "clerk-sync.guards.included" . -}}
- {{ include "clerk-sync.container" . | indent 2 | trim }}
{{- end -}}

{{- define "clerk-sync.sidecar.volumes" -}}
{{- include "clerk-sync.values" . -}}
{{- include "clerk-sync.guards.included" . -}}
{{- include "clerk-sync.volumes" (merge (dict "root" .) (include "clerk-sync.serving" . | fromYaml)) | trim -}}
{{- end -}}

{{- define "clerk-sync.sidecar.podAnnotations" -}}
{{- include "clerk-sync.values" . -}}
{{- include "clerk-sync.checksums" (merge (dict "root" . "secrets" (eq .Values.secretsAs "env")) (include "clerk-sync.serving" . | fromYaml)) -}}
{{- end -}}

{{/*
Annotations that change with what a running pod does not reload: the mapping, and secrets in environment
variables. Takes what clerk-sync.secrets takes, and `secrets`: whether to include secrets.
*/}}
{{- define "clerk-sync.checksums" -}}
clerk-sync.dev/mapping: {{ include "clerk-sync.mappingChecksum" .root }}
{{- if .secrets }}
{{- with include "clerk-sync.secretsChecksum" . }}
clerk-sync.dev/secrets: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "clerk-sync.mappingChecksum" -}}
{{- if .Values.config.mapping -}}
{{ include "clerk-sync.mapping" . | sha256sum | trunc 16 | quote }}
{{- else -}}
{{ .Values.config.existingConfigMap.name | default .Values.config.preset | default "mirror" | quote }}
{{- end -}}
{{- end -}}
