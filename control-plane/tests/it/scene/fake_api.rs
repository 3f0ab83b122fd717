//! An API server that behaves as existing ones do: a watch without initial list or resume, whose
//! slow readers lose events; pages that shift. And one that fails as a test says.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use ambient_shared::{
    proto::{
        self, EventType, SessionWatchEvent,
        session_service_server::{SessionService, SessionServiceServer},
    },
    rest::{BASE, List, Session},
};
use axum::{
    Json, Router,
    extract::{Query, State as Extract},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response as RestResponse},
    routing::get,
};
use futures_util::{Stream, StreamExt as _};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

use super::Changes;

/// Events that an existing server keeps for a watcher; what is more, it drops.
const WATCH_BUFFER: usize = 256;

/// What is done each time a page has been made: it sees the server, the phase asked for, and the
/// page's number.
type OnPage = Box<dyn FnMut(&FakeApi, Option<&str>, u32) + Send>;

/// The server; clones share it.
#[derive(Clone)]
pub struct FakeApi {
    shared: Arc<Shared>,
    pub rest_address: SocketAddr,
    pub grpc_address: SocketAddr,
}

struct Shared {
    state: Mutex<State>,
    on_page: Mutex<Option<OnPage>>,
    changes: Changes,
    /// A permit for each page that may be sent; closed: all may.
    pages: Semaphore,
    serving: Mutex<JoinSet<()>>,
}

/// What a test sets and asks.
#[derive(Default)]
pub struct State {
    sessions: BTreeMap<String, Session>,
    /// Seconds of `updated_at`.
    time: u32,
    watchers: Vec<mpsc::Sender<Result<SessionWatchEvent, Status>>>,
    /// Events are lost.
    pub deaf: bool,
    /// Sends nothing to a watcher before its first event.
    pub quiet: bool,
    /// Every call fails.
    pub down: bool,
    /// `GetSession` fails.
    pub gets_fail: bool,
    /// Lists of all phases fail.
    pub full_lists_fail: bool,
    /// REST answers 401.
    pub rest_refuses: bool,
    /// How many more pages from which number on fail.
    pub failing_pages: (usize, u32),
    /// How many more writes of a status fail.
    pub failing_writes: usize,
    /// Writes of this session's status are refused as wrong.
    pub refuses_writes_of: Option<&'static str>,
    /// How many were.
    pub refused: usize,
    /// Most sessions on a page.
    pub page_cap: usize,
    /// Pages held back until [`FakeApi::send_pages`].
    pub hold_pages: bool,
    /// Phases written, in order.
    pub written: Vec<(String, String)>,
    /// Watches opened.
    pub watches: usize,
    /// Lists begun (first pages asked for), by phase asked for.
    pub lists: HashMap<Option<String>, usize>,
    /// Pages sent.
    pub pages: usize,
    /// Pages held back now.
    pub held: usize,
    /// `GetSession` calls.
    pub gets: usize,
    /// Requests that were restricted to one project.
    pub restricted: usize,
}

impl FakeApi {
    /// Starts on free ports.
    pub async fn start(changes: Changes) -> Self {
        let rest = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = State {
            page_cap: usize::MAX,
            ..State::default()
        };
        let api = Self {
            rest_address: rest.local_addr().unwrap(),
            grpc_address: grpc.local_addr().unwrap(),
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                on_page: Mutex::new(None),
                changes,
                pages: Semaphore::new(0),
                serving: Mutex::new(JoinSet::new()),
            }),
        };
        let routes = Router::new()
            .route(&format!("{BASE}/sessions"), get(page))
            .with_state(api.clone());
        let service = SessionServiceServer::new(api.clone());
        let mut serving = api.shared.serving.lock().unwrap();
        serving.spawn(async move { axum::serve(rest, routes).await.unwrap() });
        serving.spawn(async move {
            let server = tonic::transport::Server::builder().add_service(service);
            server
                .serve_with_incoming(TcpListenerStream::new(grpc))
                .await
                .unwrap();
        });
        drop(serving);
        api
    }

    /// Sets something.
    pub fn set<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state());
        self.shared.changes.notify_waiters();
        done
    }

    /// Asks something. Wakes nobody, so that who waits may ask.
    pub fn ask<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state())
    }

    /// Does this each time a page has been made, before it is sent.
    pub fn on_page(&self, hook: impl FnMut(&FakeApi, Option<&str>, u32) + Send + 'static) {
        *self.shared.on_page.lock().unwrap() = Some(Box::new(hook));
    }

    /// Makes a session that waits to be provisioned.
    pub fn create(&self, id: &str, change: impl FnOnce(&mut Session)) {
        let mut session = Session {
            id: id.to_owned(),
            name: id.to_owned(),
            sdk_restart_count: Some(0),
            ..Session::default()
        };
        change(&mut session);
        self.put(session, EventType::Created);
    }

    /// Makes a session in this phase.
    pub fn create_in(&self, id: &str, phase: &str) {
        self.create(id, |session| session.phase = Some(phase.to_owned()));
    }

    /// Changes a session.
    pub fn change(&self, id: &str, change: impl FnOnce(&mut Session)) {
        let mut session = self.get(id).expect("there is such a session");
        change(&mut session);
        self.put(session, EventType::Updated);
    }

    /// Sends an event with an object as it was.
    pub fn replay(&self, session: Session) {
        self.state().send(EventType::Updated, session);
    }

    /// Deletes a session.
    pub fn delete(&self, id: &str) {
        let mut state = self.state();
        let session = state.sessions.remove(id).expect("there is such a session");
        state.send(EventType::Deleted, session);
        drop(state);
        self.shared.changes.notify_waiters();
    }

    /// The session as it is.
    pub fn get(&self, id: &str) -> Option<Session> {
        self.state().sessions.get(id).cloned()
    }

    /// The session's phase.
    pub fn phase(&self, id: &str) -> Option<String> {
        self.get(id)?.phase
    }

    /// Reasons of the session's conditions.
    pub fn reason(&self, id: &str) -> String {
        let conditions = self.get(id).and_then(|session| session.conditions);
        let conditions = conditions.unwrap_or_else(|| "[]".to_owned());
        let conditions: serde_json::Value = serde_json::from_str(&conditions).unwrap();
        conditions[0]["reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Ends all watches, as a server that restarts.
    pub fn cut_watches(&self) {
        self.state().watchers.clear();
    }

    /// Sends pages that were held back, and holds back no more.
    pub fn send_pages(&self) {
        self.state().hold_pages = false;
        self.shared.pages.close();
    }

    fn put(&self, mut session: Session, kind: EventType) {
        let mut state = self.state();
        state.time += 1;
        let (minute, second) = (state.time / 60, state.time % 60);
        let (hour, minute) = (minute / 60, minute % 60);
        let text = format!("2026-01-01T{hour:02}:{minute:02}:{second:02}Z");
        session.updated_at = Some(text.parse().unwrap());
        state.sessions.insert(session.id.clone(), session.clone());
        state.send(kind, session);
        drop(state);
        self.shared.changes.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// One page, as the server sees it now.
    async fn page(
        &self,
        phase: Option<&str>,
        page: u32,
        size: usize,
    ) -> Result<List<Session>, Status> {
        let (list, hold) = {
            let mut state = self.state();
            if page == 1 {
                *state.lists.entry(phase.map(str::to_owned)).or_default() += 1;
            }
            let (left, from) = state.failing_pages;
            if state.full_lists_fail && phase.is_none() {
                return Err(Status::unavailable("as the test said"));
            }
            if state.down || (left > 0 && page >= from) {
                state.failing_pages.0 = left.saturating_sub(1);
                return Err(Status::unavailable("as the test said"));
            }
            let wanted = |session: &&Session| phase.is_none() || session.phase.as_deref() == phase;
            let size = size.min(state.page_cap);
            let all: Vec<_> = state.sessions.values().filter(wanted).collect();
            let start = (page as usize - 1).saturating_mul(size).min(all.len());
            let items: Vec<_> = all[start..].iter().take(size).copied().cloned().collect();
            let list = List {
                kind: "SessionList".to_owned(),
                page,
                size: u32::try_from(items.len()).unwrap(),
                total: u32::try_from(all.len()).unwrap(),
                items,
            };
            state.pages += 1;
            if state.hold_pages {
                state.held += 1;
            }
            (list, state.hold_pages)
        };
        self.shared.changes.notify_waiters();
        let hook = self.shared.on_page.lock().unwrap().take();
        if let Some(mut hook) = hook {
            hook(self, phase, page);
            self.shared.on_page.lock().unwrap().get_or_insert(hook);
        }
        if hold {
            let _ = self.shared.pages.acquire().await;
        }
        Ok(list)
    }
}

impl State {
    /// Hides a session without a word.
    pub fn take(&mut self, id: &str) {
        self.sessions.remove(id);
    }

    /// Shows it again.
    pub fn insert(&mut self, session: Session) {
        self.sessions.insert(session.id.clone(), session);
    }

    fn send(&mut self, kind: EventType, session: Session) {
        if self.deaf {
            return;
        }
        let event = SessionWatchEvent {
            r#type: kind.into(),
            resource_id: session.id.clone(),
            session: (kind != EventType::Deleted).then(|| session.into()),
        };
        // Dropped for who reads too slowly.
        self.watchers.retain(|watcher| !watcher.is_closed());
        for watcher in &self.watchers {
            let _ = watcher.try_send(Ok(event.clone()));
        }
    }
}

async fn page(
    Extract(api): Extract<FakeApi>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> RestResponse {
    {
        let mut state = api.state();
        if headers.contains_key("x-ambient-project") || query.contains_key("project_id") {
            state.restricted += 1;
        }
        if state.rest_refuses {
            return StatusCode::UNAUTHORIZED.into_response();
        }
    }
    assert_eq!(query.get("orderBy").map(String::as_str), Some("id"));
    assert_eq!(headers["authorization"], "Bearer service-token");
    let phase = query.get("search").map(|search| {
        let search = search.strip_prefix("phase = '").expect("a search by phase");
        search.trim_end_matches('\'').to_owned()
    });
    let (number, size) = (
        query["page"].parse().unwrap(),
        query["size"].parse().unwrap(),
    );
    match api.page(phase.as_deref(), number, size).await {
        Ok(list) => Json(list).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[tonic::async_trait]
impl SessionService for FakeApi {
    type WatchSessionsStream =
        Pin<Box<dyn Stream<Item = Result<SessionWatchEvent, Status>> + Send>>;
    type WatchSessionMessagesStream =
        Pin<Box<dyn Stream<Item = Result<proto::SessionMessage, Status>> + Send>>;

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::Session>, Status> {
        let mut state = self.state();
        state.gets += 1;
        self.shared.changes.notify_waiters();
        if state.down || state.gets_fail {
            return Err(Status::unavailable("as the test said"));
        }
        let found = state.sessions.get(&request.get_ref().id).cloned();
        let missing = || Status::not_found(format!("no session {}", request.get_ref().id));
        Ok(Response::new(found.ok_or_else(missing)?.into()))
    }

    async fn update_session_status(
        &self,
        request: Request<proto::UpdateSessionStatusRequest>,
    ) -> Result<Response<proto::Session>, Status> {
        let request = request.into_inner();
        {
            let mut state = self.state();
            if state.down || state.failing_writes > 0 {
                state.failing_writes = state.failing_writes.saturating_sub(1);
                return Err(Status::unavailable("as the test said"));
            }
            if state.refuses_writes_of == Some(request.id.as_str()) {
                state.refused += 1;
                self.shared.changes.notify_waiters();
                return Err(Status::failed_precondition("as the test said"));
            }
            let phase = request.phase.clone().unwrap_or_default();
            state.written.push((request.id.clone(), phase));
            if !state.sessions.contains_key(&request.id) {
                return Err(Status::not_found("no such session"));
            }
        }
        self.change(&request.id, |session| {
            session.phase = request.phase.or(session.phase.take());
            session.conditions = request.conditions.or(session.conditions.take());
            session.start_time = request.start_time.or(session.start_time.take());
            session.completion_time = request.completion_time.or(session.completion_time.take());
        });
        Ok(Response::new(self.get(&request.id).unwrap().into()))
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        let request = request.into_inner();
        if request.size == 1 {
            // The probe of the feed, which is no list.
            let down = self.state().down;
            return if down {
                Err(Status::unavailable("as the test said"))
            } else {
                Ok(Response::new(proto::ListSessionsResponse::default()))
            };
        }
        // Contract section 4: 20 when not given or above 500.
        let size = usize::try_from(request.size).unwrap();
        let size = if (1..=500).contains(&size) { size } else { 20 };
        let page = u32::try_from(request.page.max(1)).unwrap();
        let list = self.page(None, page, size).await?;
        Ok(Response::new(proto::ListSessionsResponse {
            metadata: Some(proto::ListMeta {
                page: request.page,
                size: i32::try_from(list.size).unwrap(),
                total: i32::try_from(list.total).unwrap(),
            }),
            items: list.items.into_iter().map(Into::into).collect(),
        }))
    }

    async fn watch_sessions(
        &self,
        _request: Request<proto::WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let (watcher, mut events) = mpsc::channel(WATCH_BUFFER);
        let quiet = {
            let mut state = self.state();
            state.watches += 1;
            if state.down {
                return Err(Status::unavailable("as the test said"));
            }
            state.watchers.push(watcher);
            state.quiet
        };
        self.shared.changes.notify_waiters();
        if quiet {
            let first = events.recv().await;
            let first = futures_util::stream::iter(first);
            return Ok(Response::new(
                first.chain(ReceiverStream::new(events)).boxed(),
            ));
        }
        Ok(Response::new(ReceiverStream::new(events).boxed()))
    }

    async fn create_session(
        &self,
        _: Request<proto::CreateSessionRequest>,
    ) -> Result<Response<proto::Session>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn update_session(
        &self,
        _: Request<proto::UpdateSessionRequest>,
    ) -> Result<Response<proto::Session>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn delete_session(
        &self,
        _: Request<proto::DeleteSessionRequest>,
    ) -> Result<Response<proto::DeleteSessionResponse>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn push_session_message(
        &self,
        _: Request<proto::PushSessionMessageRequest>,
    ) -> Result<Response<proto::SessionMessage>, Status> {
        Err(Status::unimplemented("not called"))
    }

    async fn watch_session_messages(
        &self,
        _: Request<proto::WatchSessionMessagesRequest>,
    ) -> Result<Response<Self::WatchSessionMessagesStream>, Status> {
        Err(Status::unimplemented("not called"))
    }
}
