{{/*
The control plane's permissions. control-plane/src/rules.rs has them for the program (`rules`,
`check`); a test compares the two.
*/}}

{{- define "ambient.verbs.all" -}}[get, list, watch, create, patch, delete]{{- end }}
{{- define "ambient.verbs.read" -}}[get, list, watch]{{- end }}

{{/* In the whole cluster. */}}
{{- define "ambient.rules.cluster" -}}
- apiGroups: [""]
  resources: [namespaces]
  {{- if eq .Values.platform.mode "mpp" }}
  # A tenant operator makes and deletes them.
  verbs: [get, list, watch, patch]
  {{- else }}
  verbs: {{ include "ambient.verbs.all" . }}
  {{- end }}
# To bind itself where it has no right yet. Listing and deleting come with that binding.
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [get, create, patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [clusterroles]
  verbs: [bind]
  resourceNames:
    - ambient-session-manager
    - ambient-project-admin
    - ambient-project-edit
    - ambient-project-view
    {{- if .Values.sessions.imageNamespace }}
    - system:image-puller
    {{- end }}
{{- end }}

{{/* In each project's namespace. */}}
{{- define "ambient.rules.projects" -}}
- apiGroups: [""]
  resources: [pods, serviceaccounts]
  verbs: {{ include "ambient.verbs.all" . }}
# Never `get`: lists and watches of ours are of metadata only.
- apiGroups: [""]
  resources: [secrets]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [list, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{/* In its own namespace. */}}
{{- define "ambient.rules.own" -}}
# RBAC cannot limit a create by name.
- apiGroups: [""]
  resources: [configmaps, secrets]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, update]
  resourceNames: [ambient-control-plane]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get]
  resourceNames: [ambient-cp-keys]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, patch]
  resourceNames: [ambient-cp-token-keypair, ambient-cp-session-root, ambient-cp-signing-key]
# About its own pod.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{/* In namespaces that values name: a map from namespace to rules, as JSON. */}}
{{- define "ambient.rules.namespaces" -}}
{{- $own := .Release.Namespace }}
{{- $rules := dict $own (include "ambient.rules.own" . | fromYamlArray) }}
{{- $more := list }}
{{- $secret := "{apiGroups: [\"\"], resources: [secrets], verbs: [get], resourceNames: [%q]}" }}
{{- with .Values.sessions.imagePullSecret }}
{{- $more = append $more (list $own (printf $secret .)) }}
{{- end }}
{{- with .Values.sessions.vertex }}
{{- if and .enabled .secretName }}
{{- $more = append $more (list (.secretNamespace | default $own) (printf $secret .secretName)) }}
{{- end }}
{{- end }}
{{- with .Values.sessions.imageNamespace }}
{{- $more = append $more (list . "{apiGroups: [rbac.authorization.k8s.io], resources: [rolebindings], verbs: [delete]}") }}
{{- end }}
{{- if eq .Values.platform.mode "mpp" }}
{{- $more = append $more (list .Values.platform.mppConfigNamespace "{apiGroups: [tenant.paas.redhat.com], resources: [tenantnamespaces], verbs: [get, create, delete]}") }}
{{- end }}
{{- range $more }}
{{- $namespace := first . }}
{{- $rule := last . | fromYaml }}
{{- $_ := set $rules $namespace (append (get $rules $namespace | default list) $rule) }}
{{- end }}
{{- toJson $rules }}
{{- end }}

{{/* What people may do in a project's namespace, by role. */}}
{{- define "ambient.rules.view" -}}
- apiGroups: [""]
  resources: [pods, pods/status, pods/log, services, serviceaccounts, events, resourcequotas, limitranges]
  verbs: {{ include "ambient.verbs.read" . }}
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: {{ include "ambient.verbs.read" . }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: {{ include "ambient.verbs.read" . }}
{{- end }}
{{- define "ambient.rules.edit" -}}
{{ include "ambient.rules.view" . }}
- apiGroups: [""]
  resources: [pods]
  verbs: [delete]
- apiGroups: [""]
  resources: [pods/portforward]
  verbs: [create, get]
{{- end }}
{{- define "ambient.rules.admin" -}}
{{ include "ambient.rules.edit" . }}
# Only administrators look into a session's container, where its token is.
- apiGroups: [""]
  resources: [pods/exec, pods/attach]
  verbs: [create, get]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: {{ include "ambient.verbs.read" . }}
{{- end }}
