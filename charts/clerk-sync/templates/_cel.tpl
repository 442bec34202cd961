{{/*
A value as a CEL literal of the type that the API server expects, over several lines. Takes a dict:
value, type (such as Object.spec.volumes), indent.

Its CEL wants lists and maps of one kind of value, so objects are written as typed ones. Maps from
string to string are the exception: their keys, such as ephemeral-storage, may be no identifiers.
*/}}
{{- define "clerk-sync.cel" -}}
{{- $deeper := printf "%s  " .indent -}}
{{- $maps := list "limits" "requests" "labels" "annotations" "matchLabels" "volumeAttributes" "options" -}}
{{- $parts := list -}}
{{- if kindIs "map" .value -}}
  {{- $plain := has (splitList "." .type | last) $maps -}}
  {{- range $key, $value := .value -}}
    {{- if not (kindIs "invalid" $value) -}}
      {{- if $plain -}}
        {{- $parts = append $parts (printf "%s: %s" (toJson $key) (toString $value | toJson)) -}}
      {{- else -}}
        {{- $parts = append $parts (printf "%s: %s" $key (include "clerk-sync.cel" (dict "value" $value "type" (printf "%s.%s" $.type $key) "indent" $deeper))) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{ $plain | ternary "" .type }}{
{{ $deeper }}{{ join (printf ",\n%s" $deeper) $parts }}
{{ .indent }}}
{{- else if kindIs "slice" .value -}}
  {{- $type := .type -}}
  {{- range .value -}}
    {{- $parts = append $parts (include "clerk-sync.cel" (dict "value" . "type" $type "indent" $deeper)) -}}
  {{- end -}}
  {{- if and .value (kindIs "map" (first .value)) -}}
[
{{ $deeper }}{{ join (printf ",\n%s" $deeper) $parts }}
{{ .indent }}]
  {{- else -}}
[{{ join ", " $parts }}]
  {{- end -}}
{{- else if kindIs "string" .value -}}
{{ toJson .value }}
{{- else if kindIs "bool" .value -}}
{{ .value }}
{{- else -}}
{{ int64 .value }}
{{- end -}}
{{- end -}}
