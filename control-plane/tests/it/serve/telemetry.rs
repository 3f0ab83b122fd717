//! What the program tells of itself: traces, and log lines that follow a session.

use std::{net::SocketAddr, time::Duration};

use ambient_shared::{
    bearer::PublicKey,
    client::{http_client_to, trust_roots},
    clock::Clock,
    exchange::Exchange,
    proof::SessionKey,
    resolve::Resolver,
    session::SessionId,
    token::Token,
};
use ambient_testing::{
    cluster::Cluster, collector::Collector, metrics::is_in_table, programs::Running,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout},
};

use super::{DEADLINE, RealApi, SERVICE, api, create, program, ready, set_status, until_phase};

const COLLECTOR_SECRET: &str = "collector-password";

/// A session that runs.
struct Session<'a> {
    api: &'a RealApi,
    project: &'static str,
    id: String,
}

impl<'a> Session<'a> {
    async fn run(api: &'a RealApi, project: &'static str) -> Self {
        let id = create(api, project).await;
        let session = Self { api, project, id };
        let cluster = Cluster::shared();
        let pod = session.pod();
        cluster.wait_for(&session.path("pods", &pod), |it| it["metadata"].is_object());
        cluster.bind_pod(project, &pod, "serve-node");
        session.set_status("Running", &json!({"running": {"startedAt": AT}}));
        until_phase(api, &session.id, "Running").await;
        session
    }

    fn pod(&self) -> String {
        format!("session-{}-runner", self.id)
    }

    fn path(&self, resource: &str, name: &str) -> String {
        format!("/api/v1/namespaces/{}/{resource}/{name}", self.project)
    }

    fn set_status(&self, phase: &str, state: &Value) {
        set_status(self.project, &self.pod(), phase, state);
    }

    fn hash(&self) -> String {
        SessionId::parse(self.id.as_str())
            .unwrap()
            .hash()
            .to_string()
    }

    fn key(&self) -> String {
        let secret = format!("session-{}-creds", self.id);
        let secret = Cluster::shared().get(&self.path("secrets", &secret));
        let key = secret.unwrap()["data"]["session-key"]
            .as_str()
            .unwrap()
            .to_owned();
        String::from_utf8(STANDARD.decode(key).unwrap()).unwrap()
    }

    /// Asks for a token as its runner does.
    async fn exchange(&self, endpoint: SocketAddr) -> Token {
        let pod = Cluster::shared()
            .get(&self.path("pods", &self.pod()))
            .unwrap();
        let environment = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        let mut environment = environment.iter();
        let public = environment.find(|it| it["name"] == "AMBIENT_CP_TOKEN_PUBLIC_KEY");
        let public = PublicKey::from_pem(public.unwrap()["value"].as_str().unwrap()).unwrap();
        let id = SessionId::parse(self.id.as_str()).unwrap();
        let url = format!("http://{endpoint}/token").parse().unwrap();
        let roots = trust_roots(None).unwrap();
        let client = http_client_to(&url, &Resolver::system(), roots, DEADLINE).unwrap();
        let bearer = public.encrypt(&id).unwrap();
        let key = SessionKey::from_text(&self.key());
        let exchange = Exchange::new(client, url, bearer, key, Clock::system());
        timeout(DEADLINE, exchange.fetch()).await.unwrap().unwrap()
    }

    async fn complete(&self) {
        let ended = json!({"terminated": {"exitCode": 0, "startedAt": AT, "finishedAt": AT}});
        self.set_status("Succeeded", &ended);
        until_phase(self.api, &self.id, "Completed").await;
    }

    async fn delete(&self) {
        let path = format!("/sessions/{}", self.id);
        self.api.call(Method::DELETE, &path, None).await;
        Cluster::shared().finish_pod(self.project, &self.pod());
        Cluster::shared().wait_gone(&self.path("pods", &self.pod()));
    }
}

const AT: &str = "2026-01-01T00:00:00Z";

async fn ends(mut program: Running) -> Running {
    program.signal(Signal::SIGTERM);
    assert_eq!(program.wait().await.code(), Some(0));
    program
}

async fn metrics(admin: SocketAddr) -> String {
    let page = reqwest::get(format!("http://{admin}/metrics")).await;
    page.unwrap().text().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_sees_exchanges_and_reconciles_and_no_secret() {
    let (api, _folder) = api().await;
    let collector = Collector::start().await;
    let mut control_plane = program(&api, "serve-traced")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint())
        .env(
            "OTEL_EXPORTER_OTLP_HEADERS",
            format!("authorization=Basic%20{COLLECTOR_SECRET}"),
        )
        .env("OTEL_BSP_SCHEDULE_DELAY", "100")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        .start();
    let admin = control_plane.listening("admin").await;
    let endpoint = control_plane.listening("endpoint").await;
    ready(admin).await;
    let session = Session::run(&api, "serve-traced-team").await;
    let token = session.exchange(endpoint).await;

    let hash = session.hash();
    let exchange = collector
        .span("of the exchange", |it| {
            it.name == "token exchange" && it.attribute("session") == hash
        })
        .await;
    assert_eq!(exchange.service, "ambient-control-plane");
    assert_eq!(exchange.attribute("result"), "ok");
    assert_eq!((exchange.parent.as_str(), exchange.failed), ("", false));
    let reconcile = collector
        .span("of the start", |it| {
            it.name == "reconcile"
                && it.attribute("session") == hash
                && it.attribute("handler") == "provision"
                && it.attribute("result") == "ok"
                && it.events.iter().any(|event| event == "session started")
        })
        .await;
    for (what, of) in [("issue token", &exchange), ("issue token", &reconcile)] {
        let within = |it: &_| is_within(it, what, of);
        collector.span("of the issue", within).await;
    }
    let made =
        |it: &_| is_within(it, "Kubernetes call", &reconcile) && it.attribute("verb") == "create";
    let made = collector.span("of what was created", made).await;
    assert_eq!(made.attribute("code"), "201");
    let told = collector
        .span("of the phase's write", |it| {
            is_within(it, "API call", &reconcile) && it.attribute("call") == "UpdateSessionStatus"
        })
        .await;
    assert_eq!(told.attribute("code"), "Ok");
    collector.span("of a tick", |it| it.name == "refresh").await;

    // Log lines lead to the trace.
    let line = control_plane
        .log_line("the start with its trace", |it| {
            it["message"] == "session started"
        })
        .await;
    assert_eq!(line["trace_id"], *reconcile.trace);
    let page = metrics(admin).await;
    assert!(page.contains("ambient_trace_spans_total{result=\"exported\"}"));
    is_in_table(&page);
    for line in [
        "ambient_control_plane_session_start_delay_seconds_count 1",
        "ambient_control_plane_token_exchange_duration_seconds_count{result=\"ok\"} 1",
        "ambient_control_plane_leader 1",
    ] {
        assert!(page.lines().any(|it| it == line), "no {line} in\n{page}");
    }

    let control_plane = ends(control_plane).await;
    let names = [
        "token exchange",
        "reconcile",
        "refresh",
        "replace token",
        "issue token",
        "identity provider",
        "Kubernetes call",
        "API call",
    ];
    for span in collector.spans() {
        assert!(names.contains(&span.name.as_str()), "{span:?}");
    }
    let key = session.key();
    assert!(collector.was_told(&hash), "what is told is found");
    for secret in [
        session.id.as_str(),
        SERVICE,
        token.expose(),
        &key,
        COLLECTOR_SECRET,
    ] {
        assert!(!collector.was_told(secret), "{secret}");
        for line in control_plane.log() {
            assert!(!line.contains(secret), "{line}");
        }
    }
    let sent = format!("Basic {COLLECTOR_SECRET}");
    assert!(
        collector
            .headers()
            .iter()
            .all(|it| it["authorization"] == *sent)
    );
}

fn is_within(
    span: &ambient_testing::collector::Span,
    name: &str,
    of: &ambient_testing::collector::Span,
) -> bool {
    span.name == name && span.trace == of.trace && span.parent == of.id
}

/// Somebody who takes connections and never answers.
async fn silent() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_collector_the_program_works_and_ends_as_ever() {
    let (api, _folder) = api().await;
    let silent = silent().await;
    let collector = format!("http://{}", silent.local_addr().unwrap());
    let mut control_plane = program(&api, "serve-untraced")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        .env("OTEL_EXPORTER_OTLP_TIMEOUT", "200")
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
        .start();
    let admin = control_plane.listening("admin").await;
    let endpoint = control_plane.listening("endpoint").await;
    ready(admin).await;
    let session = Session::run(&api, "serve-untraced-team").await;
    let asked = Instant::now();
    session.exchange(endpoint).await;
    // With room for a slow machine: a try of an export takes 200 ms, and would be waited for.
    assert!(asked.elapsed() < Duration::from_secs(5));

    let failed = async {
        loop {
            let page = metrics(admin).await;
            let count = page.lines().find_map(|line| {
                line.strip_prefix("ambient_trace_spans_total{result=\"failed\"} ")
            });
            if count.and_then(|it| it.parse::<u64>().ok()) > Some(20) {
                return;
            }
            session.exchange(endpoint).await;
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(DEADLINE, failed).await.expect("exports fail");
    let asked = Instant::now();
    let control_plane = ends(control_plane).await;
    assert!(asked.elapsed() < Duration::from_secs(15));
    let told = control_plane.log().into_iter();
    let told = told.filter(|line| line.contains("traces cannot be exported"));
    assert_eq!(told.count(), 1, "{:#?}", control_plane.log());
}

/// What happened to a session, by the log lines that have its hash.
fn story(program: &Running, hash: &str) -> Vec<Value> {
    let lines = program.log().into_iter().filter(|line| line.contains(hash));
    lines
        .filter_map(|line| serde_json::from_str(&line).ok())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sessions_hash_leads_to_all_that_happened_to_it() {
    let (api, _folder) = api().await;
    let mut control_plane = program(&api, "serve-story")
        // Short enough to be due at once.
        .env("CP_TOKEN_TTL", "60s")
        .env("LOG_LEVEL", "info,ambient_control_plane::refresh=debug")
        .start();
    let admin = control_plane.listening("admin").await;
    let endpoint = control_plane.listening("endpoint").await;
    ready(admin).await;
    let session = Session::run(&api, "serve-story-team").await;
    let token = session.exchange(endpoint).await;
    let hash = session.hash();
    let replaced = |it: &Value| it["message"] == "token replaced" && it["session"] == *hash;
    control_plane
        .log_line("a token that was pushed", replaced)
        .await;
    session.complete().await;
    session.delete().await;
    control_plane
        .log_line("the clean-up", |it| {
            it["message"] == "deleted session cleaned up"
        })
        .await;
    let page = metrics(admin).await;
    assert!(
        page.contains("ambient_control_plane_refresh_lag_seconds_count "),
        "{page}"
    );
    let control_plane = ends(control_plane).await;

    let story = story(&control_plane, &hash);
    let steps = [
        ("session created", "phase", "Pending"),
        ("session is being started", "generation", "0"),
        ("pod created", "namespace", "serve-story-team"),
        ("session started", "generation", "0"),
        ("session's phase written", "phase", "Running"),
        ("token exchange", "token", &token.hash().to_string()),
        ("session's phase written", "phase", "Completed"),
        ("session deleted", "session", &hash),
        ("deleted session cleaned up", "", ""),
    ];
    let mut lines = story.iter();
    for (message, field, value) in steps {
        let shown = |line: &Value| match &line[field] {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let found = lines.any(|it| it["message"] == message && shown(it) == value);
        assert!(
            found,
            "no {message:?} with {field} {value} in its place in {story:#?}"
        );
    }
    for line in control_plane.log() {
        assert!(!line.contains(&session.id), "{line}");
        assert!(!line.contains(token.expose()), "{line}");
    }
}
