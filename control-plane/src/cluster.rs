//! Connections to the Kubernetes API.

use std::path::PathBuf;

/// How the cluster is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterSettings {
    /// `KUBECONFIG`; none: the service account of our own pod.
    pub kubeconfig: Option<PathBuf>,
    /// `PROJECT_KUBE_TOKEN_FILE`: another token for the projects' namespaces.
    pub project_token_file: Option<PathBuf>,
}
