//! Connections to the Kubernetes API.
