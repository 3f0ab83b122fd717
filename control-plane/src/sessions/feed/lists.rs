//! The feed's complete lists.
//!
//! In: all pages. Out: the cache, marks, and what the watch should have told of. A list that fails
//! begins again; only one that is complete says anything about what is not there.

use std::{collections::HashSet, sync::atomic::Ordering, time::Duration};

use ambient_shared::{exit, proto, retry::Backoff, session::SessionId};
use metrics::{counter, gauge};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::Feed;
use crate::{
    metrics::{LAST_LIST, LISTS},
    sessions::{
        Applied, Revision,
        list::{ListError, Query},
    },
    watching::RECONNECTS,
};

/// Longest row of tries for one page, after which the list starts again.
const PAGE_PATIENCE: Duration = Duration::from_secs(15);

/// How often one list reads all pages when they shift under it.
const MAX_PASSES: u32 = 3;

/// What a list brought.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Sessions that were not as the cache had them.
    pub(super) changed: HashSet<SessionId>,
    /// Sessions that the cache had and the list did not.
    pub(super) missing: Vec<SessionId>,
    /// Sessions may have been missed.
    pub(super) doubtful: bool,
}

impl Outcome {
    /// Events have told of these sessions.
    pub(super) fn are_told(&mut self, told: &HashSet<SessionId>) {
        self.changed.retain(|id| !told.contains(id));
        self.missing.retain(|id| !told.contains(id));
    }
}

impl Feed {
    /// Lists until a list is complete.
    pub(super) async fn list(&self) -> Outcome {
        let mut backoff = Backoff::new(RECONNECTS);
        loop {
            match self.list_once().await {
                Ok(outcome) => {
                    counter!(LISTS, "result" => "ok").increment(1);
                    return outcome;
                }
                Err(error) => {
                    counter!(LISTS, "result" => "failed").increment(1);
                    let wait = backoff.next_wait();
                    let reason = exit::report(&error);
                    warn!(%reason, retry_in_s = wait.as_secs_f32(), "list of sessions failed");
                    self.cache.troubled(reason);
                    sleep(wait).await;
                }
            }
        }
    }

    /// Reads all pages, again while they shift.
    async fn list_once(&self) -> Result<Outcome, ListError> {
        let began = self.cache.revision();
        let mut seen = HashSet::new();
        let mut outcome = Outcome::default();
        for pass in 1..=MAX_PASSES {
            let since = self.cache.revision();
            let deletions = self.deletions.load(Ordering::Relaxed);
            let listed = self
                .lister
                .all(&Query::default(), PAGE_PATIENCE, |objects| {
                    for object in objects {
                        self.take_listed(object, since, &mut seen, &mut outcome.changed);
                    }
                })
                .await?;
            outcome.doubtful =
                listed.shifted || self.deletions.load(Ordering::Relaxed) != deletions;
            debug!(
                pass,
                pages = listed.pages,
                shifted = listed.shifted,
                "sessions listed"
            );
            // One page cannot shift.
            if !outcome.doubtful || listed.pages <= 1 {
                outcome.doubtful = false;
                break;
            }
        }
        outcome.missing = self.cache.complete_list(&seen, began);
        self.due.listed(&outcome.missing);
        info!(
            sessions = seen.len(),
            missing = outcome.missing.len(),
            "list of sessions complete"
        );
        #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
        gauge!(LAST_LIST).set(self.clock.unix_seconds() as f64);
        Ok(outcome)
    }

    fn take_listed(
        &self,
        object: proto::Session,
        since: Revision,
        seen: &mut HashSet<SessionId>,
        changed: &mut HashSet<SessionId>,
    ) {
        // Even one that we cannot work with exists, and is not missing.
        let id = object.metadata.as_ref().map(|metadata| &metadata.id);
        if let Some(id) = id.and_then(|id| SessionId::parse(id.as_str()).ok()) {
            seen.insert(id);
        }
        let Some(session) = self.usable(object) else {
            return;
        };
        let id = session.id.clone();
        let applied = self.cache.apply_read(session, since);
        if applied == Applied::Changed {
            changed.insert(id.clone());
        }
        self.mark(&id, applied);
    }
}
