{{/*
Replaces missing and null values by their defaults. They occur when everything below a key is commented out,
and with `--reuse-values`, which has only the previous chart's keys. Every template begins with this, so none
needs defaults of its own.
*/}}
{{- define "clerk-sync.values" -}}
{{- if not (hasKey . "clerkSyncValues") -}}
  {{- $_ := set . "clerkSyncValues" true -}}
  {{- include "clerk-sync.filled" (dict "values" .Values "defaults" (.Files.Get "files/defaults.yaml" | fromYaml)) -}}
{{- end -}}
{{- end -}}

{{/*
Completes a map of values in place. Takes a dict: values, defaults. In the defaults, a list wraps the default
of one value. A map that users fill counts as one value.
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
