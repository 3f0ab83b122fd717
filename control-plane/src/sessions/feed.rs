//! Follows the API server's sessions and marks what changed.
//!
//! In: the watch and complete lists. Out: the [`SessionCache`], and marks in [`Due`]. The watch is
//! opened first and read while all pages are listed, so that nothing falls between the two and no
//! buffer of the server fills up. Every reconnect lists again, and so does a slow periodic resync:
//! whatever event was lost, a deletion included, the next list heals. Nothing here waits for work
//! to be done.

use std::{
    collections::HashSet,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ambient_shared::{
    api::{Api, retry_of},
    clock::Clock,
    exit,
    proto::{self, EventType, SessionWatchEvent},
    retry::{Backoff, Policy, Retryable as _},
    session::{SessionHash, SessionId},
};
use futures_util::{StreamExt as _, future::BoxFuture, stream::BoxStream};
use metrics::{counter, gauge};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};
use tracing::{debug, info, warn};

use super::{Applied, Session, SessionCache, list::Lister, remote::call};
use crate::{
    metrics::{LAST_LIST, WATCH_RECONNECTS},
    reconcile::due::Due,
};

mod lists;

use lists::Outcome;

/// Waits between connections, and between lists that failed.
const RECONNECTS: Policy = Policy {
    initial: Duration::from_millis(250),
    max: Duration::from_secs(30),
    brief: Duration::from_secs(30),
    longest_asked: Duration::from_mins(1),
};

/// How long a connection must have been good before the next failure starts with the shortest wait
/// again: a server that ends each watch at once must not be asked for lists without a pause.
const GOOD_AFTER: Duration = Duration::from_secs(5);

/// How long to wait for the watch to begin once the server has answered another call on the same
/// connection. Existing servers send nothing at all before the first event.
const SETTLE: Duration = Duration::from_secs(1);

/// How soon to list again when it was not certain that the watch had begun before the first list,
/// or that no session slipped through pages that shifted.
const DOUBTFUL_RESYNC: Duration = Duration::from_secs(30);

/// How long after a resync the watch may still deliver what the list has shown already.
const WATCH_LAG: Duration = Duration::from_secs(5);

/// Most sessions that are remembered as skipped, so that each is logged once.
const MAX_SKIPPED: usize = 1000;

type Events = BoxStream<'static, Result<SessionWatchEvent, Status>>;

/// The task that keeps the cache current.
pub(crate) struct Feed {
    api: Api,
    lister: Lister,
    cache: SessionCache,
    due: Arc<Due>,
    resync: Duration,
    clock: Clock,
    /// Deletions that events told of so far.
    deletions: AtomicU64,
    skipped: Mutex<HashSet<SessionHash>>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    /// The server refuses, or broke off.
    #[error("the API server says {:?} ({}) to the watch of sessions", .0.code(), .0.message())]
    Refused(Status),
    /// The server does not answer.
    #[error("the API server does not answer")]
    Silent(#[source] super::remote::RemoteError),
    /// The server ended the stream.
    #[error("the API server ended the watch of sessions")]
    Ended,
    /// A list has shown changes that no event had told of.
    #[error("the watch of sessions has missed {0} changes")]
    Deaf(usize),
}

impl WatchError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::Silent(_) => "silent",
            Self::Ended => "ended",
            Self::Deaf(_) => "deaf",
        }
    }

    fn wait(&self, backoff: &mut Backoff) -> Duration {
        let wait = match self {
            Self::Refused(status) => backoff.after(retry_of(status)),
            Self::Silent(error) => backoff.after(error.retry()),
            Self::Ended | Self::Deaf(_) => None,
        };
        // Never for good: what is refused today may be allowed tomorrow.
        wait.unwrap_or_else(|| backoff.next_wait())
    }
}

impl Feed {
    /// A feed of `cache` that marks in `due`.
    pub(crate) fn new(
        api: Api,
        lister: Lister,
        cache: SessionCache,
        due: Arc<Due>,
        resync: Duration,
        clock: Clock,
    ) -> Self {
        Self {
            api,
            lister,
            cache,
            due,
            resync,
            clock,
            deletions: AtomicU64::new(0),
            skipped: Mutex::default(),
        }
    }

    /// Follows until `shutdown`. Cancel-safe: the cache is changed one object at a time.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        // Never, so that a replica that does not come to it shows.
        gauge!(LAST_LIST).set(0.0);
        let mut backoff = Backoff::new(RECONNECTS);
        loop {
            let mut good_since = None;
            let followed = shutdown.run_until_cancelled(self.follow(&mut good_since));
            let Some(error) = followed.await else {
                return;
            };
            if good_since.is_some_and(|since: Instant| since.elapsed() >= GOOD_AFTER) {
                backoff.reset();
            }
            let wait = error.wait(&mut backoff);
            counter!(WATCH_RECONNECTS, "reason" => error.reason()).increment(1);
            let reason = exit::report(&error);
            warn!(%reason, retry_in_s = wait.as_secs_f32(), "watch of sessions ended");
            self.cache.troubled(reason);
            if shutdown.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One connection: opens the watch, lists, follows. Sets `good_since` when the first list is
    /// complete.
    async fn follow(&self, good_since: &mut Option<Instant>) -> WatchError {
        let (mut events, certain) = match self.open().await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        self.cache.watch_opened();
        debug!(certain, "watch of sessions open");
        let mut list: Option<BoxFuture<'_, Outcome>> = Some(Box::pin(self.list()));
        let mut next_list = Instant::now();
        // What a resync has shown and no event has told of yet, and until when it may.
        let mut untold: Option<(Outcome, Instant)> = None;
        loop {
            let patience = untold.as_ref().map_or(next_list, |(_, until)| *until);
            let has_untold = untold.is_some();
            let is_listing = list.is_some();
            let listing = async {
                match &mut list {
                    Some(list) => list.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    None => return WatchError::Ended,
                    Some(Err(status)) => return WatchError::Refused(status),
                    Some(Ok(event)) => {
                        let id = self.take_event(event);
                        if let (Some((untold, _)), Some(id)) = (&mut untold, id) {
                            untold.changed.remove(&id);
                            untold.missing.retain(|missing| *missing != id);
                        }
                    }
                },
                outcome = listing => {
                    list = None;
                    let first = good_since.is_none();
                    let doubtful = outcome.doubtful || (first && !certain);
                    let wait = if doubtful { self.resync.min(DOUBTFUL_RESYNC) } else { self.resync };
                    next_list = Instant::now() + wait;
                    if first {
                        *good_since = Some(Instant::now());
                    } else if !(outcome.changed.is_empty() && outcome.missing.is_empty()) {
                        untold = Some((outcome, Instant::now() + WATCH_LAG));
                    }
                }
                () = sleep_until(patience), if has_untold => {
                    let missed = untold.take().map_or(0, |(untold, _)| {
                        // Of those that the list did not have, some may have slipped through it.
                        let is_gone = |id: &&SessionId| self.cache.is_deleted(id);
                        untold.changed.len() + untold.missing.iter().filter(is_gone).count()
                    });
                    if missed > 0 {
                        return WatchError::Deaf(missed);
                    }
                }
                () = sleep_until(next_list), if !is_listing => {
                    list = Some(Box::pin(self.list()));
                }
            }
        }
    }

    /// Opens the watch, and says whether it has certainly begun.
    async fn open(&self) -> Result<(Events, bool), WatchError> {
        let mut client = self.api.sessions();
        let opening = async move {
            let request = Request::new(proto::WatchSessionsRequest {});
            client.watch_sessions(request).await
        };
        let mut opening = Box::pin(opening);
        // A call that follows on the same connection: once it is answered, the server has received
        // the watch too, though it may send nothing before the first event.
        let mut client = self.api.sessions();
        let probe = async move {
            let request = Request::new(proto::ListSessionsRequest { page: 1, size: 1 });
            call("reach the API server", client.list_sessions(request)).await
        };
        let opened = tokio::select! {
            biased;
            opened = &mut opening => Some(opened),
            answered = probe => {
                answered.map_err(WatchError::Silent)?;
                timeout(SETTLE, &mut opening).await.ok()
            }
        };
        match opened {
            Some(Ok(stream)) => Ok((stream.into_inner().boxed(), true)),
            Some(Err(status)) => Err(WatchError::Refused(status)),
            None => Ok((opened_later(opening), false)),
        }
    }

    /// Takes an event and gives the session that it is about.
    fn take_event(&self, event: SessionWatchEvent) -> Option<SessionId> {
        let deleted = event.r#type() == EventType::Deleted;
        let created = event.r#type() == EventType::Created;
        let named = event.session.as_ref().and_then(|it| it.metadata.as_ref());
        let named = named.map(|metadata| metadata.id.clone());
        let id = if event.resource_id.is_empty() {
            named.unwrap_or_default()
        } else {
            event.resource_id
        };
        match event.session {
            Some(object) if !deleted => {
                let session = self.usable(object)?;
                let id = session.id.clone();
                let phase = session.phase;
                let applied = self.cache.apply_event(session);
                if created && applied == Applied::Changed {
                    info!(session = %id.hash(), %phase, "session created");
                }
                self.mark(&id, applied);
                Some(id)
            }
            _ => {
                let id = match SessionId::parse(id) {
                    Ok(id) => id,
                    Err(error) => {
                        debug!(%error, "event about a session whose id cannot be used");
                        return None;
                    }
                };
                if !deleted {
                    self.due.doubt(&id);
                } else if self.cache.delete(&id) {
                    info!(session = %id.hash(), "session deleted");
                    self.deletions.fetch_add(1, Ordering::Relaxed);
                    self.due.touch(&id);
                }
                Some(id)
            }
        }
    }

    fn mark(&self, id: &SessionId, applied: Applied) {
        match applied {
            Applied::Changed => self.due.touch(id),
            Applied::Nothing => {}
            Applied::Suspect => self.due.doubt(id),
        }
    }

    /// The object as a session; one that cannot be used is logged once.
    fn usable(&self, object: proto::Session) -> Option<Session> {
        let id = object
            .metadata
            .as_ref()
            .map(|metadata| metadata.id.as_str());
        let hash = SessionHash::of(id.unwrap_or_default());
        match Session::try_from(object) {
            Ok(session) => Some(session),
            Err(reason) => {
                let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
                if skipped.len() < MAX_SKIPPED && skipped.insert(hash) {
                    warn!(session = %hash, %reason, "session skipped");
                }
                None
            }
        }
    }
}

/// The events of a stream whose beginning is still to come.
fn opened_later<F>(opening: F) -> Events
where
    F: Future<Output = Result<tonic::Response<tonic::Streaming<SessionWatchEvent>>, Status>>
        + Send
        + 'static,
{
    futures_util::stream::once(opening)
        .flat_map(|opened| match opened {
            Ok(stream) => stream.into_inner().boxed(),
            Err(status) => futures_util::stream::iter([Err(status)]).boxed(),
        })
        .boxed()
}
