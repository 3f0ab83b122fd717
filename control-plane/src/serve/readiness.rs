//! Whether runners are to be sent to this replica, and an upgrade goes on to the next one.
//!
//! In: what is known so far. Out: the answer of `/readyz`. A replica is ready once it knows the API
//! server's sessions: one with wrong settings never does, and its upgrade stops there. But while the
//! API server is away, no replica that starts can know them, and sessions that run must be able to
//! reach one: the one that leads, as then no other serves, once it sees a run that it can vouch for.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ambient_shared::admin::Readiness;

use crate::{backend::Backend, leader::Leadership, sessions::SessionCache};

/// How far the start has come.
#[derive(Default)]
pub(super) struct Start {
    /// Why the keys could not be loaded at last.
    no_keys: Mutex<Option<String>>,
    /// Set once the keys are loaded.
    pub(super) known: OnceLock<Known>,
}

/// What is known once the keys are loaded.
pub(super) struct Known {
    pub(super) sessions: SessionCache,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) leadership: Leadership,
}

impl Start {
    /// That the keys could not be loaded, and why.
    pub(super) fn no_keys(&self, why: String) {
        let mut no_keys = self.no_keys.lock().unwrap_or_else(PoisonError::into_inner);
        *no_keys = Some(why);
    }

    /// Answers by what is known; when that is not enough, with what stands in the way.
    pub(super) fn readiness(self: Arc<Self>) -> Readiness {
        Arc::new(move || {
            let (what, why) = match self.known.get() {
                Some(known) if known.is_ready() => return Ok(()),
                Some(known) => (
                    "the API server's sessions are not listed",
                    known.sessions.trouble(),
                ),
                None => {
                    let why = self.no_keys.lock().unwrap_or_else(PoisonError::into_inner);
                    ("the keys are not loaded", why.clone())
                }
            };
            Err(why.map_or_else(|| format!("{what} yet"), |why| format!("{what}: {why}")))
        })
    }
}

impl Known {
    fn is_ready(&self) -> bool {
        self.sessions.is_synced() || (self.leadership.is_held() && self.sees_run())
    }

    fn sees_run(&self) -> bool {
        let sessions = self.backend.sessions();
        let mut runs = sessions.iter().filter_map(|id| self.backend.run_state(id));
        runs.any(|run| run.is_live())
    }
}
