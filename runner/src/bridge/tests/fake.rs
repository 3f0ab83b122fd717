//! An API server with the habits of the existing one (contract section 4), and what goes wrong.
//!
//! `seq` has gaps; messages may be stored out of order; a watcher gets what is stored, then what
//! comes, unless it reads too slowly: then it loses messages; nothing is sent, not even headers,
//! before the first message; ids are not known unless told otherwise.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use ambient_shared::{
    api::MESSAGE_ID,
    client::{GrpcAddress, grpc_channel},
    proto::{
        CreateSessionRequest, DeleteSessionRequest, DeleteSessionResponse, GetSessionRequest,
        ListSessionsRequest, ListSessionsResponse, PushSessionMessageRequest, Session,
        SessionMessage, SessionWatchEvent, UpdateSessionRequest, UpdateSessionStatusRequest,
        WatchSessionMessagesRequest, WatchSessionsRequest,
        session_service_server::{SessionService, SessionServiceServer},
    },
    resolve::Resolver,
};
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{Code, Request, Response, Status, transport::Channel};

/// What becomes of one push.
#[derive(Debug, Clone)]
pub(super) enum Fate {
    /// Nothing is stored.
    Refused(Code, &'static str),
    /// Stored, but the answer is this failure.
    StoredButFails(Code),
    /// Stored, but there is no answer.
    StoredButSilent,
}

#[derive(Default)]
struct State {
    messages: Vec<SessionMessage>,
    by_id: HashMap<String, SessionMessage>,
    last_seq: i64,
    second: i64,
    watchers: Vec<mpsc::Sender<Result<SessionMessage, Status>>>,
    fates: VecDeque<Fate>,
    takes_no_pushes: bool,
    token: String,
    pushes: usize,
    watches: Vec<i64>,
}

/// Handles share one server.
#[derive(Clone)]
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    knows_ids: bool,
    buffer: usize,
    serving: Arc<Mutex<JoinSet<()>>>,
    address: SocketAddr,
}

impl Fake {
    /// `buffer` is how many messages a slow watcher may be behind.
    pub(super) async fn start(knows_ids: bool, buffer: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self {
            state: Arc::default(),
            changed: Arc::default(),
            knows_ids,
            buffer,
            serving: Arc::default(),
            address: listener.local_addr().unwrap(),
        };
        fake.lock().second = 1_700_000_000;
        fake.lock().token = "token-1-of-the-tests".to_owned();
        let service = SessionServiceServer::new(fake.clone());
        fake.serving.lock().unwrap().spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        fake
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Only this token is valid from now on; open streams end, as they do when theirs expires.
    pub(super) fn set_token(&self, token: &str) {
        let mut state = self.lock();
        state.token = token.to_owned();
        for watcher in state.watchers.drain(..) {
            let _ = watcher.try_send(Err(Status::unauthenticated("token expired")));
        }
    }

    /// The next pushes meet these fates.
    pub(super) fn next_pushes(&self, fates: impl IntoIterator<Item = Fate>) {
        self.lock().fates.extend(fates);
    }

    /// Whether pushes fail from now on; watching goes on.
    pub(super) fn take_no_pushes(&self, none: bool) {
        self.lock().takes_no_pushes = none;
    }

    /// Ends all open streams in order.
    pub(super) fn end_streams(&self) {
        self.lock().watchers.clear();
    }

    pub(super) fn pass(&self, time: Duration) {
        self.lock().second += i64::try_from(time.as_secs()).unwrap();
    }

    /// Somebody pushes a message; gives its `seq`.
    pub(super) fn push(&self, event_type: &str, payload: &str) -> i64 {
        let message = self.number(event_type, payload);
        let seq = message.seq;
        self.store(message);
        seq
    }

    /// Like `push`, but it gets its `seq` now and is stored when it is given back.
    pub(super) fn number(&self, event_type: &str, payload: &str) -> SessionMessage {
        let mut state = self.lock();
        // Other sessions use the numbers between.
        state.last_seq += 3;
        let mut message = SessionMessage {
            id: uuid::Uuid::now_v7().to_string(),
            session_id: "session".to_owned(),
            seq: state.last_seq,
            event_type: event_type.to_owned(),
            payload: payload.to_owned(),
            created_at: None,
        };
        message.created_at.get_or_insert_default().seconds = state.second;
        message
    }

    pub(super) fn store(&self, message: SessionMessage) {
        let mut state = self.lock();
        state.watchers.retain(|watcher| {
            // A full buffer: this watcher never gets it.
            !matches!(
                watcher.try_send(Ok(message.clone())),
                Err(mpsc::error::TrySendError::Closed(_))
            )
        });
        state.messages.push(message);
        state.messages.sort_by_key(|message| message.seq);
        drop(state);
        self.changed.notify_waiters();
    }

    pub(super) fn messages(&self) -> Vec<SessionMessage> {
        self.lock().messages.clone()
    }

    /// Payloads of one type, in order.
    pub(super) fn payloads(&self, event_type: &str) -> Vec<String> {
        self.messages()
            .into_iter()
            .filter(|message| message.event_type == event_type)
            .map(|message| message.payload)
            .collect()
    }

    pub(super) fn pushes(&self) -> usize {
        self.lock().pushes
    }

    /// From which `seq` each watch began.
    pub(super) fn watches(&self) -> Vec<i64> {
        self.lock().watches.clone()
    }

    /// Waits until the stored messages are as wanted.
    pub(super) async fn until<T>(&self, what: &str, wanted: impl Fn(&Self) -> Option<T>) -> T {
        let found = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(found) = wanted(self) {
                    return found;
                }
                changed.await;
            }
        };
        let found = tokio::time::timeout(ambient_testing::DEADLINE, found).await;
        found.unwrap_or_else(|_| {
            panic!("never came true: {what}; there is {:#?}", self.messages());
        })
    }

    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let wanted = format!("Bearer {}", self.lock().token);
        let given = request.metadata().get("authorization");
        if given.is_none_or(|given| given.as_bytes() != wanted.as_bytes()) {
            return Err(Status::unauthenticated("token is not valid"));
        }
        Ok(())
    }
}

/// A channel to a server, or to a relay before it.
pub(super) fn channel(address: SocketAddr) -> Channel {
    ambient_shared::client::install_crypto_provider();
    let to = GrpcAddress {
        address: address.to_string(),
        tls: false,
        ca: None,
    };
    grpc_channel(&Resolver::system(), &to).unwrap()
}

type Messages = Pin<Box<dyn Stream<Item = Result<SessionMessage, Status>> + Send>>;

#[tonic::async_trait]
impl SessionService for Fake {
    type WatchSessionMessagesStream = Messages;
    type WatchSessionsStream =
        Pin<Box<dyn Stream<Item = Result<SessionWatchEvent, Status>> + Send>>;

    async fn push_session_message(
        &self,
        request: Request<PushSessionMessageRequest>,
    ) -> Result<Response<SessionMessage>, Status> {
        self.check(&request)?;
        let id = request.metadata().get(MESSAGE_ID).cloned();
        let key = id.as_ref().and_then(|id| id.to_str().ok());
        let key = key.unwrap_or_default().to_owned();
        let push = request.into_inner();
        if push.event_type == "user" {
            return Err(Status::permission_denied("not from a service"));
        }
        let fate = {
            let mut state = self.lock();
            state.pushes += 1;
            if state.takes_no_pushes {
                Some(Fate::Refused(Code::Unavailable, "down"))
            } else {
                state.fates.pop_front()
            }
        };
        self.changed.notify_waiters();
        if let Some(Fate::Refused(code, why)) = &fate {
            return Err(Status::new(*code, *why));
        }
        let known = self.lock().by_id.get(&key).cloned();
        let stored = known.filter(|_| self.knows_ids).unwrap_or_else(|| {
            let message = self.number(&push.event_type, &push.payload);
            self.lock().by_id.insert(key, message.clone());
            self.store(message.clone());
            message
        });
        match fate {
            Some(Fate::StoredButFails(code)) => return Err(Status::new(code, "oh")),
            Some(Fate::StoredButSilent) => std::future::pending().await,
            Some(Fate::Refused(..)) | None => {}
        }
        let mut answer = Response::new(stored);
        if let Some(id) = id.filter(|_| self.knows_ids) {
            answer.metadata_mut().insert(MESSAGE_ID, id);
        }
        Ok(answer)
    }

    async fn watch_session_messages(
        &self,
        request: Request<WatchSessionMessagesRequest>,
    ) -> Result<Response<Messages>, Status> {
        self.check(&request)?;
        let after = request.into_inner().after_seq;
        let (live, replay) = {
            let mut state = self.lock();
            let (watcher, live) = mpsc::channel(self.buffer);
            state.watchers.push(watcher);
            state.watches.push(after);
            let replay: Vec<_> = state
                .messages
                .iter()
                .filter(|message| message.seq > after)
                .cloned()
                .map(Ok)
                .collect();
            (live, replay)
        };
        self.changed.notify_waiters();
        let mut all = tokio_stream::iter(replay).chain(ReceiverStream::new(live));
        // Headers come with the first message.
        let Some(first) = all.next().await else {
            return Ok(Response::new(Box::pin(tokio_stream::empty())));
        };
        let first = tokio_stream::iter([first]);
        Ok(Response::new(Box::pin(first.chain(all))))
    }

    async fn get_session(
        &self,
        _: Request<GetSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn create_session(
        &self,
        _: Request<CreateSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn update_session(
        &self,
        _: Request<UpdateSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn update_session_status(
        &self,
        _: Request<UpdateSessionStatusRequest>,
    ) -> Result<Response<Session>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn delete_session(
        &self,
        _: Request<DeleteSessionRequest>,
    ) -> Result<Response<DeleteSessionResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn list_sessions(
        &self,
        _: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn watch_sessions(
        &self,
        _: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        Err(Status::unimplemented("not needed"))
    }
}
