//! The pod of a run. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::metadata;
use crate::backend::{
    BackendError, DesiredRun,
    kubernetes::{
        names::{GENERATION, SESSION_ID, SESSION_NAME, SessionRef},
        settings::KubernetesSettings,
    },
};

/// The pod of a run.
///
/// # Errors
/// `Impossible` when an image is not set that it needs, or when it would be larger than an object
/// may be.
pub(crate) fn pod(
    run: &DesiredRun,
    session: &SessionRef,
    owner_uid: &str,
    _settings: &KubernetesSettings,
) -> Result<Pod, BackendError> {
    let annotations: BTreeMap<String, String> = [
        (SESSION_ID, session.id.as_str().to_owned()),
        (SESSION_NAME, run.name.clone()),
        (GENERATION, run.generation.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    Ok(Pod {
        metadata: metadata(session, session.pod(), Some(owner_uid), annotations),
        spec: Some(PodSpec::default()),
        ..Pod::default()
    })
}
