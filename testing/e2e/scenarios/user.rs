//! The product as a user of Kubernetes meets it, with curl and kubectl.

use ambient_shared::phase::Phase;
use serde_json::Value;

use crate::system::{PROJECT, System, pod, shell};

/// The pod appears with the labels that one selects by, its events tell what was done, and when the
/// session is deleted everything of it is gone; with the project, so is the namespace.
pub async fn sees_it(system: &System) -> String {
    let kube = system.kube();
    let id = system.create(shell("echo started; exec sleep 1000")).await;
    system.phase(&id, Phase::Running).await;
    system.says(&id, "started").await;

    let name = pod(&id);
    let ready = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array();
        conditions.is_some_and(|all| {
            all.iter()
                .any(|it| it["type"] == "Ready" && it["status"] == "True")
        })
    };
    kube.wait(PROJECT, &["pod", &name], ready).await;
    let label = format!("ambient-code.io/session-id={id}");
    let get = ["get", "pods", "--namespace", PROJECT, "--selector", &label];
    let pods = kube.run(&get).await;
    assert!(pods.contains("2/2") && pods.contains("Running"), "{pods}");
    let describe = ["describe", "pod", &name, "--namespace", PROJECT];
    let described = kube.run(&describe).await;
    let from_us = described
        .lines()
        .skip_while(|line| !line.starts_with("Events:"))
        .any(|line| line.contains("ambient-control-plane"));
    assert!(from_us, "no event of the control plane: {described}");
    let namespace = kube
        .get(PROJECT, &["namespace", PROJECT])
        .await
        .expect("it is there");
    let labels = &namespace["metadata"]["labels"];
    assert_eq!(labels["ambient-code.io/managed"], "true");
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");

    // Waits until all of it is gone.
    system.delete(&id).await;
    let path = format!("/projects/{PROJECT}");
    let (status, answer) = system.request(reqwest::Method::DELETE, &path, None).await;
    assert_eq!(status, reqwest::StatusCode::NO_CONTENT, "{answer}");
    kube.wait_gone(PROJECT, &["namespace", PROJECT]).await;
    String::new()
}
