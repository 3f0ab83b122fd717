{{/* Who may read metrics, as ingress rules. */}}
{{- define "ambient.metricsIngress" -}}
{{- with .Values.networkPolicy }}
{{- if or .monitoringNamespace .metricsFrom }}
- from:
    {{- with .monitoringNamespace }}
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ . | quote }}
    {{- end }}
    {{- with .metricsFrom }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - {port: metrics, protocol: TCP}
{{- end }}
{{- end }}
{{- end }}
