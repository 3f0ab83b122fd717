//! The Kubernetes permissions that the control plane needs: written once, here.
