//! A token's way from the refresh ticker to the agent, with the time of each step.

use std::{fmt::Write as _, fs, path::Path, time::SystemTime};

use ambient_shared::phase::Phase;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::{
    kube::DEADLINE,
    system::{PROJECT, System, pod, shell},
};

/// The ticker replaces the token in the session's Secret, the kubelet swaps the mounted file, the
/// sidecar sees it, the agent is given it and the API server takes it.
pub async fn reaches_the_agent(system: &System) -> String {
    let script = format!(
        r#"
        while :; do
            token=$(wget -q -O- --header "Accept: text/plain" "$AMBIENT_TOKEN_ENDPOINT")
            hash=$(printf %s "$token" | sha256sum | cut -c1-12)
            [ "$hash" = "$last" ] && sleep 0.1 && continue
            echo "has $hash"
            wget -q -O /dev/null --header "Authorization: Bearer $token" \
                "{api}/api/ambient/v1/sessions/$SESSION_ID" && echo "used $hash" || exit 1
            # Stays for a look at the link.
            [ -z "$last" ] || exec sleep 5
            last=$hash
        done
        "#,
        api = system.api_url()
    );
    let id = system.create(shell(&script)).await;
    system.phase(&id, Phase::Running).await;
    let first = hash(&system.secret(&id).await["api-token"]);
    system.says(&id, &format!("used {first}")).await;

    // What the ticker wrote, and when.
    let deadline = Instant::now() + DEADLINE;
    let (second, written) = loop {
        let second = hash(&system.secret(&id).await["api-token"]);
        if second != first {
            break (second, written(system, &id).await);
        }
        assert!(Instant::now() < deadline, "the ticker never wrote a token");
        sleep(std::time::Duration::from_millis(100)).await;
    };
    let (has, _) = system.says(&id, &format!("has {second}")).await;
    let (used, _) = system.says(&id, &format!("used {second}")).await;
    let swapped = swapped(system, &id).await;
    system.phase(&id, Phase::Completed).await;
    let sidecar = system
        .kube()
        .log(PROJECT, &pod(&id), "ambient-sidecar")
        .await;
    let seen = sidecar
        .iter()
        .find(|(_, line)| line.contains("token changed") && line.contains(&second))
        .unwrap_or_else(|| panic!("the sidecar never saw {second}: {sidecar:#?}"));

    let mut steps = vec![("ticker writes the Secret", written)];
    steps.extend(swapped.map(|at| ("kubelet swaps the file", at)));
    steps.push(("sidecar sees it", parse(&seen.0)));
    steps.push(("agent has it", parse(&has)));
    steps.push(("API server has taken it", parse(&used)));
    system.delete(&id).await;
    table(&steps)
}

/// When the ticker wrote the Secret. Kubernetes itself keeps it in whole seconds, the API server of
/// our own cluster logs it more exactly.
async fn written(system: &System, id: &str) -> SystemTime {
    let name = format!("session-{id}-creds");
    let what = ["secret", &name, "--show-managed-fields"];
    let secret = system
        .kube()
        .get(PROJECT, &what)
        .await
        .expect("it is there");
    let by_ticker = |entry: &&Value| entry["manager"] == "ambient-control-plane-refresh";
    let fields = secret["metadata"]["managedFields"].as_array();
    let entry = fields.and_then(|all| all.iter().find(by_ticker));
    let entry = entry.unwrap_or_else(|| panic!("not by the ticker: {fields:#?}"));
    let uri = format!("/api/v1/namespaces/{PROJECT}/secrets/{name}");
    let exactly = system.target().changed(&uri);
    parse(
        exactly
            .as_deref()
            .or(entry["time"].as_str())
            .expect("a time"),
    )
}

/// When the kubelet swapped the link to the mounted files, as the sidecar sees it. None where its
/// processes cannot be seen.
async fn swapped(system: &System, id: &str) -> Option<SystemTime> {
    let node = system.node()?;
    let pod = system.kube().get(PROJECT, &["pod", &pod(id)]).await?;
    let uid = pod["metadata"]["uid"].as_str()?;
    node.processes_of(uid).into_iter().find_map(|pid| {
        let root = Path::new("/proc").join(pid.to_string()).join("root");
        let link = root.join("var/run/secrets/ambient/..data");
        fs::symlink_metadata(link).and_then(|it| it.modified()).ok()
    })
}

fn table(steps: &[(&str, SystemTime)]) -> String {
    let (mut text, mut last) = (String::new(), steps[0].1);
    for (step, at) in steps {
        let since = |from: &SystemTime| {
            at.duration_since(*from).map_or_else(
                |early| -early.duration().as_secs_f64(),
                |it| it.as_secs_f64(),
            )
        };
        let (step_took, all) = (since(&last), since(&steps[0].1));
        let _ = write!(text, "\n    {step:<26} +{step_took:>6.2} s {all:>7.2} s");
        last = *at;
    }
    text
}

fn parse(time: &str) -> SystemTime {
    humantime::parse_rfc3339(time).unwrap_or_else(|error| panic!("{time}: {error}"))
}

/// As our programs show tokens in logs.
fn hash(token: &str) -> String {
    let token = ambient_shared::token::Token::new(token, None).expect("a token");
    token.hash().to_string()
}
