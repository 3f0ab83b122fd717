//! Who may talk to the cluster.

/// A user of the cluster; the API server knows it by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Its name, such as `system:node:e2e` for a kubelet.
    pub name: &'static str,
    /// Its groups, such as `system:nodes`; `system:authenticated` need not be among them.
    pub groups: &'static [&'static str],
}

/// May do everything.
pub const ADMIN: User = User {
    name: "admin",
    groups: &["system:masters"],
};

/// The control plane's `ServiceAccount`, as a pod of it would log in. Has no right until a test
/// binds roles to it.
pub const CONTROL_PLANE: User = User {
    name: "system:serviceaccount:ambient-code:ambient-control-plane",
    groups: &[
        "system:serviceaccounts",
        "system:serviceaccounts:ambient-code",
    ],
};

/// Never has any right.
pub const NOBODY: User = User {
    name: "nobody",
    groups: &[],
};

/// Has the rights that Kubernetes itself binds to this name.
pub(super) const CONTROLLER_MANAGER: User = User {
    name: "system:kube-controller-manager",
    groups: &[],
};

/// Has the rights that Kubernetes itself binds to this name.
pub(super) const SCHEDULER: User = User {
    name: "system:kube-scheduler",
    groups: &[],
};
