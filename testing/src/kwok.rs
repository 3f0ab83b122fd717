//! kwok plays the nodes of a cluster: it moves pods from phase to phase as its stages say.
//!
//! In: a [`Cluster`] and stages (kwok's own YAML). Out: a node that is ready, and pods on it that run
//! and end without a kubelet, thousands of them. It binds no pod to its node: see [`NODE`].

use std::{fs, path::PathBuf};

use crate::{
    cluster::{ADMIN, Cluster},
    programs::{Program, Running},
};

/// The name of the node. A pod gets there by `spec.nodeName`, as no scheduler runs.
pub const NODE: &str = "kwok";

/// Stages of pods that run as soon as they are made. Who starts it ends those that are deleted.
pub const RUN_AT_ONCE: &str = include_str!("kwok/run.yaml");

/// The same, and kwok ends them: by their names, so that, when it is late, it ends the next pod of
/// a name too.
pub const RUN_AND_END: &str = concat!(
    include_str!("kwok/run.yaml"),
    include_str!("kwok/delete.yaml")
);

/// Which build of it this source tree needs; part of the cache folder's name.
const VERSION: &str = include_str!("../cluster/kwok/version");

/// A running kwok; ends when dropped, and with the cluster.
#[derive(Debug)]
pub struct Kwok {
    program: Running,
}

impl Kwok {
    /// Makes the node and starts to play it.
    ///
    /// # Panics
    /// When kwok is not there, with a sentence on how to get it, or when it does not start.
    pub fn start(cluster: &Cluster, stages: &str) -> Self {
        let program = program();
        cluster.add_node(NODE);
        let config = cluster.folder().join("kwok.yaml");
        fs::write(&config, stages).expect("disk is there");
        // In the cluster's folder, so that it ends with the cluster however that ends.
        let program = Program::at(program)
            .folder(cluster.folder())
            .arg("--config")
            .arg(config)
            .arg("--kubeconfig")
            .arg(cluster.kubeconfig(ADMIN))
            .arg("--manage-all-nodes=true")
            // Nobody gives up a node of ours that has no heartbeat.
            .arg("--node-lease-duration-seconds=0")
            .start();
        Self { program }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }
}

/// Its program: `KWOK`, else where `make cluster-tools` puts it.
fn program() -> PathBuf {
    let path = std::env::var_os("KWOK").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            let folder = format!("kwok-{}", VERSION.trim());
            PathBuf::from(home)
                .join(".cache/ambient-tools")
                .join(folder)
                .join("kwok")
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "{} is not there: build it with `make cluster-tools`, or set KWOK to its path",
        path.display()
    );
    path
}
