//! How sessions end: by themselves, for want of memory, by somebody's hand.

use ambient_shared::phase::Phase;
use ambient_testing::{images::Image, local::NewSession};
use serde_json::{Value, json};

use crate::system::{AGENT, PROJECT, System, pod, reason, shell};

/// A session from POST to `Completed`. The agent is a shell that knows nothing of us: it gets the
/// prompt on its stdin, asks the API server through the sidecar, and answers on its stdout. The
/// native sidecar ends with it.
pub async fn completes(system: &System) -> String {
    let script = r#"
        read -r prompt
        session=$(wget -q -O- "$AMBIENT_PROXY_URL/api/ambient/v1/sessions/$SESSION_ID")
        case $session in *"$SESSION_ID"*) echo "heard $prompt" ;; *) echo "no session: $session" ;; esac
    "#;
    let session = shell(script).io("lines").field("prompt", "hello");
    let id = system.create(session).await;
    let session = system.phase(&id, Phase::Completed).await;

    assert_eq!(reason(&session), "Completed");
    assert_eq!(session.kube_namespace.as_deref(), Some(PROJECT));
    assert!(session.start_time.is_some() && session.completion_time.is_some());
    let said = system.texts(&id, "assistant").await;
    assert_eq!(said, ["heard hello"]);
    // The agent has ended, the sidecar is told to.
    let ended = |pod: &Value| pod["status"]["phase"] == "Succeeded";
    let what = ["pod", &pod(&id)];
    let pod = system.kube().wait(PROJECT, &what, ended).await;
    let agent = terminated(&pod, "containerStatuses", AGENT);
    let sidecar = terminated(&pod, "initContainerStatuses", "ambient-sidecar");
    assert_eq!(
        (&agent["exitCode"], &sidecar["exitCode"]),
        (&json!(0), &json!(0))
    );
    let ended = |container: &Value| container["finishedAt"].as_str().map(str::to_owned);
    assert!(ended(&sidecar) >= ended(&agent), "{sidecar} before {agent}");
    system.delete(&id).await;
    String::new()
}

/// An agent that takes more memory than it may.
pub async fn out_of_memory(system: &System) -> String {
    let session = NewSession::command(&["tail", "/dev/zero"])
        .annotation("agent-image", &Image::reference("shell"))
        .field(
            "resource_overrides",
            json!({
                "requests": { "memory": "32Mi" },
                "limits": { "memory": "64Mi" },
            })
            .to_string(),
        );
    let id = system.create(session).await;
    let session = system.phase(&id, Phase::Failed).await;
    assert_eq!(reason(&session), "OOMKilled", "{:?}", session.conditions);
    system.delete(&id).await;
    String::new()
}

/// Somebody deletes a session's pod.
pub async fn pod_deleted(system: &System) -> String {
    let id = system.create(shell("echo started; exec sleep 1000")).await;
    system.phase(&id, Phase::Running).await;
    system.says(&id, "started").await;
    system
        .kube()
        .run(&[
            "delete",
            "pod",
            &pod(&id),
            "--namespace",
            PROJECT,
            "--wait=false",
        ])
        .await;
    let session = system.phase(&id, Phase::Failed).await;
    assert_eq!(reason(&session), "PodDeleted", "{:?}", session.conditions);
    system.delete(&id).await;
    String::new()
}

/// How a container of a pod has ended.
fn terminated(pod: &Value, kind: &str, name: &str) -> Value {
    let statuses = pod["status"][kind].as_array();
    let status = statuses.and_then(|all| all.iter().find(|it| it["name"] == name));
    let status = status.unwrap_or_else(|| panic!("no container {name} in {pod:#}"));
    let ended = &status["state"]["terminated"];
    assert!(ended.is_object(), "{name} has not ended: {status:#}");
    ended.clone()
}
