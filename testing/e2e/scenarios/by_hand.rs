//! A pod without the control plane: proves the node, and our static programs on it.

use std::net::Ipv4Addr;

use ambient_testing::images::Image;
use serde_json::{Value, json};

use crate::target::Target;

pub const NAMESPACE: &str = "ambient-e2e-by-hand";
const POD: &str = "by-hand";

/// What the agent does: says which token it is given, until it is the second one.
const AGENT: &str = r#"
    until [ "$token" = second-token ]; do
        token=$(wget -q -O- --header "Accept: text/plain" "$AMBIENT_TOKEN_ENDPOINT")
        [ "$token" = "$last" ] || echo "has $token"
        last=$token
        sleep 0.2
    done
"#;

/// Starts the pod and waits until all of it is ready.
///
/// # Panics
/// When it does not get ready in time.
pub async fn start(target: &Target) {
    let kube = &target.kube;
    kube.apply(&manifests(target.address)).await;
    let ready = |pod: &Value| {
        let statuses = |kind: &str| pod["status"][kind].as_array().cloned().unwrap_or_default();
        let mut all = statuses("containerStatuses");
        all.extend(statuses("initContainerStatuses"));
        all.len() == 3 && all.iter().all(|it| it["ready"] == true)
    };
    kube.wait(NAMESPACE, &["pod", POD], ready).await;
}

/// The kubelet swaps the file of a changed Secret, the sidecar serves the new token, the agent ends
/// with it, and the pod ends with the agent.
pub async fn sees_a_changed_secret(target: &Target) -> String {
    let kube = &target.kube;
    start(target).await;
    let patch = json!({"stringData": {"api-token": "second-token"}}).to_string();
    kube.run(&[
        "patch",
        "secret",
        POD,
        "--namespace",
        NAMESPACE,
        "--patch",
        &patch,
    ])
    .await;

    let pod = kube
        .wait(NAMESPACE, &["pod", POD], |pod| {
            pod["status"]["phase"] == "Succeeded"
        })
        .await;

    let said: Vec<_> = kube.log(NAMESPACE, POD, "agent").await;
    let said: Vec<_> = said
        .iter()
        .filter_map(|(_, line)| line.strip_prefix("has "))
        .collect();
    assert_eq!(said, ["first-token", "second-token"]);
    let sidecar = &pod["status"]["initContainerStatuses"][1]["state"]["terminated"];
    assert_eq!(
        sidecar["exitCode"], 0,
        "the sidecar ends with the agent: {sidecar}"
    );
    kube.run(&["delete", "namespace", NAMESPACE, "--wait=false"])
        .await;
    String::new()
}

fn manifests(address: Ipv4Addr) -> String {
    let contained = json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    });
    let addresses =
        json!({ "name": "AMBIENT_SIDECAR_ADDRESSES", "value": "/run/ambient/addresses" });
    let programs = json!({ "name": "programs", "mountPath": "/ambient" });
    let run = json!({ "name": "run", "mountPath": "/run/ambient" });
    let secret = json!({ "name": "secret", "mountPath": "/var/run/secrets/ambient" });
    let objects = [
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": NAMESPACE,
            "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
        }}),
        json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": { "name": POD, "namespace": NAMESPACE },
            "stringData": { "api-token": "first-token" },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": POD, "namespace": NAMESPACE },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": POD, "namespace": NAMESPACE },
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": POD,
                "automountServiceAccountToken": false,
                "securityContext": {
                    "runAsNonRoot": true,
                    "runAsUser": 65532,
                    "runAsGroup": 65532,
                    "fsGroup": 65532,
                    "seccompProfile": { "type": "RuntimeDefault" },
                },
                "volumes": [
                    { "name": "programs", "emptyDir": {} },
                    { "name": "run", "emptyDir": { "medium": "Memory" } },
                    { "name": "secret", "secret": {
                        "secretName": POD,
                        "defaultMode": 0o440,
                        "items": [{ "key": "api-token", "path": "bot-token" }],
                    }},
                ],
                "initContainers": [
                    {
                        "name": "install",
                        "image": Image::reference("ambient-runner"),
                        "args": ["install", "/ambient"],
                        "securityContext": contained,
                        "volumeMounts": [programs],
                    },
                    {
                        "name": "sidecar",
                        "image": Image::reference("ambient-sidecar"),
                        "restartPolicy": "Always",
                        "securityContext": contained,
                        "env": [
                            addresses,
                            { "name": "AMBIENT_UPSTREAM_URL", "value": format!("http://{address}:1") },
                        ],
                        "volumeMounts": [run, secret],
                    },
                ],
                "containers": [{
                    "name": "agent",
                    "image": Image::reference("shell"),
                    "command": ["/ambient/ambient-runner", "--", "sh", "-c", AGENT],
                    "securityContext": contained,
                    "env": [
                        addresses,
                        { "name": "SESSION_ID", "value": "01991f2e-0000-7000-8000-000000000001" },
                    ],
                    "volumeMounts": [programs, run, secret],
                }],
            },
        }),
    ];
    objects.map(|object| object.to_string()).join("\n---\n")
}
