//! The control plane killed and started again while sessions run.

use ambient_shared::phase::Phase;
use serde_json::Value;

use crate::system::{PROJECT, System, pod, shell};

/// A session that runs goes on in the same pod and completes; one that was created meanwhile is
/// started afterwards.
pub async fn goes_on(system: &mut System) -> String {
    // Ends when it is told to, through a file.
    let script = "echo started; until [ -e /tmp/end ]; do sleep 0.2; done; echo ends";
    let id = system.create(shell(script)).await;
    system.phase(&id, Phase::Running).await;
    system.says(&id, "started").await;
    let before = uid(system, &id).await;

    system.kill_control_plane().await;
    let meanwhile = system.create(shell("echo too")).await;
    system.start_control_plane().await;
    system.phase(&meanwhile, Phase::Completed).await;

    assert_eq!(uid(system, &id).await, before, "the pod is the same");
    let end = [
        "exec",
        "--namespace",
        PROJECT,
        &pod(&id),
        "--",
        "touch",
        "/tmp/end",
    ];
    system.kube().run(&end).await;
    system.phase(&id, Phase::Completed).await;
    assert_eq!(uid(system, &id).await, before, "the pod is the same");
    system.delete(&id).await;
    system.delete(&meanwhile).await;
    String::new()
}

async fn uid(system: &System, id: &str) -> Value {
    let pod = system.kube().get(PROJECT, &["pod", &pod(id)]).await;
    pod.expect("a session's pod is there")["metadata"]["uid"].clone()
}
