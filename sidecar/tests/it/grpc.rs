//! gRPC through the proxy: cleartext in, calls and streams both ways, statuses.

use std::{net::SocketAddr, pin::Pin};

use ambient_shared::proto::{
    self, SessionMessage,
    session_service_client::SessionServiceClient,
    session_service_server::{SessionService, SessionServiceServer},
};
use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::{Stream, wrappers::ReceiverStream, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, service::Routes};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};

use crate::scene::{NOWHERE, Scene, mount, program, volume};

/// A session API with two methods.
pub struct Api {
    /// The token that is accepted; any when empty.
    accepted: watch::Receiver<String>,
    /// Runs before a refusal is answered.
    on_refusal: Box<dyn Fn() + Send + Sync>,
}

impl Api {
    pub fn routes(
        accepted: watch::Receiver<String>,
        on_refusal: impl Fn() + Send + Sync + 'static,
    ) -> Routes {
        let api = Self {
            accepted,
            on_refusal: Box::new(on_refusal),
        };
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .build_v1()
            .unwrap();
        Routes::new(SessionServiceServer::new(api)).add_service(reflection)
    }

    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let accepted = self.accepted.borrow().clone();
        let shown: Vec<_> = request.metadata().get_all("authorization").iter().collect();
        if accepted.is_empty() || shown == [format!("Bearer {accepted}").as_str()] {
            return Ok(());
        }
        (self.on_refusal)();
        Err(Status::unauthenticated("who are you?"))
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("not here"))
}

#[tonic::async_trait]
impl SessionService for Api {
    type WatchSessionsStream =
        Pin<Box<dyn Stream<Item = Result<proto::SessionWatchEvent, Status>> + Send>>;
    type WatchSessionMessagesStream = ReceiverStream<Result<SessionMessage, Status>>;

    async fn push_session_message(
        &self,
        request: Request<proto::PushSessionMessageRequest>,
    ) -> Result<Response<SessionMessage>, Status> {
        self.check(&request)?;
        let echo = request.metadata().get("ambient-message-id").cloned();
        let pushed = request.into_inner();
        let mut answer = Response::new(SessionMessage {
            session_id: pushed.session_id,
            payload: pushed.payload,
            seq: 1,
            ..SessionMessage::default()
        });
        if let Some(echo) = echo {
            answer.metadata_mut().insert("ambient-message-id", echo);
        }
        Ok(answer)
    }

    /// Three messages, then an end with a status in the trailers.
    async fn watch_session_messages(
        &self,
        request: Request<proto::WatchSessionMessagesRequest>,
    ) -> Result<Response<Self::WatchSessionMessagesStream>, Status> {
        self.check(&request)?;
        let (sender, receiver) = mpsc::channel(8);
        for seq in 1..=3 {
            let message = SessionMessage {
                seq,
                ..SessionMessage::default()
            };
            sender.send(Ok(message)).await.unwrap();
        }
        let slow = Status::aborted("too slow: list again");
        sender.send(Err(slow)).await.unwrap();
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn watch_sessions(
        &self,
        _: Request<proto::WatchSessionsRequest>,
    ) -> Answer<Self::WatchSessionsStream> {
        not_here()
    }

    async fn get_session(&self, _: Request<proto::GetSessionRequest>) -> Answer<proto::Session> {
        not_here()
    }

    async fn create_session(
        &self,
        _: Request<proto::CreateSessionRequest>,
    ) -> Answer<proto::Session> {
        not_here()
    }

    async fn update_session(
        &self,
        _: Request<proto::UpdateSessionRequest>,
    ) -> Answer<proto::Session> {
        not_here()
    }

    async fn update_session_status(
        &self,
        _: Request<proto::UpdateSessionStatusRequest>,
    ) -> Answer<proto::Session> {
        not_here()
    }

    async fn delete_session(
        &self,
        _: Request<proto::DeleteSessionRequest>,
    ) -> Answer<proto::DeleteSessionResponse> {
        not_here()
    }

    async fn list_sessions(
        &self,
        _: Request<proto::ListSessionsRequest>,
    ) -> Answer<proto::ListSessionsResponse> {
        not_here()
    }
}

struct Server {
    address: SocketAddr,
    _running: JoinSet<()>,
}

impl Server {
    async fn start(routes: Routes) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut running = JoinSet::new();
        running.spawn(async move {
            tonic::transport::Server::builder()
                .add_routes(routes)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self {
            address,
            _running: running,
        }
    }
}

/// A client without any credential.
pub async fn connect(scene: &Scene) -> tonic::transport::Channel {
    tonic::transport::Endpoint::from_shared(format!("http://{}", scene.proxy))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

pub fn push(payload: &str) -> proto::PushSessionMessageRequest {
    proto::PushSessionMessageRequest {
        session_id: "session".to_owned(),
        event_type: "assistant".to_owned(),
        payload: payload.to_owned(),
    }
}

/// A sidecar whose REST upstream is nowhere: gRPC has an address of its own.
async fn scene(token: &str, grpc: SocketAddr) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, token);
    let program = program(&dir, NOWHERE).args(["--grpc-upstream", &format!("http://{grpc}")]);
    let scene = Scene::start(program, dir).await;
    scene.ready().await;
    scene
}

#[tokio::test]
async fn calls_and_streams_carry_the_token_and_their_trailers() {
    let (_accepted, accepts) = watch::channel("one".to_owned());
    let server = Server::start(Api::routes(accepts, || {})).await;
    let scene = scene("one", server.address).await;
    let mut client = SessionServiceClient::new(connect(&scene).await);

    let mut request = Request::new(push("hello"));
    let metadata = request.metadata_mut();
    metadata.insert("ambient-message-id", "m-1".parse().unwrap());
    metadata.insert("authorization", "Bearer mine".parse().unwrap());
    let answer = client.push_session_message(request).await.unwrap();
    assert_eq!(answer.metadata().get("ambient-message-id").unwrap(), "m-1");
    assert_eq!(answer.into_inner().payload, "hello");

    let request = proto::WatchSessionMessagesRequest::default();
    let mut stream = client
        .watch_session_messages(request)
        .await
        .unwrap()
        .into_inner();
    for seq in 1..=3 {
        assert_eq!(stream.message().await.unwrap().unwrap().seq, seq);
    }
    let end = stream.message().await.unwrap_err();
    assert_eq!(
        (end.code(), end.message()),
        (Code::Aborted, "too slow: list again")
    );
    let status = client
        .get_session(proto::GetSessionRequest::default())
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn both_sides_of_a_stream_can_take_turns() {
    let (_accepted, accepts) = watch::channel(String::new());
    let server = Server::start(Api::routes(accepts, || {})).await;
    let scene = scene("one", server.address).await;
    let (ask, asks) = mpsc::channel(1);
    let question = || ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    ask.send(question()).await.unwrap();
    let answers = ServerReflectionClient::new(connect(&scene).await)
        .server_reflection_info(ReceiverStream::new(asks))
        .await;
    let mut answers = answers.unwrap().into_inner();
    for _ in 0..5 {
        let answer = timeout(DEADLINE, answers.message()).await.unwrap().unwrap();
        assert!(answer.is_some());
        ask.send(question()).await.unwrap();
    }
    drop(ask);
    while timeout(DEADLINE, answers.message())
        .await
        .unwrap()
        .unwrap()
        .is_some()
    {}
}

#[tokio::test]
async fn a_call_that_is_not_signed_in_is_made_again_with_the_fresh_token() {
    let (_accepted, accepts) = watch::channel("two".to_owned());
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let secret = volume(&dir);
    let routes = Api::routes(accepts, move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });
    let server = Server::start(routes).await;
    let program = program(&dir, &format!("http://{}", server.address));
    let scene = Scene::start(program, dir).await;
    scene.ready().await;

    let mut client = SessionServiceClient::new(connect(&scene).await);
    let answer = client.push_session_message(push("hello")).await.unwrap();
    assert_eq!(answer.into_inner().payload, "hello");
    assert_eq!(
        scene.metric("ambient_sidecar_replays_total").await,
        Some(1.0)
    );
}

#[tokio::test]
async fn a_stream_that_is_not_signed_in_is_begun_again() {
    let (accepted, accepts) = watch::channel("two".to_owned());
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let secret = volume(&dir);
    let routes = Api::routes(accepts, move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });
    let server = Server::start(routes).await;
    let scene = Scene::start(program(&dir, &format!("http://{}", server.address)), dir).await;
    scene.ready().await;
    let mut client = SessionServiceClient::new(connect(&scene).await);
    let request = proto::WatchSessionMessagesRequest::default();
    let mut stream = client
        .watch_session_messages(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().seq, 1);

    // For good: the caller is told.
    accepted.send("never".to_owned()).unwrap();
    let status = client.watch_session_messages(request).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unauthenticated, "who are you?")
    );
}

#[tokio::test]
async fn a_server_that_restarts_is_found_again() {
    let (_accepted, accepts) = watch::channel(String::new());
    let first = Server::start(Api::routes(accepts.clone(), || {})).await;
    let relay = Relay::start(first.address).await;
    let scene = scene("one", relay.address()).await;
    let mut client = SessionServiceClient::new(connect(&scene).await);
    client.push_session_message(push("1")).await.unwrap();
    relay.set(Mode::Refuse).await;
    relay.reset();
    drop(first);
    // The first may still meet the broken connection.
    let _ = client.push_session_message(push("2")).await;
    let status = client.push_session_message(push("2")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    let second = Server::start(Api::routes(accepts, || {})).await;
    relay.set_server(second.address);
    relay.set(Mode::Pass).await;
    let answer = client.push_session_message(push("3")).await.unwrap();
    assert_eq!(answer.into_inner().payload, "3");
}

#[tokio::test]
async fn failures_are_grpc_statuses() {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::start(program(&dir, NOWHERE), dir).await;
    let mut client = SessionServiceClient::new(connect(&scene).await);
    let status = client.push_session_message(push("x")).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "there is no API token yet")
    );
    scene.mount("one");
    let status = client.push_session_message(push("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("cannot reach the API server"),
        "{status:?}"
    );

    let mut page = Request::new(push("x"));
    page.metadata_mut()
        .insert("origin", "http://evil.example".parse().unwrap());
    let status = client.push_session_message(page).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("Origin"), "{status:?}");
}
