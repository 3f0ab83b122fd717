//! Keeping what is known of each run true, until it has ended.
//!
//! In: the session's folder, looked at again and again. Out: the entry's state, and a word to the
//! observer with each change. What cannot be read is tried again, and never taken for an end.

use std::{sync::Arc, time::Duration};

use ambient_shared::retry::{Backoff, Policy};
use metrics::gauge;
use tokio::time::sleep;
use tracing::warn;

use super::{
    Inner, UNKNOWN,
    entry::{Entry, blocking, lock},
    folder::SessionFolder,
    watch::{self, Sight},
};
use crate::{backend::RunState, metrics::PROCESSES};

/// Waits before a folder that could not be looked at is looked at again.
const LOOK_AGAIN: Policy = Policy {
    initial: Duration::from_secs(1),
    max: Duration::from_secs(30),
    brief: Duration::MAX,
    longest_asked: Duration::from_secs(30),
};

impl Inner {
    /// Keeps the entry's state true until its run has ended, or another watch takes over.
    pub(super) async fn follow(&self, entry: &Entry, watch: u64) {
        let mut backoff = Backoff::new(LOOK_AGAIN);
        while entry.is_watched_by(watch) {
            let folder = entry.folder.clone();
            let state = match blocking(move || watch::look(&folder)).await {
                Ok(Sight::Alive(state)) => state,
                Ok(Sight::Ended(state)) => return self.set(entry, watch, Some(state)),
                // It never came to life, or its folder is gone: it may be started (again).
                Ok(Sight::Nothing) => return self.set(entry, watch, None),
                Ok(Sight::Lost { generation }) => {
                    match watch::bury(&entry.folder, generation, &self.clock).await {
                        Ok(state) => {
                            warn!(session = %entry.id.hash(), "session's shim is lost");
                            return self.set(entry, watch, Some(state));
                        }
                        Err(error) => {
                            warn!(session = %entry.id.hash(), %error, "leftovers cannot be ended");
                            sleep(backoff.next_wait()).await;
                            continue;
                        }
                    }
                }
                Err(error) => {
                    warn!(session = %entry.id.hash(), %error, "session cannot be looked at");
                    sleep(backoff.next_wait()).await;
                    continue;
                }
            };
            backoff.reset();
            self.set(entry, watch, Some(state.clone()));
            watch::wait_for_change(&entry.folder, &state).await;
        }
    }

    /// Waits until it is known of which session an unreadable folder is, and follows its run.
    pub(super) async fn find_out(&self, folder: SessionFolder) {
        let mut backoff = Backoff::new(LOOK_AGAIN);
        let entry = loop {
            sleep(backoff.next_wait()).await;
            // Somebody may have asked for it by its id.
            let named = self
                .entries()
                .values()
                .find(|it| it.folder == folder)
                .map(Arc::clone);
            if let Some(entry) = named {
                break entry;
            }
            let read = folder.clone();
            match blocking(move || read.session()).await {
                Ok(Some(record)) => break self.add(&record.id, folder.clone()),
                Ok(None) => {
                    lock(&self.unread).remove(folder.path());
                    return;
                }
                Err(error) => {
                    warn!(session = %folder.hash(), %error, "session cannot be read");
                }
            }
        };
        let watch = {
            let _busy = entry.busy.lock().await;
            lock(&self.unread).remove(folder.path());
            if entry.token().is_none() {
                entry.read_token_times();
            }
            match entry.state() {
                // Who asked for it has found out more.
                Some(state) if state != UNKNOWN => return,
                _ => entry.begin(Some(UNKNOWN)),
            }
        };
        self.follow(&entry, watch).await;
    }

    /// Publishes how many shims live.
    pub(super) fn count(&self) {
        let alive = self.entries().values().filter(|it| it.is_alive()).count();
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^52 sessions")]
        gauge!(PROCESSES).set(alive as f64);
    }

    fn set(&self, entry: &Entry, watch: u64, state: Option<RunState>) {
        if entry.saw(watch, state) == Some(true) {
            self.count();
            (self.observer)(&entry.id);
        }
    }
}
