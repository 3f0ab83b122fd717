{{/* The name of the control plane's objects. Fixed, as its Lease and keys are: one in a namespace. */}}
{{- define "ambient.name" -}}ambient-control-plane{{- end }}
{{- define "ambient.apiServerName" -}}ambient-api-server{{- end }}

{{- define "ambient.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "ambient.name" .) }}
{{- end }}

{{/* What the Service and the Deployment select by; never changes in an upgrade. */}}
{{- define "ambient.selector" -}}
app.kubernetes.io/name: {{ include "ambient.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of every object. */}}
{{- define "ambient.labels" -}}
app: {{ include "ambient.name" .root }}
{{ include "ambient.selector" . }}
app.kubernetes.io/part-of: ambient
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_") }}
{{- end }}

{{/* Labels and annotations of an object: root, component, and maybe labels, annotations. */}}
{{- define "ambient.metadata" -}}
labels:
  {{- include "ambient.labels" . | nindent 2 }}
  {{- with merge (dict) (.labels | default dict) .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The reference of an image: root, image (its values), at (where these are). */}}
{{- define "ambient.image" -}}
{{- $registry := .root.Values.global.imageRegistry | default .image.registry }}
{{- $name := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") }}
{{- if not (contains "/" $name) }}
{{- fail (printf "%s.registry is empty, and global.imageRegistry too: say where your images are, such as registry.example/ambient" .at) }}
{{- end }}
{{- if .image.digest }}
{{- printf "%s@%s" $name .image.digest }}
{{- else }}
{{- printf "%s:%s" $name (.image.tag | default .root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* A Secret by reference or value: root, secret (its values), name (of the one that is made). */}}
{{- define "ambient.secretName" -}}
{{- .secret.existingSecret | default (printf "%s-%s" (include "ambient.name" .root) .name) }}
{{- end }}
{{- define "ambient.isGiven" -}}
{{- if or .existingSecret .value }}true{{ end }}
{{- end }}
{{- define "ambient.secretRef" -}}
secretKeyRef:
  name: {{ include "ambient.secretName" . | quote }}
  key: {{ .secret.key | quote }}
{{- end }}

{{/* The tokens' URL without its path, as session pods reach it. */}}
{{- define "ambient.tokenBase" -}}
{{- printf "%s://%s.%s.svc:%d" (ternary "https" "http" .Values.tls.enabled) (include "ambient.name" .) .Release.Namespace (int .Values.service.port) }}
{{- end }}

{{- define "ambient.apiUrl" -}}
{{- if .Values.apiServer.enabled }}
{{- printf "http://%s.%s.svc:8000" (include "ambient.apiServerName" .) .Release.Namespace }}
{{- else }}
{{- .Values.api.url }}
{{- end }}
{{- end }}

{{- define "ambient.grpcAddress" -}}
{{- if .Values.apiServer.enabled }}
{{- printf "%s.%s.svc:8001" (include "ambient.apiServerName" .) .Release.Namespace }}
{{- else }}
{{- .Values.api.grpcAddress }}
{{- end }}
{{- end }}

{{/* Name of the Secret with the token port's certificate. */}}
{{- define "ambient.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "ambient.name" .)) }}
{{- end }}

{{/* Where the CA of the token port's certificate is, as a projected source; empty: nowhere. */}}
{{- define "ambient.tlsCa" -}}
{{- with .Values.tls }}
{{- if and .enabled (not .ca.public) }}
{{- if .ca.configMap }}
configMap: {name: {{ .ca.configMap | quote }}, items: [{key: {{ .ca.key | quote }}, path: ca.crt}]}
{{- else if .ca.secret }}
secret: {name: {{ .ca.secret | quote }}, items: [{key: {{ .ca.key | quote }}, path: ca.crt}]}
{{- else if .openshiftServiceCa }}
configMap: {name: openshift-service-ca.crt, items: [{key: service-ca.crt, path: ca.crt}]}
{{- else if .certManager.enabled }}
secret: {name: {{ include "ambient.tlsSecret" $ | quote }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* `trustedCas` as projected sources. */}}
{{- define "ambient.trustedCas" -}}
{{- range $number, $ca := .Values.trustedCas }}
{{- $item := printf "items: [{key: %q, path: %d.crt}]" $ca.key $number }}
{{- if $ca.secret }}
- secret: {name: {{ $ca.secret | quote }}, {{ $item }}}
{{- else }}
- configMap: {name: {{ $ca.configMap | quote }}, {{ $item }}}
{{- end }}
{{- end }}
{{- end }}

{{/* Whom our pods run as. OpenShift gives each namespace users of its own. */}}
{{- define "ambient.podSecurity" -}}
runAsNonRoot: true
{{- if not .Values.platform.openshift }}
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ambient.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "ambient.pullSecrets" -}}
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Which nodes our pods may run on: of the affinity only what is about nodes, for pods that are not
the control plane's. */}}
{{- define "ambient.nodes" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- define "ambient.nodeAffinity" -}}
{{- with .Values.affinity.nodeAffinity }}
affinity:
  nodeAffinity:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end }}
