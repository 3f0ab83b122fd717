//! A look at every process of a pod, from this machine.

use std::{fs, path::Path};

use ambient_shared::phase::Phase;

use crate::system::{PROJECT, System, pod, shell};

/// Start of every JSON Web Token.
const JWT: &str = "eyJ";

/// Neither token nor session key is in an argument or environment of a process in a session's pod,
/// those that the agent starts included.
pub async fn show_no_token(system: &System) -> String {
    let Some(node) = system.node() else {
        return ", skipped: only this machine's own node lets us see its processes".to_owned();
    };
    let script = r#"
        cat "$AMBIENT_TOKEN_FILE" >/dev/null && echo has a token
        sleep 1000
    "#;
    let id = system.create(shell(script)).await;
    system.phase(&id, Phase::Running).await;
    system.says(&id, "has a token").await;
    let pod = system.kube().get(PROJECT, &["pod", &pod(&id)]).await;
    let pod = pod.expect("it runs");
    let uid = pod["metadata"]["uid"].as_str().expect("a uid");
    let secret = system.secret(&id).await;
    let mut secrets: Vec<_> = secret.values().map(String::as_str).collect();
    assert!(
        secret["api-token"].starts_with(JWT),
        "a minted token is a JWT"
    );
    secrets.push(JWT);

    let mut programs = Vec::new();
    for pid in node.processes_of(uid) {
        let folder = Path::new("/proc").join(pid.to_string());
        let text = |file: &str| {
            let bytes = fs::read(folder.join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (arguments, environment) = (text("cmdline"), text("environ"));
        for secret in &secrets {
            // Without showing it.
            assert!(
                !arguments.contains(secret),
                "a secret in the arguments of {pid}"
            );
            assert!(
                !environment.contains(secret),
                "a secret in the environment of {pid}"
            );
        }
        let program = arguments.split('\0').next().unwrap_or_default();
        programs.push(program.rsplit('/').next().unwrap_or_default().to_owned());
    }
    programs.sort();
    programs.dedup();
    for program in [
        "ambient-runner",
        "ambient-sidecar",
        "busybox",
        "sh",
        "sleep",
    ] {
        assert!(
            programs.iter().any(|it| it == program),
            "no {program} in {programs:?}"
        );
    }
    system.delete(&id).await;
    format!(", looked at {}", programs.join(", "))
}
