{{/* Variables of the control plane, in the Deployment and in the test. */}}
{{- define "ambient.env" -}}
{{- $secret := dict "root" . }}
- name: CP_RUNTIME_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: AMBIENT_POD_UID
  valueFrom: {fieldRef: {fieldPath: metadata.uid}}
{{- include "ambient.plainEnv" . }}
{{- with .Values.credential.apiToken }}
{{- if include "ambient.isGiven" . }}
- name: AMBIENT_API_TOKEN
  valueFrom:
    {{- include "ambient.secretRef" (dict "root" $ "secret" . "name" "credential") | nindent 4 }}
{{- end }}
{{- end }}
{{- with .Values.credential.oidc.clientSecret }}
{{- if include "ambient.isGiven" . }}
- name: OIDC_CLIENT_SECRET
  valueFrom:
    {{- include "ambient.secretRef" (dict "root" $ "secret" . "name" "credential") | nindent 4 }}
{{- end }}
{{- end }}
{{- with .Values.sessions.anthropicApiKey }}
{{- if include "ambient.isGiven" . }}
- name: ANTHROPIC_API_KEY
  valueFrom:
    {{- include "ambient.secretRef" (dict "root" $ "secret" . "name" "credential") | nindent 4 }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Those that have plain values, by name; an empty one is left out. */}}
{{- define "ambient.plainEnv" -}}
{{- $sessions := .Values.sessions }}
{{- $vertex := $sessions.vertex }}
{{- $companions := $sessions.companions }}
{{- $env := dict
  "LOG_LEVEL" .Values.logLevel
  "AMBIENT_LOG_FORMAT" .Values.logFormat
  "AMBIENT_API_SERVER_URL" (include "ambient.apiUrl" .)
  "AMBIENT_GRPC_SERVER_ADDR" (include "ambient.grpcAddress" .)
  "AMBIENT_GRPC_USE_TLS" (toString .Values.api.grpcTls)
  "OIDC_TOKEN_URL" .Values.credential.oidc.tokenUrl
  "OIDC_CLIENT_ID" .Values.credential.oidc.clientId
  "CP_TOKEN_ISSUER" .Values.tokens.issuer
  "CP_TOKEN_TTL" .Values.tokens.life
  "CP_REFRESH_INTERVAL" .Values.tokens.refreshInterval
  "CP_TOKEN_LISTEN_ADDR" ":8080"
  "CP_TOKEN_URL" (.Values.tokens.url | default (printf "%s/token" (include "ambient.tokenBase" .)))
  "CP_RATE_LIMITS" (ternary "on" "off" .Values.tokens.rateLimits)
  "CP_ALLOW_UNPROVEN" (toString .Values.tokens.allowUnproven)
  "CP_LEASE_DURATION" .Values.leaseDuration
  "CP_KEY_ROTATION_WAIT" .Values.keys.rotationWait
  "AMBIENT_ADMIN_LISTEN" ":9090"
  "RUNNER_IMAGE" $sessions.agentImage
  "AMBIENT_RUNNER_IMAGE" (include "ambient.image" (dict "root" . "image" $sessions.runnerImage "at" "sessions.runnerImage"))
  "AMBIENT_SIDECAR_IMAGE" (include "ambient.image" (dict "root" . "image" $sessions.sidecarImage "at" "sessions.sidecarImage"))
  "RUNNER_IMAGE_NAMESPACE" $sessions.imageNamespace
  "IMAGE_PULL_SECRET" $sessions.imagePullSecret
  "RUNNER_LOG_LEVEL" $sessions.logLevel
  "AMBIENT_POD_USER" ($sessions.user | default (ternary "platform" "" .Values.platform.openshift))
  "AMBIENT_SERVICE_CA" ($sessions.serviceCa | default (ternary "openshift-service-ca.crt" "" .Values.platform.openshift))
  "PLATFORM_MODE" .Values.platform.mode
  "MPP_CONFIG_NAMESPACE" .Values.platform.mppConfigNamespace
  "MCP_IMAGE" $companions.mcp
  "MCP_API_SERVER_URL" $companions.mcpApiServerUrl
  "GITHUB_MCP_IMAGE" $companions.github
  "JIRA_MCP_IMAGE" $companions.jira
  "K8S_MCP_IMAGE" $companions.k8s
  "GOOGLE_MCP_IMAGE" $companions.google
  "HTTP_PROXY" .Values.proxy.http
  "HTTPS_PROXY" .Values.proxy.https
  "NO_PROXY" .Values.proxy.none
}}
{{- if $vertex.enabled }}
{{- $_ := set $env "USE_VERTEX" "true" }}
{{- $_ := set $env "ANTHROPIC_VERTEX_PROJECT_ID" $vertex.projectId }}
{{- $_ := set $env "CLOUD_ML_REGION" $vertex.region }}
{{- $_ := set $env "VERTEX_SECRET_NAME" $vertex.secretName }}
{{- $_ := set $env "VERTEX_SECRET_NAMESPACE" $vertex.secretNamespace }}
{{- end }}
{{- if $sessions.agentCommand }}
{{- $_ := set $env "AGENT_COMMAND" (toJson $sessions.agentCommand) }}
{{- end }}
{{- if $sessions.agentImageAllow }}
{{- $_ := set $env "AGENT_IMAGE_ALLOW" (join "," $sessions.agentImageAllow) }}
{{- end }}
{{- if $sessions.maxResources }}
{{- $_ := set $env "AMBIENT_MAX_RESOURCES" (toJson $sessions.maxResources) }}
{{- end }}
{{- if $sessions.podTemplate }}
{{- $_ := set $env "AMBIENT_POD_TEMPLATE" "/etc/ambient/pod-template/pod-template.yaml" }}
{{- end }}
{{- if $sessions.kubeToken.existingSecret }}
{{- $_ := set $env "PROJECT_KUBE_TOKEN_FILE" "/etc/ambient/kube-token/token" }}
{{- end }}
{{- if .Values.tls.enabled }}
{{- $_ := set $env "CP_TOKEN_TLS_CERT_FILE" "/etc/ambient/tls/tls.crt" }}
{{- $_ := set $env "CP_TOKEN_TLS_KEY_FILE" "/etc/ambient/tls/tls.key" }}
{{- end }}
{{- if include "ambient.tlsCa" . }}
{{- $_ := set $env "CP_TOKEN_CA_FILE" "/etc/ambient/token-ca/ca.crt" }}
{{- end }}
{{- if .Values.trustedCas }}
{{- $_ := set $env "SSL_CERT_DIR" "/etc/ambient/trusted-cas" }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if or (get $env .name) (has .name (list "CP_RUNTIME_NAMESPACE" "AMBIENT_POD_UID" "AMBIENT_API_TOKEN" "OIDC_CLIENT_SECRET" "ANTHROPIC_API_KEY")) }}
{{- fail (printf "extraEnv sets %s, which another value sets already" .name) }}
{{- end }}
{{- end }}
{{- range $name, $value := $env }}
{{- if $value }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volumes of the control plane, and where they are mounted. 288 is 0440, which YAML 1.2 reads otherwise. */}}
{{- define "ambient.volumes" -}}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "ambient.tlsSecret" . | quote }}, defaultMode: 288}
{{- end }}
{{- with include "ambient.tlsCa" . | trim }}
- name: token-ca
  projected:
    sources:
      - {{ . }}
{{- end }}
{{- if .Values.trustedCas }}
- name: trusted-cas
  projected:
    sources:
      {{- include "ambient.trustedCas" . | trim | nindent 6 }}
{{- end }}
{{- if .Values.sessions.podTemplate }}
- name: pod-template
  configMap: {name: {{ include "ambient.name" . }}-pod-template}
{{- end }}
{{- with .Values.sessions.kubeToken }}
{{- if .existingSecret }}
- name: kube-token
  secret:
    secretName: {{ .existingSecret | quote }}
    defaultMode: 288
    items: [{key: {{ .key | quote }}, path: token}]
{{- end }}
{{- end }}
{{- if or .Values.keys.external .Values.keys.externalSecret }}
# Only so that the pod waits for it.
- name: keypair
  secret:
    secretName: ambient-cp-token-keypair
    items: [{key: public.pem, path: public.pem}]
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "ambient.volumeMounts" -}}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/ambient/tls, readOnly: true}
{{- end }}
{{- if include "ambient.tlsCa" . }}
- {name: token-ca, mountPath: /etc/ambient/token-ca, readOnly: true}
{{- end }}
{{- if .Values.trustedCas }}
- {name: trusted-cas, mountPath: /etc/ambient/trusted-cas, readOnly: true}
{{- end }}
{{- if .Values.sessions.podTemplate }}
- {name: pod-template, mountPath: /etc/ambient/pod-template, readOnly: true}
{{- end }}
{{- if .Values.sessions.kubeToken.existingSecret }}
- {name: kube-token, mountPath: /etc/ambient/kube-token, readOnly: true}
{{- end }}
{{- if or .Values.keys.external .Values.keys.externalSecret }}
- {name: keypair, mountPath: /etc/ambient/keypair, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}
