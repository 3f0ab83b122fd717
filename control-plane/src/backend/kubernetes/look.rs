//! A look at the cluster itself, where what the watches have shown is not enough.

use ambient_shared::session::SessionId;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;

use super::{
    Inner,
    refusal::{backend_error, is_not_found},
    seen::facts::{Kind, What},
};
use crate::backend::{BackendError, RunStatus};

/// No right there, or no namespace: rights come with the namespace.
const FORBIDDEN: u16 = 403;

impl Inner {
    /// Whether the session has no pod of this generation, though none was seen. One that is found
    /// counts as seen.
    pub(super) async fn is_gone(
        &self,
        id: &SessionId,
        generation: u32,
    ) -> Result<bool, BackendError> {
        let seen = self.seen.run_state(id);
        if seen.is_some_and(|run| run.generation == generation || run.status == RunStatus::Unknown)
        {
            return Ok(false);
        }
        let Some(namespace) = self.seen.namespace(id) else {
            return Ok(true);
        };
        let entry = self.seen.entry(&namespace, id);
        let Some(session) = self.session(id, &namespace, &entry) else {
            return Ok(true);
        };
        let pods: Api<Pod> = Api::namespaced(self.clients.watching.clone(), &namespace);
        match pods.get(&session.pod()).await {
            Ok(found) => {
                let sighting = self.reader(&namespace).pod(&found);
                let Some(facts) = &sighting.facts else {
                    return Ok(true);
                };
                let is_it = matches!(&facts.what, What::Pod(pod) if pod.generation == generation);
                self.seen.wrote(&namespace, Kind::Pod, sighting);
                Ok(!is_it)
            }
            Err(error) if is_not_found(&error) => Ok(true),
            Err(kube::Error::Api(status))
                if status.code == FORBIDDEN && !self.is_present(&namespace) =>
            {
                Ok(true)
            }
            Err(error) => Err(backend_error("look for a session's pod", error)),
        }
    }

    fn is_present(&self, namespace: &str) -> bool {
        let mut namespaces = self.seen.namespaces().into_iter();
        namespaces.any(|(name, _)| name == namespace)
    }
}
