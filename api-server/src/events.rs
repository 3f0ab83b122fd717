//! What watchers see: replay, then live, no gap.
//!
//! In: what the writer committed, in commit order. Out, of messages: a stream that pages the
//! database by cursor and waits for a notification, so that a slow reader gets everything, late,
//! and costs no more than a page of memory. Out, of objects: a bounded queue of events for each
//! watcher; one that does not keep up is ended, and lists again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::Clock,
    proto::EventType,
    rest::{Project, ProjectSettings, Session, SessionMessage},
};
use async_stream::{stream, try_stream};
use futures_util::{Stream, StreamExt as _};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    auth::access::{Action, Caller},
    error::Error,
    metrics,
    store::Store,
};

/// Events that a watcher of objects may be behind: a burst of that many sessions at once is more
/// than a reader that is alive leaves lying. At most 256 KiB each, and shared by all watchers.
const BACKLOG: usize = 1024;

/// Longest sleep before the clock is asked again whether a token has expired.
const CLOCK_STEP: Duration = Duration::from_mins(1);

/// Something happened to an object.
#[derive(Debug, Clone)]
pub(crate) struct Event<T> {
    /// What.
    pub(crate) kind: EventType,
    /// The object after it; a deleted one as it was last, but with the time of the deletion.
    pub(crate) object: T,
}

/// What the writer committed.
pub(crate) enum Committed {
    Session(Arc<Event<Session>>),
    Project(Arc<Event<Project>>),
    Settings(Arc<Event<ProjectSettings>>),
    Message { session_id: String, seq: i64 },
}

/// Hands out events. Clones share it.
#[derive(Clone)]
pub(crate) struct Events(Arc<Senders>);

struct Senders {
    sessions: broadcast::Sender<Arc<Event<Session>>>,
    projects: broadcast::Sender<Arc<Event<Project>>>,
    settings: broadcast::Sender<Arc<Event<ProjectSettings>>>,
    /// By session id; only of sessions that somebody follows.
    tips: Mutex<HashMap<String, Followed>>,
}

/// A session that somebody follows.
struct Followed {
    tip: watch::Sender<Tip>,
    followers: usize,
}

/// How far a session's messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tip {
    /// At least this number was committed.
    Seq(i64),
    /// The session is gone.
    Deleted,
}

impl<T: Clone> Event<T> {
    /// Something that happened to an object, which is then this.
    pub(crate) fn of(kind: EventType, object: &T) -> Arc<Self> {
        Arc::new(Self {
            kind,
            object: object.clone(),
        })
    }
}

impl Events {
    /// Nobody watches yet.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Senders {
            sessions: broadcast::Sender::new(BACKLOG),
            projects: broadcast::Sender::new(BACKLOG),
            settings: broadcast::Sender::new(BACKLOG),
            tips: Mutex::default(),
        }))
    }

    /// Tells watchers what was committed, in this order. Never waits.
    pub(crate) fn publish(&self, committed: Vec<Committed>) {
        // Sending fails when nobody watches, which is no failure.
        for event in committed {
            match event {
                Committed::Session(event) => {
                    if event.kind == EventType::Deleted {
                        self.advance(&event.object.id, Tip::Deleted);
                    } else {
                        self.wake(&event.object.id);
                    }
                    let _ = self.0.sessions.send(event);
                }
                Committed::Project(event) => {
                    let _ = self.0.projects.send(event);
                }
                Committed::Settings(event) => {
                    let _ = self.0.settings.send(event);
                }
                Committed::Message { session_id, seq } => {
                    metrics::message_stored();
                    self.advance(&session_id, Tip::Seq(seq));
                }
            }
        }
    }

    /// Events of sessions from now on.
    pub(crate) fn sessions(
        &self,
    ) -> impl Stream<Item = Result<Arc<Event<Session>>, Error>> + use<> {
        objects(self.0.sessions.subscribe())
    }

    /// Events of projects from now on.
    pub(crate) fn projects(
        &self,
    ) -> impl Stream<Item = Result<Arc<Event<Project>>, Error>> + use<> {
        objects(self.0.projects.subscribe())
    }

    /// Events of projects' settings from now on.
    pub(crate) fn settings(
        &self,
    ) -> impl Stream<Item = Result<Arc<Event<ProjectSettings>>, Error>> + use<> {
        objects(self.0.settings.subscribe())
    }

    /// Notices from now on when a session gets a message, changes or is deleted.
    pub(crate) fn follow(&self, session_id: &str) -> Follower {
        let mut tips = self.tips();
        let followed = tips
            .entry(session_id.to_owned())
            .or_insert_with(|| Followed {
                tip: watch::Sender::new(Tip::Seq(0)),
                followers: 0,
            });
        followed.followers += 1;
        Follower {
            events: self.clone(),
            session_id: session_id.to_owned(),
            tip: followed.tip.subscribe(),
        }
    }

    fn advance(&self, session_id: &str, tip: Tip) {
        if let Some(followed) = self.tips().get(session_id) {
            followed.tip.send_replace(tip);
        }
    }

    /// Has followers look again whether they may still see the session.
    fn wake(&self, session_id: &str) {
        if let Some(followed) = self.tips().get(session_id) {
            followed.tip.send_modify(|_| {});
        }
    }

    fn tips(&self) -> MutexGuard<'_, HashMap<String, Followed>> {
        self.0.tips.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows one session's messages. To be made before the session is looked up: then nothing that
/// is committed after the look-up is missed.
pub(crate) struct Follower {
    events: Events,
    session_id: String,
    tip: watch::Receiver<Tip>,
}

impl Follower {
    /// All messages after `after`: those that are stored, then each new one, until the session is
    /// deleted, or is no longer the caller's to see: a session's token ends with its run.
    pub(crate) fn messages(
        mut self,
        store: Store,
        after: i64,
        caller: Caller,
    ) -> impl Stream<Item = Result<SessionMessage, Error>> {
        let watcher = metrics::watcher(metrics::Watched::Messages);
        try_stream! {
            let _watcher = watcher;
            let mut cursor = after;
            loop {
                // Whatever is committed from here on wakes us below, so a message is either in
                // the pages that are read now or in those of the next round.
                let tip = *self.tip.borrow_and_update();
                if tip == Tip::Deleted {
                    Err(Error::no_session(&self.session_id))?;
                }
                loop {
                    let page = store.messages(&self.session_id, cursor, i64::MAX).await?;
                    if caller.rights_may_end() {
                        // After the read: what was read, the caller could then still see.
                        let facts = store.facts(&self.session_id).await?;
                        caller.check(Action::ReadMessages, &facts)?;
                    }
                    if page.is_empty() {
                        break;
                    }
                    for message in page {
                        cursor = message.seq;
                        yield message;
                    }
                }
                if self.tip.changed().await.is_err() {
                    Err(Error::Unavailable("the server is shutting down"))?;
                }
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut tips = self.events.tips();
        if let Some(followed) = tips.get_mut(&self.session_id) {
            followed.followers -= 1;
            if followed.followers == 0 {
                tips.remove(&self.session_id);
            }
        }
    }
}

fn objects<T: Clone>(
    mut events: broadcast::Receiver<T>,
) -> impl Stream<Item = Result<T, Error>> + use<T> {
    let watcher = metrics::watcher(metrics::Watched::Objects);
    stream! {
        let _watcher = watcher;
        loop {
            match events.recv().await {
                Ok(event) => yield Ok(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    metrics::watcher_too_slow();
                    yield Err(Error::SlowWatcher);
                    return;
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}

/// Ends streams that would go on for ever: when their token expires, and at shutdown.
#[derive(Clone)]
pub(crate) struct Ends {
    /// What tokens' expiry is compared with.
    pub(crate) clock: Clock,
    /// When the server ends.
    pub(crate) shutdown: CancellationToken,
}

impl Ends {
    /// The same stream until its first error, the caller's expiry, or the server's shutdown.
    pub(crate) fn of<T, S>(
        &self,
        stream: S,
        expires_at: Option<SystemTime>,
    ) -> impl Stream<Item = Result<T, Error>> + Send + use<T, S>
    where
        T: Send + 'static,
        S: Stream<Item = Result<T, Error>> + Send + 'static,
    {
        let ends = self.clone();
        // On the heap, as the future is polled from the stream below.
        let mut stream = Box::pin(stream);
        stream! {
            let end = ends.end(expires_at);
            tokio::pin!(end);
            loop {
                let next = tokio::select! {
                    biased;
                    error = &mut end => Some(Err(error)),
                    next = stream.next() => next,
                };
                let Some(next) = next else { return };
                let is_last = next.is_err();
                yield next;
                if is_last {
                    return;
                }
            }
        }
    }

    async fn end(&self, expires_at: Option<SystemTime>) -> Error {
        tokio::select! {
            () = self.shutdown.cancelled() => Error::Unavailable("the server is shutting down"),
            () = self.expiry(expires_at) => Error::unauthenticated("token expired; call again with a fresh one"),
        }
    }

    async fn expiry(&self, expires_at: Option<SystemTime>) {
        let Some(expires_at) = expires_at else {
            return std::future::pending().await;
        };
        // In steps, so that a clock that was set is noticed.
        while let Ok(left) = expires_at.duration_since(self.clock.now())
            && !left.is_zero()
        {
            tokio::time::sleep(left.min(CLOCK_STEP)).await;
        }
    }
}
