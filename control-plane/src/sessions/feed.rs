//! Follows the API server's sessions and marks what changed.
//!
//! In: the watch and complete lists. Out: the [`SessionCache`], and marks in [`Due`]. The watch is
//! opened first and read while all pages are listed, so that nothing falls between the two and no
//! buffer of the server fills up. Every reconnect lists again, and so does a slow periodic resync:
//! whatever event was lost, a deletion included, the next list heals. Nothing here waits for work
//! to be done.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use ambient_shared::{
    api::Api,
    clock::Clock,
    exit,
    proto::{self, EventType, SessionWatchEvent},
    session::{SessionHash, SessionId},
};
use futures_util::{StreamExt as _, future::BoxFuture};
use metrics::{counter, gauge};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tracing::{debug, info, warn};

use super::{Applied, Session, SessionCache, list::Lister, remote::call};
use crate::{
    metrics::{LAST_LIST, WATCH_RECONNECTS},
    reconcile::due::Due,
    watching::{self, DOUBTFUL_RESYNC, Opened, Reconnects, WatchError},
};

mod lists;

use lists::Outcome;

/// How long after a resync the watch may still deliver what the list has shown already.
const WATCH_LAG: Duration = Duration::from_secs(5);

/// Most sessions that are remembered as skipped, so that each is logged once.
const MAX_SKIPPED: usize = 1000;

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
        let mut reconnects = Reconnects::new();
        loop {
            let followed = shutdown.run_until_cancelled(self.follow(&mut reconnects));
            let Some(error) = followed.await else {
                return;
            };
            let wait = reconnects.wait_after(&error);
            counter!(WATCH_RECONNECTS, "reason" => error.reason()).increment(1);
            let reason = exit::report(&error);
            warn!(%reason, retry_in_s = wait.as_secs_f32(), "watch of sessions ended");
            self.cache.troubled(reason);
            if shutdown.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One connection: opens the watch, lists, follows. It is good when the first list is complete.
    async fn follow(&self, reconnects: &mut Reconnects) -> WatchError {
        let Opened {
            mut events,
            certain,
        } = match self.open().await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        self.cache.watch_opened();
        debug!(certain, "watch of sessions open");
        let mut list: Option<BoxFuture<'_, Outcome>> = Some(Box::pin(self.list()));
        let mut next_list = Instant::now();
        // What events have told of since a list began.
        let mut told = HashSet::new();
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
                        let Some(id) = self.take_event(event) else { continue };
                        if let Some((untold, _)) = &mut untold {
                            untold.are_told(&HashSet::from([id.clone()]));
                        }
                        if is_listing {
                            told.insert(id);
                        }
                    }
                },
                mut outcome = listing => {
                    list = None;
                    outcome.are_told(&std::mem::take(&mut told));
                    let first = !reconnects.was_good();
                    let doubtful = outcome.doubtful || (first && !certain);
                    let wait = if doubtful { self.resync.min(DOUBTFUL_RESYNC) } else { self.resync };
                    next_list = Instant::now() + wait;
                    if first {
                        reconnects.is_good();
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

    async fn open(&self) -> Result<Opened<SessionWatchEvent>, WatchError> {
        let mut client = self.api.sessions();
        let opening = async move {
            let request = Request::new(proto::WatchSessionsRequest {});
            let events = client.watch_sessions(request).await?;
            Ok(events.into_inner().boxed())
        };
        let mut client = self.api.sessions();
        let probe = async move {
            let request = Request::new(proto::ListSessionsRequest { page: 1, size: 1 });
            let answer = client.list_sessions(request);
            call("reach the API server", answer).await.map(drop)
        };
        watching::open(opening, probe).await
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
