//! The controller with our own API server, over real sockets.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use ambient_api_server::{Database, Server, Settings};
use ambient_control_plane::sessions::SessionCache;
use ambient_shared::{api::Api, clock::Clock, proto};
use ambient_testing::{DEADLINE, ports::Port};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::scene::{Call, Changes, FakeIssuer, Plan, Recording, controller, id, until};

pub const SERVICE: &str = "service-token";
pub const OPERATOR: &str = "operator-token";

/// An API server with its database in a file.
pub struct RealApi {
    pub rest: SocketAddr,
    pub grpc: SocketAddr,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl RealApi {
    pub async fn start(database: &Path, rest: SocketAddr, grpc: SocketAddr) -> Self {
        Self::serve(Settings {
            rest_listen: rest,
            grpc_listen: grpc,
            database: Database::File(database.to_owned()),
            api_token: Some(SERVICE.to_owned().into()),
            operator_token: Some(OPERATOR.to_owned().into()),
            ..Settings::default()
        })
        .await
    }

    pub async fn serve(settings: Settings) -> Self {
        let server = Server::bind(settings, Clock::system()).await.unwrap();
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let (rest, grpc) = (server.rest_address(), server.grpc_address());
        let stop = shutdown.clone();
        running.spawn(async move { server.run(stop).await.unwrap() });
        Self {
            rest,
            grpc,
            shutdown,
            running,
        }
    }

    pub async fn stop(mut self) {
        self.shutdown.cancel();
        timeout(DEADLINE, self.running.join_next()).await.unwrap();
    }

    pub async fn call(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        let url = format!("http://{}/api/ambient/v1{path}", self.rest);
        let mut request = reqwest::Client::new()
            .request(method, url)
            .bearer_auth(OPERATOR);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        assert!(
            response.status().is_success(),
            "{}",
            response.text().await.unwrap()
        );
        let text = response.text().await.unwrap();
        serde_json::from_str(&text).unwrap_or_default()
    }

    async fn create(&self) -> String {
        let body = json!({"name": "a session", "project_id": "team-a", "prompt": "hello"});
        let session = self
            .call(reqwest::Method::POST, "/sessions", Some(body))
            .await;
        session["id"].as_str().unwrap().to_owned()
    }

    async fn post(&self, path: &str) {
        self.call(reqwest::Method::POST, path, None).await;
    }
}

struct Scene {
    backend: Arc<Recording>,
    cache: SessionCache,
    api: Api,
    changes: Changes,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Scene {
    fn start(real: &RealApi, plan: &Plan) -> Self {
        let issuer = Arc::new(FakeIssuer::new(plan.token_life));
        let rest = format!("http://{}", real.rest);
        let (controller, api) = controller(plan, &rest, &real.grpc.to_string(), SERVICE, &issuer);
        let changes = Changes::default();
        let observer = controller.observer();
        let backend = Arc::new(Recording::new(observer, plan.lag, Arc::clone(&changes)));
        let cache = controller.cache();
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let run = controller.run(Arc::clone(&backend) as _, shutdown.clone());
        running.spawn(async move { run.await.unwrap() });
        Self {
            backend,
            cache,
            api,
            changes,
            shutdown,
            running,
        }
    }

    async fn until_started(&self, session: &str, generation: u32) {
        let start = Call::Start(id(session), generation);
        until(&self.changes, "it is started", || {
            self.backend.count(&start) == 1
        })
        .await;
    }

    /// Waits until the API server says so; the watch tells of changes.
    async fn until_phase(&self, session: &str, phase: &str) {
        let seen = async {
            let mut client = self.api.sessions();
            let mut events = client
                .watch_sessions(proto::WatchSessionsRequest {})
                .await
                .unwrap()
                .into_inner();
            loop {
                let request = proto::GetSessionRequest {
                    id: session.to_owned(),
                };
                let now = client.get_session(request).await.unwrap().into_inner();
                if now.phase.as_deref() == Some(phase) {
                    return now;
                }
                events.message().await.unwrap();
            }
        };
        assert!(
            timeout(DEADLINE, seen).await.is_ok(),
            "{session} is not {phase}"
        );
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running.join_next()).await;
        ended.unwrap().unwrap().unwrap();
    }
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test]
async fn a_session_lives_its_life_with_our_api_server() {
    let folder = tempfile::tempdir().unwrap();
    let real = RealApi::start(&folder.path().join("db"), any(), any()).await;
    let scene = Scene::start(&real, &Plan::default());
    let session = real.create().await;
    scene.until_started(&session, 0).await;
    scene.until_phase(&session, "Running").await;

    real.post(&format!("/sessions/{session}/stop")).await;
    let stop = Call::Stop(id(&session));
    until(&scene.changes, "it is stopped", || {
        scene.backend.count(&stop) >= 1
    })
    .await;
    scene.backend.ends(&session, 143);
    scene.until_phase(&session, "Stopped").await;

    real.post(&format!("/sessions/{session}/start")).await;
    scene.until_started(&session, 1).await;
    scene.until_phase(&session, "Running").await;
    scene.backend.ends(&session, 0);
    scene.until_phase(&session, "Completed").await;

    real.call(
        reqwest::Method::DELETE,
        &format!("/sessions/{session}"),
        None,
    )
    .await;
    until(&scene.changes, "it is removed", || scene.backend.is_empty()).await;
    scene.stop().await;
    real.stop().await;
}

#[tokio::test]
async fn an_api_server_that_restarts_finds_everybody_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("db");
    let ports = [Port::free(), Port::free()];
    let [rest, grpc] = ports.each_ref().map(Port::address);
    let real = RealApi::start(&database, rest, grpc).await;
    let scene = Scene::start(&real, &Plan::default());
    let ends = real.create().await;
    let stays = real.create().await;
    for session in [&ends, &stays] {
        scene.until_phase(session, "Running").await;
    }

    real.stop().await;
    // Ends while nobody can be told.
    scene.backend.ends(&ends, 0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let real = RealApi::start(&database, rest, grpc).await;
    let new = real.create().await;

    scene.until_started(&new, 0).await;
    scene.until_phase(&ends, "Completed").await;
    scene.until_phase(&stays, "Running").await;
    assert_eq!(scene.backend.calls().len(), 3);
    assert!(scene.cache.is_synced());
    scene.stop().await;
    real.stop().await;
}

#[tokio::test]
async fn hundreds_of_sessions_that_wait_for_the_controller_are_all_started() {
    let folder = tempfile::tempdir().unwrap();
    let real = RealApi::start(&folder.path().join("db"), any(), any()).await;
    let mut sessions = Vec::new();
    for _ in 0..600 {
        sessions.push(real.create().await);
    }
    let scene = Scene::start(&real, &Plan::default());
    until(&scene.changes, "all started", || {
        scene.backend.calls().len() == 600
    })
    .await;
    for session in &sessions {
        assert_eq!(scene.backend.count(&Call::Start(id(session), 0)), 1);
    }
    scene.stop().await;
    real.stop().await;
}
