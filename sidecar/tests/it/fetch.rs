//! No file mounted: the token is fetched, as by the runner.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use ambient_shared::{clock::Clock, proof::SessionKey};
use ambient_testing::{DEADLINE, keypair::RsaKey, programs::Program};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet, time::Instant};

use crate::{
    scene::{NOWHERE, Scene},
    upstream::Upstream,
};

const SESSION: &str = "0199a000-0000-7000-8000-000000000001";

/// A token endpoint: refuses the first few, then gives `token-1`, `token-2` and so on.
struct TokenEndpoint {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    proven: Arc<Mutex<Vec<Proven>>>,
    _running: JoinSet<()>,
}

/// A bearer and its proof.
type Proven = (String, String);

#[derive(Clone)]
struct Rules {
    asked: Arc<AtomicUsize>,
    proven: Arc<Mutex<Vec<Proven>>>,
    failing: usize,
    life: Duration,
    /// How far behind the sidecar's clock the endpoint's is.
    behind: Duration,
}

impl TokenEndpoint {
    async fn start(failing: usize, life: Duration) -> Self {
        Self::behind(Duration::ZERO, failing, life).await
    }

    async fn behind(behind: Duration, failing: usize, life: Duration) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let proven = Arc::default();
        let rules = Rules {
            asked: Arc::clone(&asked),
            proven: Arc::clone(&proven),
            failing,
            life,
            behind,
        };
        let routes = Router::new().route("/token", get(give)).with_state(rules);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut running = JoinSet::new();
        running.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self {
            address,
            asked,
            proven,
            _running: running,
        }
    }

    fn program(&self, dir: &tempfile::TempDir, upstream: &str) -> Program {
        let key_file = dir.path().join("session-key");
        std::fs::write(&key_file, "a2V5\n").unwrap();
        Program::new("ambient-sidecar")
            .arg("--token-file")
            .arg(dir.path().join("not-mounted/bot-token"))
            .args(["--upstream", upstream])
            .env(
                "AMBIENT_CP_TOKEN_URL",
                format!("http://{}/token", self.address),
            )
            .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", RsaKey::shared().public_pem())
            .env("SESSION_ID", SESSION)
            .env("AMBIENT_SESSION_KEY_FILE", key_file)
    }
}

async fn give(State(rules): State<Rules>, headers: HeaderMap) -> Response {
    let bearer = headers["authorization"].to_str().unwrap();
    assert!(
        bearer.starts_with("Bearer ") && bearer.len() > 600,
        "{bearer}"
    );
    let proof = headers["x-ambient-session-proof"].to_str().unwrap();
    assert!(proof.starts_with("v1 "));
    let bearer = bearer.trim_start_matches("Bearer ").to_owned();
    let proven = (bearer, proof.to_owned());
    rules.proven.lock().unwrap().push(proven);
    let number = rules.asked.fetch_add(1, Ordering::SeqCst) + 1;
    if number <= rules.failing {
        return (StatusCode::INTERNAL_SERVER_ERROR, "not now").into_response();
    }
    let expires_at: SystemTime = Clock::system().now() - rules.behind + rules.life;
    let expires_at = humantime::format_rfc3339(expires_at).to_string();
    Json(json!({"token": format!("token-{number}"), "expires_at": expires_at})).into_response()
}

#[tokio::test]
async fn a_token_is_fetched_with_retries_and_renewed_ahead_of_its_end() {
    let endpoint = TokenEndpoint::start(2, Duration::from_secs(6)).await;
    let dir = tempfile::tempdir().unwrap();
    let program = endpoint.program(&dir, NOWHERE);
    let scene = Scene::start(program, dir).await;
    scene.serves("token-3").await;
    scene.ready().await;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let (status, token) = scene.bare_token().await;
        assert_eq!(status, 200, "a valid token at all times: {token}");
        if seen.last() != Some(&token) {
            seen.push(token);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        scene
            .sidecar
            .log()
            .iter()
            .all(|line| !line.contains(SESSION))
    );
    assert!(
        scene
            .sidecar
            .log()
            .iter()
            .all(|line| !line.contains("token-3"))
    );
}

#[tokio::test]
async fn a_session_key_that_was_replaced_proves_the_next_request() {
    let endpoint = TokenEndpoint::start(0, Duration::from_secs(3)).await;
    let dir = tempfile::tempdir().unwrap();
    let program = endpoint.program(&dir, NOWHERE);
    let key_file = dir.path().join("session-key");
    let scene = Scene::start(program, dir).await;
    scene.ready().await;
    std::fs::write(key_file, "bmV3\n").unwrap();

    let is_proven = |key: &str, (bearer, proof): &Proven| {
        let key = SessionKey::from_text(key).unwrap();
        key.verify(proof, bearer, Clock::system().now()).is_ok()
    };
    let with_new_key = async {
        loop {
            let proven = endpoint.proven.lock().unwrap().clone();
            if proven.iter().any(|it| is_proven("bmV3", it)) {
                return proven;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let proven = tokio::time::timeout(DEADLINE, with_new_key).await.unwrap();
    assert!(is_proven("a2V5", &proven[0]));
}

#[tokio::test]
async fn a_refused_token_is_fetched_again_but_not_in_a_storm() {
    let upstream = Upstream::start().await;
    let endpoint = TokenEndpoint::start(0, Duration::from_secs(600)).await;
    let dir = tempfile::tempdir().unwrap();
    let program = endpoint.program(&dir, &upstream.url());
    let started = Instant::now();
    let scene = Scene::start(program, dir).await;
    scene.ready().await;
    upstream.shared.accept_only("token-2");
    let accepted = async {
        while scene.get("/x").send().await.unwrap().status() != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, accepted).await.unwrap();
    // The refusals stood while the token was younger than what a wish may replace.
    assert!(started.elapsed() >= Duration::from_secs(5));
    assert_eq!(endpoint.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn tokens_that_have_expired_on_arrival_are_not_fetched_in_a_storm() {
    let (behind, life) = (Duration::from_secs(3600), Duration::from_secs(60));
    let endpoint = TokenEndpoint::behind(behind, 0, life).await;
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::start(endpoint.program(&dir, NOWHERE), dir).await;
    let arrived = async {
        while scene.readiness().await.1 != "token has expired\n" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, arrived).await.unwrap();
    // The clock that is ahead may be ours, and the tokens good.
    let asked_on = async {
        while endpoint.asked.load(Ordering::SeqCst) < 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let stormed = tokio::time::timeout(Duration::from_secs(2), asked_on).await;
    assert!(stormed.is_err(), "four times in two seconds");
}
