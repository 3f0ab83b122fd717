//! Services on the node: kube-proxy for their addresses, `CoreDNS` for their names.
//!
//! Both are programs of the node rather than pods, so that a pod's names do not wait for another
//! pod.

use std::process::Command;

use super::{Machine, config};
use crate::cluster::{ADMIN, Cluster, User};

/// Has the rights that Kubernetes itself binds to this name.
pub(super) const PROXY: User = User {
    name: "system:kube-proxy",
    groups: &[],
};

impl Machine {
    /// Starts both, and waits until they serve.
    ///
    /// # Panics
    /// When one does not, with its last words.
    pub(super) fn run_services(&mut self, cluster: &Cluster) {
        let tools = crate::cluster::tools(&self.cluster_options());
        for name in ["kube-proxy", "coredns"] {
            assert!(
                tools.join(name).is_file(),
                "{name} is not in {}: build it with `make cluster-tools`",
                tools.display()
            );
        }
        let proxy = config::proxy(&self.ground, &cluster.kubeconfig(PROXY));
        self.write("kube-proxy.json", &proxy);
        let file = self.path("kube-proxy.json");
        let arguments = [format!("--config={}", file.display())];
        self.run(&tools.join("kube-proxy"), &arguments);

        let names = config::names(&self.ground, &cluster.kubeconfig(ADMIN));
        self.write("Corefile", &names);
        let file = self.path("Corefile");
        let arguments = ["-conf".to_owned(), file.display().to_string()];
        self.run(&tools.join("coredns"), &arguments);

        let inside = self.ground.inside;
        self.wait_until("kube-proxy", |_| {
            answers(&format!("http://{inside}:10256/healthz"))
        });
        self.wait_until("coredns", |_| {
            answers(&format!("http://{inside}:8181/ready"))
        });
    }
}

/// Whether it says 200.
fn answers(url: &str) -> bool {
    Command::new("curl")
        .args(["--silent", "--fail", "--noproxy", "*", "--max-time", "5"])
        .args(["--output", "/dev/null", url])
        .status()
        .is_ok_and(|status| status.success())
}
