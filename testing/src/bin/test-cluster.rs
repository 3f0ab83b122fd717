#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    reason = "the paths on stdout are this program's product"
)]
//! Runs a Kubernetes control plane, without nodes, until its standard input ends or it is killed.
//!
//! `test-cluster`: prints `KUBECONFIG=PATH` and then the command to try, once it is ready.

use std::io::Read as _;

use ambient_testing::cluster::{ADMIN, Cluster, ClusterOptions, tools};

fn main() {
    let options = ClusterOptions::default();
    let kubectl = tools(&options).join("kubectl");
    let cluster = Cluster::start(options);
    let kubeconfig = cluster.kubeconfig(ADMIN);
    println!("KUBECONFIG={}", kubeconfig.display());
    println!(
        "try: {} --kubeconfig {} get namespaces",
        kubectl.display(),
        kubeconfig.display()
    );
    // Ctrl-C is as good an end as Ctrl-D.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
