//! The session controller: makes what runs follow what the API server says (being written).

use std::{sync::Arc, time::Duration};

use ambient_shared::{
    api::Api, clock::Clock, proof::SessionKey, session::SessionId, tasks::TaskFailure,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backend::{Backend, Observer},
    issuer::Issuer,
    reconcile::desired::DesiredSettings,
    refresh::RefreshSettings,
    sessions::{SessionCache, rest::RestClient},
};

/// Gives the key of a session.
pub type SessionKeys = Arc<dyn Fn(&SessionId) -> SessionKey + Send + Sync>;

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct ControllerSettings {
    /// What sessions' runs have in common.
    pub desired: DesiredSettings,
    /// The refresh of tokens.
    pub refresh: RefreshSettings,
    /// Time between two complete lists while the watch is healthy.
    pub resync: Duration,
    /// How many sessions are provisioned or written back at once.
    pub provision_workers: usize,
    /// How many sessions are stopped, confirmed or cleaned up at once.
    pub clean_up_workers: usize,
}

impl Default for ControllerSettings {
    fn default() -> Self {
        Self {
            desired: DesiredSettings::default(),
            refresh: RefreshSettings::default(),
            resync: Duration::from_mins(5),
            provision_workers: 8,
            clean_up_workers: 4,
        }
    }
}

/// The controller, ready to run.
pub struct Controller {
    cache: SessionCache,
}

impl Controller {
    /// A controller that knows nothing yet.
    pub fn new(
        api: Api,
        rest: RestClient,
        issuer: Arc<dyn Issuer>,
        keys: SessionKeys,
        settings: ControllerSettings,
        clock: Clock,
    ) -> Self {
        let _ = (api, rest, issuer, keys, settings, clock);
        Self {
            cache: SessionCache::new(),
        }
    }

    /// The sessions as last seen.
    pub fn cache(&self) -> SessionCache {
        self.cache.clone()
    }

    /// What the backend calls with each session whose run or Secret changed. Only marks work as
    /// due; never blocks.
    pub fn observer(&self) -> Observer {
        Arc::new(|_| {})
    }

    /// Runs until `shutdown`, then finishes what runs. The backend must have found what an earlier
    /// life of the control plane left.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn run(
        self,
        backend: Arc<dyn Backend>,
        shutdown: CancellationToken,
    ) -> Result<(), TaskFailure> {
        let _ = backend;
        shutdown.cancelled().await;
        Ok(())
    }
}
