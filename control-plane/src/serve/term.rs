//! What the replica that leads does, from the beginning of its term to the end.

use std::{sync::Arc, time::Duration};

use ambient_shared::tasks::TaskFailure;
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{pin, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    backend::kubernetes::KubernetesBackend, controller::Controller, keypair::rotation::Rotation,
    leader::Elector, projects::ProjectController,
};

/// Longest wait for the first look at the cluster before this replica contends: a namespace that
/// cannot be read by then holds up no other.
const FIRST_LOOK: Duration = Duration::from_mins(1);

/// How long work that has begun may go on after the end of a term. What is cut off then is done
/// again by who leads next, which waits for us until then.
const DRAIN: Duration = Duration::from_secs(3);

/// What is left then may take so long to notice.
const CUT_OFF: Duration = Duration::from_millis(500);

/// What only the leader does.
pub(super) struct Leads {
    pub(super) controller: Controller,
    pub(super) projects: ProjectController,
    pub(super) backend: Arc<KubernetesBackend>,
    pub(super) rotation: Rotation,
}

impl Leads {
    /// Keeps the sessions known, whoever leads.
    pub(super) async fn follow(&self, shutdown: CancellationToken) -> Result<(), TaskFailure> {
        self.controller.follow(self.backend.clone(), shutdown).await
    }

    /// Leads whenever nobody else does, until `shutdown`.
    pub(super) async fn contend(
        self: Arc<Self>,
        elector: Elector,
        shutdown: CancellationToken,
    ) -> Result<(), TaskFailure> {
        // Who does not know yet what runs is no good leader.
        let first_look = self.backend.synced(FIRST_LOOK);
        match shutdown.run_until_cancelled(first_look).await {
            None => return Ok(()),
            Some(true) => {}
            Some(false) => warn!("not all namespaces could be read yet; their sessions wait"),
        }
        elector.run(|term| self.lead(term), shutdown).await
    }

    /// One term. A part that fails ends the others.
    async fn lead(&self, term: CancellationToken) -> Result<(), TaskFailure> {
        let backend = Arc::clone(&self.backend);
        let parts: [BoxFuture<'_, Result<(), TaskFailure>>; 4] = [
            self.controller.lead(backend, term.clone(), DRAIN).boxed(),
            self.projects.run(term.clone(), DRAIN).boxed(),
            self.backend.repair(term.clone()).map(Ok).boxed(),
            self.rotation.run(term.clone()).map(Ok).boxed(),
        ];
        let mut parts: FuturesUnordered<_> = parts.into_iter().collect();
        let mut first = Ok(());
        let cut_off = async {
            term.cancelled().await;
            sleep(DRAIN + CUT_OFF).await;
        };
        pin!(cut_off);
        loop {
            let ended = tokio::select! {
                ended = parts.next() => ended,
                () = &mut cut_off => None,
            };
            let Some(ended) = ended else { break };
            term.cancel();
            match ended {
                // Every step may be cut off.
                Ok(()) | Err(TaskFailure::Stuck(_)) => {}
                Err(failure) => first = first.and(Err(failure)),
            }
        }
        first
    }
}
