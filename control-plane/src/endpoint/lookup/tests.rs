//! Against an API server that answers as a test says.

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use ambient_shared::{
    client, proto,
    proto::session_service_server::{SessionService, SessionServiceServer},
    resolve::Resolver,
    token::Token,
};
use futures_util::future::{BoxFuture, join_all};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response};

use super::*;
use crate::backend::{
    BackendError, Credentials, DesiredRun, RunEnd, RunState, RunStatus, TokenTimes,
};

/// Answers GET of a session; nothing else.
#[derive(Clone, Default)]
struct ApiServer {
    phases: Arc<Mutex<HashMap<String, String>>>,
    down: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

type Reply<T> = Result<Response<T>, Status>;
type Nothing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for ApiServer {
    type WatchSessionsStream = Nothing<proto::SessionWatchEvent>;
    type WatchSessionMessagesStream = Nothing<proto::SessionMessage>;

    async fn get_session(&self, request: Request<GetSessionRequest>) -> Reply<proto::Session> {
        self.asked.fetch_add(1, Ordering::AcqRel);
        // Long enough for the others of a flight to come.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if self.down.load(Ordering::Acquire) {
            return Err(Status::unavailable("down"));
        }
        let id = request.into_inner().id;
        let phase = self.phases.lock().unwrap().get(&id).cloned();
        let phase = phase.ok_or_else(|| Status::not_found("no such session"))?;
        Ok(Response::new(object(&id, &phase, 2)))
    }

    async fn create_session(
        &self,
        _: Request<proto::CreateSessionRequest>,
    ) -> Reply<proto::Session> {
        Err(Status::unimplemented("not here"))
    }

    async fn update_session(
        &self,
        _: Request<proto::UpdateSessionRequest>,
    ) -> Reply<proto::Session> {
        Err(Status::unimplemented("not here"))
    }

    async fn update_session_status(
        &self,
        _: Request<proto::UpdateSessionStatusRequest>,
    ) -> Reply<proto::Session> {
        Err(Status::unimplemented("not here"))
    }

    async fn delete_session(
        &self,
        _: Request<proto::DeleteSessionRequest>,
    ) -> Reply<proto::DeleteSessionResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn list_sessions(
        &self,
        _: Request<proto::ListSessionsRequest>,
    ) -> Reply<proto::ListSessionsResponse> {
        Err(Status::unimplemented("not here"))
    }

    async fn watch_sessions(
        &self,
        _: Request<proto::WatchSessionsRequest>,
    ) -> Reply<Self::WatchSessionsStream> {
        Err(Status::unimplemented("not here"))
    }

    async fn push_session_message(
        &self,
        _: Request<proto::PushSessionMessageRequest>,
    ) -> Reply<proto::SessionMessage> {
        Err(Status::unimplemented("not here"))
    }

    async fn watch_session_messages(
        &self,
        _: Request<proto::WatchSessionMessagesRequest>,
    ) -> Reply<Self::WatchSessionMessagesStream> {
        Err(Status::unimplemented("not here"))
    }
}

/// Knows the run state of one session.
#[derive(Default)]
struct Runs(HashMap<SessionId, RunState>);

impl Backend for Runs {
    fn lag(&self) -> Duration {
        Duration::ZERO
    }

    fn start<'a>(
        &'a self,
        _: &'a DesiredRun,
        _: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(std::future::ready(Err(BackendError::NotFound)))
    }

    fn stop<'a>(&'a self, _: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(std::future::ready(Err(BackendError::NotFound)))
    }

    fn remove<'a>(&'a self, _: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(std::future::ready(Err(BackendError::NotFound)))
    }

    fn run_state(&self, id: &SessionId) -> Option<RunState> {
        self.0.get(id).cloned()
    }

    fn token_times(&self, _: &SessionId) -> Option<TokenTimes> {
        None
    }

    fn write_token<'a>(
        &'a self,
        _: &'a SessionId,
        _: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(std::future::ready(Err(BackendError::NotFound)))
    }

    fn sees_all(&self) -> bool {
        true
    }

    fn sessions(&self) -> Vec<SessionId> {
        self.0.keys().cloned().collect()
    }
}

struct Scene {
    server: ApiServer,
    sessions: SessionCache,
    standing_of: StandingOf,
    _running: JoinSet<()>,
}

async fn scene(runs: Runs) -> Scene {
    let server = ApiServer::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = client::GrpcAddress {
        address: listener.local_addr().unwrap().to_string(),
        tls: false,
        ca: None,
    };
    let mut running = JoinSet::new();
    let answering = server.clone();
    running.spawn(async move {
        tonic::transport::Server::builder()
            .add_service(SessionServiceServer::new(answering))
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    let token = watch::channel(Some(Token::new("service", None).unwrap())).1;
    let api = Api::new(
        client::grpc_channel(&Resolver::system(), &to).unwrap(),
        token,
    );
    let sessions = SessionCache::new();
    Scene {
        server,
        standing_of: Lookup::new(sessions.clone(), api, Arc::new(runs)).into_standing_of(),
        sessions,
        _running: running,
    }
}

impl Scene {
    async fn standing(&self, id: &str) -> Standing {
        (self.standing_of)(self::id(id)).await
    }

    fn asked(&self) -> usize {
        self.server.asked.load(Ordering::Acquire)
    }

    fn is_synced(&self) {
        let now = self.sessions.revision();
        self.sessions.complete_list(&HashSet::new(), now);
    }

    /// The cache has this of the session.
    fn knows(&self, id: &str, phase: &str, generation: i32) {
        let object = object(id, phase, generation);
        self.sessions
            .apply_event(Session::try_from(object).unwrap());
    }

    /// The API server has it, restarted twice.
    fn has(&self, id: &str, phase: &str) {
        let mut phases = self.server.phases.lock().unwrap();
        phases.insert(id.to_owned(), phase.to_owned());
    }
}

fn object(id: &str, phase: &str, restarts: i32) -> proto::Session {
    proto::Session {
        metadata: Some(proto::ObjectReference {
            id: id.to_owned(),
            ..Default::default()
        }),
        phase: Some(phase.to_owned()),
        sdk_restart_count: Some(restarts),
        ..Default::default()
    }
}

fn id(id: &str) -> SessionId {
    SessionId::parse(id).unwrap()
}

#[tokio::test]
async fn an_unknown_session_is_asked_for_once_at_a_time() {
    let scene = scene(Runs::default()).await;
    scene.is_synced();
    scene.has("session-0001", "Running");
    let all = join_all((0..100).map(|_| scene.standing("session-0001"))).await;
    assert!(
        all.iter()
            .all(|standing| *standing == Standing::Active { generation: 2 }),
        "{all:?}"
    );
    assert_eq!(scene.asked(), 1);
}

#[tokio::test]
async fn a_miss_is_remembered() {
    let scene = scene(Runs::default()).await;
    scene.is_synced();
    assert_eq!(scene.standing("session-0001").await, Standing::Unknown);
    assert_eq!(scene.standing("session-0001").await, Standing::Unknown);
    assert_eq!(scene.asked(), 1);
    assert_eq!(scene.standing("session-0002").await, Standing::Unknown);
    assert_eq!(scene.asked(), 2);
}

#[tokio::test]
async fn a_failure_is_no_answer_and_not_remembered() {
    let scene = scene(Runs::default()).await;
    scene.is_synced();
    scene.server.down.store(true, Ordering::Release);
    assert_eq!(scene.standing("session-0001").await, Standing::NotSynced);
    scene.server.down.store(false, Ordering::Release);
    scene.has("session-0001", "Completed");
    assert_eq!(scene.standing("session-0001").await, Standing::Inactive);
}

#[tokio::test]
async fn a_live_run_tells_of_a_restart_that_the_cache_has_missed() {
    let live = |generation| RunState {
        generation,
        status: RunStatus::Starting { waits_for: None },
        namespace: None,
        keypair: None,
    };
    let runs = HashMap::from([
        (id("session-ahead"), live(2)),
        (id("session-behind"), live(1)),
        (id("session-again"), live(2)),
    ]);
    let scene = scene(Runs(runs)).await;
    scene.is_synced();
    scene.knows("session-ahead", "Running", 1);
    scene.knows("session-behind", "Running", 3);
    scene.knows("session-again", "Completed", 1);

    let ahead = scene.standing("session-ahead").await;
    assert_eq!(ahead, Standing::Active { generation: 2 });
    let behind = scene.standing("session-behind").await;
    assert_eq!(behind, Standing::Active { generation: 3 });
    assert_eq!(scene.asked(), 0);

    // Whether an ended session has started anew, a run alone does not decide.
    scene.has("session-again", "Completed");
    assert_eq!(scene.standing("session-again").await, Standing::Inactive);
    assert_eq!(scene.asked(), 1);
}

#[tokio::test]
async fn before_the_first_list_only_what_is_there_counts() {
    let run = |status| RunState {
        generation: 7,
        status,
        namespace: None,
        keypair: None,
    };
    let ended = RunStatus::Ended {
        at: SystemTime::UNIX_EPOCH,
        end: RunEnd::Exited {
            code: 0,
            message: None,
        },
    };
    let runs = HashMap::from([
        (
            id("session-live"),
            run(RunStatus::Starting { waits_for: None }),
        ),
        (id("session-ended"), run(ended)),
    ]);
    let scene = scene(Runs(runs)).await;
    // A live run vouches, without a question.
    assert_eq!(
        scene.standing("session-live").await,
        Standing::Active { generation: 7 }
    );
    assert_eq!(scene.asked(), 0);
    assert_eq!(scene.standing("session-ended").await, Standing::NotSynced);
    scene.has("session-0001", "Running");
    assert_eq!(
        scene.standing("session-0001").await,
        Standing::Active { generation: 2 }
    );

    scene.is_synced();
    assert_eq!(scene.standing("session-ended").await, Standing::Unknown);
}
