//! What an operator's overlay can and cannot do, and what a session asks for on top of it.

use super::*;

/// Says everything that is not an overlay's to say.
fn hostile_overlay() -> Box<PodTemplateSpec> {
    overlay_of(json!({
        "metadata": {
            "name": "other",
            "namespace": "other",
            "labels": {"ambient-code.io/session-id": "other", "ambient-code.io/managed": "false"},
            "annotations": {"ambient-code.io/generation": "9"},
            "ownerReferences": [],
        },
        "spec": {
            "serviceAccountName": "admin",
            "serviceAccount": "admin",
            "automountServiceAccountToken": true,
            "restartPolicy": "Always",
            "ephemeralContainers": [{"name": "debug", "image": "x"}],
            "containers": [{
                "name": "ambient-code-runner",
                "image": "other",
                "command": ["other"],
                "args": ["other"],
                "env": [{"name": "SESSION_ID", "value": "other"}],
                "volumeMounts": [
                    {"name": "other", "mountPath": "/var/run/secrets/ambient/"},
                    {"name": "other", "mountPath": "/var/run/secrets/ambient", "subPath": "x"},
                ],
            }],
            "initContainers": [{"name": "ambient-sidecar", "restartPolicy": "Never"}],
            "volumes": [
                {"name": "ambient-token", "secret": {"secretName": "other"}},
                {"name": "other", "emptyDir": {}},
            ],
        },
    }))
}

#[test]
fn an_overlay_cannot_make_the_pod_somebody_elses() {
    let plain = pod_of(&run(command(None)), &settings());
    let settings = KubernetesSettings {
        overlay: Some(hostile_overlay()),
        ..settings()
    };
    let mut pod = pod_of(&run(command(None)), &settings);
    let volumes = pod.spec.as_mut().unwrap().volumes.as_mut().unwrap();
    volumes.retain(|volume| volume.name != "other");
    assert_eq!(pod, plain);
}

#[test]
fn an_overlay_that_tries_is_refused_with_all_that_is_wrong() {
    let refused = check_overlay(&hostile_overlay()).unwrap_err();
    for what in [
        "metadata.labels[ambient-code.io/session-id]",
        "metadata.labels[ambient-code.io/managed]",
        "metadata.annotations[ambient-code.io/generation]",
        "spec.serviceAccountName",
        "spec.serviceAccount",
        "spec.automountServiceAccountToken",
        "spec.restartPolicy",
        "spec.ephemeralContainers",
        "spec.volumes[ambient-token]",
        "image of ambient-code-runner",
        "command of ambient-code-runner",
        "args of ambient-code-runner",
        "the variable SESSION_ID of ambient-code-runner",
        "the mount at /var/run/secrets/ambient of ambient-code-runner",
        "restartPolicy of ambient-sidecar",
    ] {
        assert!(refused.contains(what), "{what} not in {refused}");
    }
    assert_eq!(check_overlay(&usual_overlay()), Ok(()));
}

#[test]
fn an_overlay_replaces_a_volume_and_a_variable_as_a_whole() {
    let settings = KubernetesSettings {
        overlay: Some(overlay_of(json!({"spec": {
            "containers": [{"name": AGENT, "env": [
                {"name": "INITIAL_PROMPT", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
            ]}],
            "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": "w"}}],
        }}))),
        ..settings()
    };
    let pod = pod_of(&run(command(None)), &settings);
    let variables = container_of(&pod, AGENT).env.as_ref().unwrap();
    let prompt: Vec<_> = variables
        .iter()
        .filter(|it| it.name == "INITIAL_PROMPT")
        .collect();
    assert_eq!(prompt.len(), 1);
    assert_eq!(prompt[0].value, None);
    let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
    let workspace: Vec<_> = volumes.iter().filter(|it| it.name == "workspace").collect();
    assert_eq!(workspace.len(), 1);
    assert_eq!(workspace[0].empty_dir, None);
}

/// Requests and limits of the agent with this asked for, and the operator's overlay of both.
fn resources_with(overlaid: &Value, requests: Value, limits: Value) -> Value {
    let settings = KubernetesSettings {
        overlay: Some(overlay_of(
            json!({"spec": {"containers": [{"name": AGENT, "resources": overlaid}]}}),
        )),
        ..settings()
    };
    let mut run = run(command(None));
    run.resources.requests = serde_json::from_value(requests).unwrap();
    run.resources.limits = serde_json::from_value(limits).unwrap();
    let pod = pod_of(&run, &settings);
    json!(container_of(&pod, AGENT).resources)
}

#[test]
fn what_a_session_asks_for_moves_what_would_contradict_it() {
    let usual = json!({});
    for (overlaid, requests, limits, expected) in [
        (
            usual.clone(),
            json!({}),
            json!({}),
            json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}),
        ),
        (
            usual.clone(),
            json!({"cpu": "3"}),
            json!({}),
            json!({"requests": {"cpu": "3", "memory": "1Gi"}, "limits": {"cpu": "3", "memory": "4Gi"}}),
        ),
        (
            usual.clone(),
            json!({}),
            json!({"cpu": "0.25", "memory": "512Mi"}),
            json!({"requests": {"cpu": "0.25", "memory": "512Mi"}, "limits": {"cpu": "0.25", "memory": "512Mi"}}),
        ),
        (
            usual,
            json!({"memory": "2Gi"}),
            json!({"memory": "8Gi"}),
            json!({"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"cpu": "2", "memory": "8Gi"}}),
        ),
        (
            json!({"requests": {"cpu": "100m"}, "limits": {"memory": "16Gi"}}),
            json!({"memory": "5Gi"}),
            json!({}),
            json!({"requests": {"cpu": "100m", "memory": "5Gi"}, "limits": {"cpu": "2", "memory": "16Gi"}}),
        ),
    ] {
        assert_eq!(resources_with(&overlaid, requests, limits), expected);
    }
}
