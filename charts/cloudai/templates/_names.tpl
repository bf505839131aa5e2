{{- define "cloudai.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The name of what lies outside the release's own namespace, where others' may have the release's name. */}}
{{- define "cloudai.global" -}}
cloudai-{{ .Release.Namespace }}-{{ .Release.Name }}
{{- end }}

{{- define "cloudai.labels" -}}
app.kubernetes.io/name: cloudai
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What a part's Pods are found by: call with (list $ "operator"). */}}
{{- define "cloudai.selector" -}}
app.kubernetes.io/name: cloudai
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* One part, the operator or the API: call with a dict of root, part, args, port and env; and
drain, the seconds that it goes on to listen while its Service still leads to it. */}}
{{- define "cloudai.deployment" -}}
{{- $part := index .root.Values .part -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .root.Release.Name }}-{{ .part }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "cloudai.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .part }}
spec:
  replicas: {{ $part.replicas }}
  selector:
    matchLabels:
      {{- include "cloudai.selector" (list .root .part) | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "cloudai.selector" (list .root .part) | nindent 8 }}
    spec:
      enableServiceLinks: false  # they would look like settings
      serviceAccountName: {{ .root.Release.Name }}-{{ .part }}
      {{- with .root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "cloudai.selector" (list .root .part) | nindent 14 }}
      {{- with $part.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $part.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .part }}
          image: {{ include "cloudai.image" .root | quote }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          args: {{ toJson .args }}
          env:
            - {name: CLOUDAI_HOST, value: "0.0.0.0"}
            - {name: CLOUDAI_PORT, value: {{ .port | quote }}}
            - {name: CLOUDAI_LOG_FORMAT, value: json}
            - {name: CLOUDAI_LOG_LEVEL, value: {{ $part.logLevel | quote }}}
            - {name: CLOUDAI_NAMESPACE, value: {{ .root.Values.tasks.namespace | quote }}}
            - {name: CLOUDAI_GPU_RESOURCE, value: {{ .root.Values.tasks.gpuResource | quote }}}
            {{- range $name, $value := .env }}
            - {name: {{ $name }}, value: {{ $value | quote }}}
            {{- end }}
          ports:
            - {name: http, containerPort: {{ .port }}}
          startupProbe:
            httpGet: {path: /healthz, port: http}
            periodSeconds: 2
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /healthz, port: http}
            periodSeconds: 20
            timeoutSeconds: 5
          readinessProbe:
            httpGet: {path: /readyz, port: http}
            periodSeconds: 5
            timeoutSeconds: 5
          {{- with .drain }}
          lifecycle:
            preStop: {sleep: {seconds: {{ . }}}}
          {{- end }}
          resources:
            {{- toYaml $part.resources | nindent 12 }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: tmp
          emptyDir: {sizeLimit: 1Gi}
{{- end }}
