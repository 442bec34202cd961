{{/*
A value that is missing or null is not given: it has its default. So it is where everything below a key
is commented out, and with `--reuse-values`, which knows only the keys of the chart that was there
before. Every template begins with this; what reads values then needs no defaults of its own.
*/}}
{{- define "clerk-sync.values" -}}
{{- if not (hasKey . "clerkSyncValues") -}}
  {{- $_ := set . "clerkSyncValues" true -}}
  {{- include "clerk-sync.filled" (dict "values" .Values "defaults" (.Files.Get "files/defaults.yaml" | fromYaml)) -}}
{{- end -}}
{{- end -}}

{{/*
Completes a map of values where it stands. Takes a dict: values, defaults. In those, a list holds the
default of one value, also of a map that users fill: there, only the map itself has a default.
*/}}
{{- define "clerk-sync.filled" -}}
{{- $values := .values -}}
{{- range $key, $given := $values -}}
  {{- if kindIs "invalid" $given }}{{ $_ := unset $values $key }}{{ end -}}
{{- end -}}
{{- range $key, $default := .defaults -}}
  {{- if kindIs "slice" $default -}}
    {{- if not (hasKey $values $key) }}{{ $_ := set $values $key (first $default) }}{{ end -}}
    {{- $default = dict -}}
  {{- else if not (hasKey $values $key) -}}
    {{- $_ := set $values $key dict -}}
  {{- end -}}
  {{- $given := get $values $key -}}
  {{- if kindIs "map" $given }}{{ include "clerk-sync.filled" (dict "values" $given "defaults" $default) }}{{ end -}}
{{- end -}}
{{- end -}}
