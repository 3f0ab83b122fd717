//! What runs with a Kubernetes cluster: token endpoint, controller, refresh.
