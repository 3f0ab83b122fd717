//! Whether runners are to be sent to this replica, and an upgrade goes on to the next one.
//!
//! In: what is known so far. Out: the answer of `/readyz`. A replica is ready once it knows the API
//! server's sessions: one with wrong settings never does, and its upgrade stops there. But while the
//! API server is away, no replica that starts can know them, and sessions that run must be able to
//! reach one: the one that leads, as then no other serves, once it sees a run that it can vouch for.

use std::sync::{Arc, OnceLock};

use ambient_shared::admin::Readiness;

use crate::{backend::Backend, leader::Leadership, sessions::SessionCache};

/// What is known once the keys are loaded.
pub(super) struct Known {
    pub(super) sessions: SessionCache,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) leadership: Leadership,
}

/// Answers by what is known.
pub(super) fn readiness(known: Arc<OnceLock<Known>>) -> Readiness {
    Arc::new(move || match known.get() {
        None => Err("the keys are not loaded yet".to_owned()),
        Some(known) if known.is_ready() => Ok(()),
        Some(_) => Err("the API server's sessions are not listed yet".to_owned()),
    })
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
