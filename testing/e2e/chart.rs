//! One `helm install` of the whole system, from our own images, on a node of its own: what a new
//! user does by docs/install.md, and what an operator does afterwards.

use std::{path::Path, time::Duration};

use ambient_testing::{images::Image, operator::Operator};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    kube::{DEADLINE, Kube},
    system::{AGENT, pod},
    target::Target,
};

pub mod guide;
mod release;

pub use release::NAMESPACE;
use release::{OPERATOR, Release};

/// The scenario's name.
pub const NAME: &str = "one_helm_install_is_a_whole_system";

/// The sessions' project.
pub const PROJECT: &str = "team";

/// How often is looked for what nothing announces.
const POLL: Duration = Duration::from_millis(300);

/// Life of the tokens: so short that the session must get new ones while its release changes, or soon
/// after.
const LIFE: &str = "tokens.life=30s";

/// Shows its token to the session API each second, until it is told to end.
const ASKS: &str = r#"
    until [ -e /tmp/end ]; do
        token=$(cat "$AMBIENT_TOKEN_FILE")
        wget -q -O /dev/null --header "Authorization: Bearer $token" \
            "$BACKEND_API_URL/api/ambient/v1/sessions/$SESSION_ID" \
            && echo "taken $(printf %s "$token" | sha256sum | cut -c1-12)" || echo refused
        sleep 1
    done
"#;

/// A node with images of all that is installed.
///
/// # Panics
/// When an image cannot be made, or the node does not come up.
pub fn node(binaries: &Path) -> Target {
    let mut images = Image::of_all_ours(binaries).unwrap_or_else(|error| panic!("{error}"));
    images.extend([Image::shell(), Image::pause()].map(|it| it.expect("e2e has it")));
    Target::on_this_machine(&images)
}

/// From install to uninstall, and back.
pub async fn life(target: &Target) -> String {
    let started = Instant::now();
    let release = Release::prepare(target).await;
    let said = release.helm(&["install"], &[LIFE]);
    assert!(said.contains("helm test ambient"), "{said}");
    let installed = started.elapsed().as_secs_f64();
    release.test();

    let api = api(&target.kube).await;
    api.create_project(PROJECT).await;
    let short = create(&api, "echo done").await;
    phase(&api, &short, "Completed").await;
    let completed = started.elapsed().as_secs_f64();

    let long = Long::start(&target.kube, &api).await;
    let keys = release.keys().await;
    release.helm(&["upgrade"], &[LIFE, "logLevel=debug", "replicas=3"]);
    release.helm_on_release(&["rollback", "ambient", "1"]);
    long.noticed_nothing().await;
    assert_eq!(release.keys().await, keys);
    phase(&api, &long.id, "Running").await;

    let said = release.helm_on_release(&["uninstall", "ambient"]);
    assert!(said.contains("ambient-cp-keys"), "{said}");
    long.runs_as_before().await;
    assert_eq!(release.keys().await, keys);

    // What comes back finds keys, sessions and messages.
    release.helm(&["install"], &[LIFE]);
    assert_eq!(release.keys().await, keys);
    let api = self::api(&target.kube).await;
    phase(&api, &long.id, "Running").await;
    long.end().await;
    phase(&api, &long.id, "Completed").await;
    format!(", installed after {installed:.0} s, first session done after {completed:.0} s")
}

/// The session API, by its pod's address: this machine knows no Services.
async fn api(kube: &Kube) -> Operator {
    let is_ready = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
    };
    let what = ["pod", "ambient-api-server-0"];
    let pod = kube.wait(NAMESPACE, &what, is_ready).await;
    let address = pod["status"]["podIP"].as_str().unwrap_or_default();
    Operator::new(&format!("http://{address}:8000"), OPERATOR)
}

/// A session that runs while its release changes.
struct Long<'a> {
    kube: &'a Kube,
    id: String,
    /// As it was when it began.
    pod: Value,
}

impl<'a> Long<'a> {
    async fn start(kube: &'a Kube, api: &Operator) -> Self {
        let id = create(api, ASKS).await;
        phase(api, &id, "Running").await;
        let mut long = Self {
            kube,
            id,
            pod: Value::Null,
        };
        long.wait(|tokens| !tokens.is_empty()).await;
        long.pod = long.looks().await;
        long
    }

    /// Each line of its agent.
    async fn says(&self) -> Vec<String> {
        let log = self.kube.log(PROJECT, &pod(&self.id), AGENT).await;
        log.into_iter().map(|(_, line)| line).collect()
    }

    /// What would be another if anything in the pod was started again.
    async fn looks(&self) -> Value {
        let pod = self.kube.get(PROJECT, &["pod", &pod(&self.id)]).await;
        let pod = pod.expect("the session's pod");
        let containers = |which: &str| -> Value {
            let all = pod["status"][which].as_array();
            let all = all.into_iter().flatten();
            all.map(|it| json!([it["containerID"], it["restartCount"]]))
                .collect()
        };
        json!([
            pod["metadata"]["uid"],
            pod["status"]["phase"],
            containers("containerStatuses"),
            containers("initContainerStatuses"),
        ])
    }

    async fn runs_as_before(&self) {
        assert_eq!(self.looks().await, self.pod);
    }

    /// Gets another token yet; each of its calls was taken.
    async fn noticed_nothing(&self) {
        let last = self.tokens().await.pop();
        self.wait(|tokens| tokens.last() != last.as_ref()).await;
        self.runs_as_before().await;
        let said = self.says().await;
        assert!(!said.iter().any(|it| it == "refused"), "{said:#?}");
    }

    /// The tokens that the session API has taken, by hash.
    async fn tokens(&self) -> Vec<String> {
        let said = self.says().await.into_iter();
        let taken = said.filter_map(|it| Some(it.strip_prefix("taken ")?.to_owned()));
        let mut tokens: Vec<_> = taken.collect();
        tokens.dedup();
        tokens
    }

    async fn wait(&self, holds: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !holds(&self.tokens().await) {
            assert!(Instant::now() < deadline, "{:#?}", self.says().await);
            sleep(POLL).await;
        }
    }

    async fn end(&self) {
        self.runs_as_before().await;
        let pod = pod(&self.id);
        let end = ["exec", "--namespace", PROJECT, &pod, "--container", AGENT];
        let touch = ["--", "touch", "/tmp/end"];
        self.kube.run(&[end.as_slice(), &touch].concat()).await;
    }
}

/// A session whose agent is this shell script.
async fn create(api: &Operator, script: &str) -> String {
    let command = json!(["sh", "-c", script]).to_string();
    let annotations = json!({
        "ambient-code.io/agent-command": command,
        "ambient-code.io/agent-io": "none",
    });
    let overrides = json!({"cpu": "100m", "memory": "128Mi"});
    let body = json!({
        "name": "a session", "project_id": PROJECT,
        "annotations": annotations.to_string(), "resource_overrides": overrides.to_string(),
    });
    let (status, session) = api.request(Method::POST, "/sessions", Some(&body)).await;
    assert_eq!(status, StatusCode::CREATED, "{session}");
    session["id"].as_str().expect("an id").to_owned()
}

async fn phase(api: &Operator, id: &str, phase: &str) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let (_, session) = api
            .request(Method::GET, &format!("/sessions/{id}"), None)
            .await;
        if session["phase"] == phase {
            return;
        }
        assert!(Instant::now() < deadline, "not {phase}: {session:#}");
        sleep(POLL).await;
    }
}
