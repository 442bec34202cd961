{{/*
Settings: variables, secrets and their files. A container gets only those that it needs:
`needs` is a list of `database`, `signing`, `key`, `app`, `mapping`, `no-token`.

A secret is an entry of this list:

  of: database | signing | key | app
  env: DATABASE_PASSWORD        its variable; with _FILE behind it, that of its file
  file: database-password       its key in a Secret that the chart makes
  and one of
    secret: NAME, key: KEY      in a Secret: `found` if it is not the chart's
    path: /vault/secrets/…      in a file that something else mounts

`before` is true for hooks, which run before the release's objects exist. They use copies of the Secrets
and ConfigMaps that the chart creates: see migrate.yaml. `migrating` is true for the migration.

`once` is true for a Job that somebody waits for. If a Secret or ConfigMap is missing, Kubernetes would keep
its pod waiting and delete it at the deadline, without a log. So these are optional there, and the process
says which file is missing: the path contains the Secret's name.
*/}}

{{- define "clerk-sync.directory" -}}/etc/clerk-sync{{- end -}}

{{/* The directory of the service account's token. In a sidecar, that is the app's account. */}}
{{- define "clerk-sync.tokenDirectory" -}}/var/run/secrets/kubernetes.io/serviceaccount{{- end -}}

{{/* The sources that are set for a secret (existingSecret, externalSecret, file, value), as a YAML list. */}}
{{- define "clerk-sync.sources" -}}
{{- $found := list -}}
{{- if eq .secret "database" -}}
  {{- $database := .root.Values.database -}}
  {{- if $database.existingSecret }}{{ $found = append $found "existingSecret" }}{{ end -}}
  {{- if $database.externalSecret }}{{ $found = append $found "externalSecret" }}{{ end -}}
  {{- if $database.files }}{{ $found = append $found "files" }}{{ end -}}
  {{- if $database.url }}{{ $found = append $found "url" }}{{ end -}}
  {{- if $database.password }}{{ $found = append $found "password" }}{{ end -}}
{{- else -}}
  {{- $values := .root.Values -}}
  {{- $source := index (dict "signing" $values.clerk.signingSecret "key" $values.clerk.secretKey "app" $values.appToken) .secret -}}
  {{- range list "existingSecret" "externalSecret" "file" "value" -}}
    {{- if index $source . }}{{ $found = append $found . }}{{ end -}}
  {{- end -}}
{{- end -}}
{{ toYaml $found }}
{{- end -}}

{{/* Not empty if the secret has a source. */}}
{{- define "clerk-sync.given" -}}
{{- if include "clerk-sync.sources" . | fromYamlArray }}true{{ end -}}
{{- end -}}

{{- define "clerk-sync.pieces" -}}["host", "port", "name", "username", "password"]{{- end -}}

{{/* The parts of the database's URL that come from a secret: `url`, or some of the others. */}}
{{- define "clerk-sync.databasePieces" -}}
{{- $database := .Values.database -}}
{{- $pieces := list -}}
{{- if $database.existingSecret -}}
  {{- range include "clerk-sync.pieces" . | fromJsonArray -}}
    {{- if index $database.keys . }}{{ $pieces = append $pieces . }}{{ end -}}
  {{- end -}}
  {{- if or $database.keys.url (not $pieces) }}{{ $pieces = prepend $pieces "url" }}{{ end -}}
{{- else if $database.externalSecret -}}
  {{- $pieces = keys $database.externalSecret | sortAlpha -}}
{{- else if $database.files -}}
  {{- $pieces = keys $database.files | sortAlpha -}}
{{- else if $database.url -}}
  {{- $pieces = list "url" -}}
{{- else if $database.password -}}
  {{- $pieces = list "password" -}}
{{- end -}}
{{ toYaml $pieces }}
{{- end -}}

{{- define "clerk-sync.secrets" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $full := include "clerk-sync.fullname" $root -}}
{{- $before := .before | default false -}}
{{- $made := $before | ternary (printf "%s-migrate" $full) (printf "%s-inline" $full) -}}
{{- $fetched := $before | ternary (printf "%s-migrate" $full) (printf "%s-external" $full) -}}
{{- $entries := list -}}
{{- if has "database" .needs -}}
  {{- $database := $values.database -}}
  {{- $existing := $database.existingSecret -}}
  {{- if .migrating }}{{ $existing = $values.migrations.existingSecret | default $existing }}{{ end -}}
  {{- range $piece := include "clerk-sync.databasePieces" $root | fromYamlArray -}}
    {{- $entry := dict "of" "database" "env" (printf "DATABASE_%s" (upper $piece)) "file" (printf "database-%s" $piece) -}}
    {{- if $existing -}}
      {{- $key := index $database.keys $piece | default "url" -}}
      {{- $entries = append $entries (merge $entry (dict "secret" $existing "key" $key "found" true)) -}}
    {{- else if $database.externalSecret -}}
      {{- $entries = append $entries (merge $entry (dict "secret" $fetched "key" $entry.file "remote" (index $database.externalSecret $piece))) -}}
    {{- else if $database.files -}}
      {{- $entries = append $entries (merge $entry (dict "path" (index $database.files $piece))) -}}
    {{- else -}}
      {{- $entries = append $entries (merge $entry (dict "secret" $made "key" $entry.file "value" (index $database $piece))) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- /* The app's token has its own Secret, so that the app can read it without reading the others. */ -}}
{{- $others := list
  (dict "of" "signing" "env" "CLERK_WEBHOOK_SIGNING_SECRET" "file" "signing-secret" "source" $values.clerk.signingSecret)
  (dict "of" "key" "env" "CLERK_SECRET_KEY" "file" "secret-key" "source" $values.clerk.secretKey)
  (dict "of" "app" "env" "CLERK_SYNC_APP_TOKEN" "file" "app-token" "source" $values.appToken "own" (printf "%s-app-token" $full)) -}}
{{- $needs := .needs -}}
{{- range $others -}}
  {{- $entry := pick . "of" "env" "file" -}}
  {{- if not (has .of $needs) -}}
  {{- else if .source.existingSecret -}}
    {{- $entries = append $entries (merge $entry (dict "secret" .source.existingSecret "key" .source.key "found" true)) -}}
  {{- else if .source.externalSecret -}}
    {{- $entries = append $entries (merge $entry (dict "secret" (.own | default $fetched) "key" .file "remote" .source.externalSecret)) -}}
  {{- else if .source.file -}}
    {{- $entries = append $entries (merge $entry (dict "path" .source.file)) -}}
  {{- else if .source.value -}}
    {{- $entries = append $entries (merge $entry (dict "secret" (.own | default $made) "key" .file "value" .source.value)) -}}
  {{- end -}}
{{- end -}}
{{ toYaml $entries }}
{{- end -}}

{{/*
Variables of a container, as a YAML list in the order of their names: each once. Takes a dict: root,
needs, before, and perhaps settings (a dict of more) and own, as clerk-sync.pod.metadata does.
*/}}
{{- define "clerk-sync.env" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $directory := include "clerk-sync.directory" $root -}}
{{- $env := dict "LOG_LEVEL" $values.log.level "LOG_FORMAT" $values.log.format -}}
{{- if has "database" .needs -}}
  {{- with $values.database.host }}{{ $_ := set $env "DATABASE_HOST" . }}{{ end -}}
  {{- with $values.database.port }}{{ $_ := set $env "DATABASE_PORT" (toString (int .)) }}{{ end -}}
  {{- with $values.database.name }}{{ $_ := set $env "DATABASE_NAME" . }}{{ end -}}
  {{- with $values.database.username }}{{ $_ := set $env "DATABASE_USERNAME" . }}{{ end -}}
  {{- with $values.database.tls.mode }}{{ $_ := set $env "DATABASE_TLS" . }}{{ end -}}
  {{- if or $values.database.tls.ca.existingSecret $values.database.tls.ca.existingConfigMap -}}
    {{- $_ := set $env "DATABASE_TLS_CA" (printf "%s/database-ca/ca.crt" $directory) -}}
  {{- end -}}
{{- end -}}
{{- if has "mapping" .needs -}}
  {{- if or $values.config.mapping $values.config.existingConfigMap.name -}}
    {{- $_ := set $env "CLERK_SYNC_CONFIG" (printf "%s/mapping/mapping.yaml" $directory) -}}
  {{- else -}}
    {{- $_ := set $env "CLERK_SYNC_CONFIG" ($values.config.preset | default "mirror") -}}
  {{- end -}}
{{- end -}}
{{- if has "key" .needs -}}
  {{- with $values.clerk.apiUrl }}{{ $_ := set $env "CLERK_API_URL" . }}{{ end -}}
  {{- with $values.reconcile.clerkShare }}{{ $_ := set $env "CLERK_SYNC_CLERK_SHARE" (toString .) }}{{ end -}}
  {{- if not (kindIs "invalid" $values.reconcile.breakerPercent) -}}
    {{- $_ := set $env "CLERK_SYNC_BREAKER_PERCENT" (toString $values.reconcile.breakerPercent) -}}
  {{- end -}}
{{- end -}}
{{- if has "signing" .needs -}}
  {{- with $values.clerk.instanceId }}{{ $_ := set $env "CLERK_INSTANCE_ID" . }}{{ end -}}
{{- end -}}
{{- $env = merge $env (.settings | default dict) -}}
{{- range $name, $value := $env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- range include "clerk-sync.secrets" . | fromYamlArray }}
{{- if .path }}
- name: {{ .env }}_FILE
  value: {{ .path | quote }}
{{- else if eq $values.secretsAs "file" }}
- name: {{ .env }}_FILE
  value: {{ $directory }}/secrets/{{ .secret }}/{{ .key }}
{{- else }}
- name: {{ .env }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret | quote }}
      key: {{ .key | quote }}
{{- end }}
{{- end }}
{{- $own := .own | default dict }}
{{- range $name, $value := merge (dict) ($own.extraEnv | default dict) $values.extraEnv }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  valueFrom:
    {{- toYaml $value | nindent 4 }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The mounts of a container, as a YAML list; takes what clerk-sync.env takes. */}}
{{- define "clerk-sync.volumeMounts" -}}
{{- $directory := include "clerk-sync.directory" .root -}}
{{- range include "clerk-sync.ownVolumes" . | fromYamlArray }}
- name: {{ .name }}
  mountPath: {{ eq .name "clerk-sync-no-token" | ternary (include "clerk-sync.tokenDirectory" $) (printf "%s/%s" $directory (trimPrefix "clerk-sync-" .name)) }}
  readOnly: true
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The volumes of a pod, as a YAML list; takes what clerk-sync.env takes. */}}
{{- define "clerk-sync.volumes" -}}
{{ include "clerk-sync.ownVolumes" . }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Files are projected without subPath, because the kubelet updates only such files in a running container.
Everyone may read them (292 is 0444), because a sidecar cannot set the group of its pod's volumes. Only
clerk-sync's container mounts them.
*/}}
{{- define "clerk-sync.ownVolumes" -}}
{{- $values := .root.Values -}}
{{- $mounted := list -}}
{{- if eq $values.secretsAs "file" -}}
  {{- range include "clerk-sync.secrets" . | fromYamlArray -}}
    {{- if .secret }}{{ $mounted = append $mounted . }}{{ end -}}
  {{- end -}}
{{- end -}}
{{- $names := list }}
{{- $found := list }}
{{- range $mounted }}
{{- $names = append $names .secret | uniq }}
{{- if .found }}{{ $found = append $found .secret }}{{ end }}
{{- end }}
{{- with $names }}
- name: clerk-sync-secrets
  projected:
    defaultMode: 292
    sources:
      {{- range $secret := . }}
      - secret:
          name: {{ $secret | quote }}
          {{- if and $.once (has $secret $found) }}
          optional: true
          {{- end }}
          items:
            {{- $keys := list }}
            {{- range $mounted }}
            {{- if eq .secret $secret }}{{ $keys = append $keys .key | uniq }}{{ end }}
            {{- end }}
            {{- range $keys }}
            - key: {{ . | quote }}
              path: {{ printf "%s/%s" $secret . | quote }}
            {{- end }}
      {{- end }}
{{- end }}
{{- if has "database" .needs }}
{{- $ca := $values.database.tls.ca }}
{{- if or $ca.existingSecret $ca.existingConfigMap }}
- name: clerk-sync-database-ca
  projected:
    defaultMode: 292
    sources:
      - {{ empty $ca.existingSecret | ternary "configMap" "secret" }}:
          name: {{ $ca.existingSecret | default $ca.existingConfigMap | quote }}
          {{- if .once }}
          optional: true
          {{- end }}
          items:
            - key: {{ $ca.key | quote }}
              path: ca.crt
{{- end }}
{{- end }}
{{- if has "mapping" .needs }}
{{- $existing := $values.config.existingConfigMap }}
{{- if or $values.config.mapping $existing.name }}
- name: clerk-sync-mapping
  configMap:
    defaultMode: 292
    name: {{ $existing.name | default (printf "%s-%s" (include "clerk-sync.fullname" .root) (.before | default false | ternary "migrate" "mapping")) | quote }}
    {{- if and .once $existing.name }}
    optional: true
    {{- end }}
    items:
      - key: {{ empty $existing.name | ternary "mapping.yaml" $existing.key | quote }}
        path: mapping.yaml
{{- end }}
{{- end }}
{{- if has "no-token" .needs }}
{{- /* A mount at the token's path keeps Kubernetes from mounting the token there. */}}
- name: clerk-sync-no-token
  emptyDir:
    sizeLimit: 1Mi
{{- end }}
{{- end -}}

{{/*
A hash of the plain-text secrets in the values, empty if there are none. Anyone may read the annotation, so
it uses scrypt, which makes guessing a password slow. Takes what clerk-sync.secrets takes.
*/}}
{{- define "clerk-sync.secretsChecksum" -}}
{{- $written := list -}}
{{- range include "clerk-sync.secrets" . | fromYamlArray -}}
  {{- if .value }}{{ $written = append $written (printf "%s=%s" .env .value) }}{{ end -}}
{{- end -}}
{{- if $written -}}
{{ derivePassword 1 "maximum" (join "\n" $written) (include "clerk-sync.fullname" .root) (include "clerk-sync.namespace" .root) | sha256sum | trunc 16 | quote }}
{{- end -}}
{{- end -}}

{{/* The text of the mapping that the chart holds. */}}
{{- define "clerk-sync.mapping" -}}
{{- $mapping := .Values.config.mapping -}}
{{- kindIs "string" $mapping | ternary $mapping (toYaml $mapping) -}}
{{- end -}}

{{/*
The mapping as a ConfigMap's data. Quoted, because a file's first line may be indented, and because YAML has
line breaks that `indent` does not handle: text after one would become part of the manifest.
*/}}
{{- define "clerk-sync.mapping.data" -}}
{{- $text := include "clerk-sync.mapping" . -}}
{{- if regexMatch "[\\x{85}\\x{2028}\\x{2029}]" $text -}}
mapping.yaml: {{ quote $text }}
{{- else -}}
{{ dict "mapping.yaml" $text | toYaml }}
{{- end -}}
{{- end -}}
