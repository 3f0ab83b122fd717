//! A real Kubernetes node on this machine: kubelet and containerd in namespaces of their own.
//!
//! In: the images of [`crate::images`] and a [`Cluster`]. Out: a node that runs pods. Its processes,
//! mounts and links live in namespaces that end with this process, however it ends, so nothing of
//! the machine's own containerd, iptables or `/var/lib` is used or touched. Needs root on Linux and
//! the programs of [`needs`].
//!
//! ```text
//! this machine: tests, our programs, kube-apiserver      the node's namespaces
//!     link NAME, 10.N.0.1  ────────────────────────────  eth0 10.N.0.2 ── bridge 10.N.1.1 ── pods
//! ```
//!
//! Its methods block the calling thread.

use std::{
    fmt::Write as _,
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    cluster::{Cluster, ClusterOptions, User},
    images::Image,
};

mod config;
mod ground;
pub mod leftovers;
pub mod needs;
mod services;

use ground::Ground;
pub use ground::Traces;

/// What the node is called in the cluster.
pub const NAME: &str = "e2e";

/// The kubelet's user.
const USER: User = User {
    name: "system:node:e2e",
    groups: &["system:nodes"],
};

/// Longest wait for a program of the node to get ready, of which a fast machine needs 6 s.
const START: Duration = Duration::from_secs(180);

/// How often is looked whether a program is ready; nothing announces it.
const POLL: Duration = Duration::from_millis(100);

/// Lines of a program's log that a failure shows.
const LAST_LINES: usize = 25;

/// The machine side of a node: namespaces, their link to here, containerd with images. A cluster
/// that listens at [`Machine::address`] can be reached from its pods.
#[derive(Debug)]
pub struct Machine {
    ground: Ground,
    programs: Vec<Child>,
}

impl Machine {
    /// Makes the namespaces, starts containerd and loads the images.
    ///
    /// # Panics
    /// When something of this fails, with containerd's last words.
    pub fn start(images: &[Image]) -> Self {
        let mut machine = Self {
            ground: Ground::lay(),
            programs: Vec::new(),
        };
        machine.write("containerd.toml", &config::containerd(&machine.ground));
        machine.write("cni/10-bridge.conflist", &config::network(&machine.ground));
        let settings = machine.path("containerd.toml");
        let arguments = ["--config".to_owned(), settings.display().to_string()];
        machine.run(Path::new("containerd"), &arguments);
        machine.wait_until("containerd", |it| it.ctr(&["version"]).is_ok());
        for image in images {
            let archive = image.write_to(&machine.ground.folder);
            let archive = archive.expect("disk is there");
            let loaded = machine.ctr(&["images", "import", &archive.display().to_string()]);
            loaded.unwrap_or_else(|error| panic!("cannot load {}: {error}", archive.display()));
            // Up to 8 MB each, and not read again.
            let _ = fs::remove_file(archive);
        }
        machine
    }

    /// This machine's address towards the node and its pods. The test's programs listen at it.
    pub fn address(&self) -> Ipv4Addr {
        self.ground.outside
    }

    /// What it leaves on this machine while it runs, to look for afterwards.
    pub fn traces(&self) -> Traces {
        self.ground.traces()
    }

    /// What a cluster needs so that the node can join it.
    pub fn cluster_options(&self) -> ClusterOptions {
        ClusterOptions {
            users: vec![USER, services::PROXY],
            bind: self.address(),
            advertise: self.address(),
            nodes: true,
            ..ClusterOptions::default()
        }
    }

    /// A folder for a local volume of this name; it goes with the node.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn volume(&self, name: &str) -> PathBuf {
        let folder = self.path("volumes").join(name);
        fs::create_dir_all(&folder).expect("disk is there");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.ground.folder.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        let folder = path.parent().expect("a file is in a folder");
        fs::create_dir_all(folder).expect("disk is there");
        fs::write(path, text).expect("disk is there");
    }

    /// Starts a program in the node's namespaces; its log is a file of its name in the folder.
    fn run(&mut self, program: &Path, arguments: &[String]) {
        let name = name_of(program);
        let log = File::create(self.log(&name)).expect("disk is there");
        let child = self
            .ground
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        self.programs.push(child);
    }

    /// containerd's own client.
    fn ctr(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(self.path("containerd.sock"))
            .args(["--namespace", "k8s.io"])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "nothing announces readiness; has a deadline"
    )]
    fn wait_until(&mut self, program: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + START;
        while !holds(self) {
            for child in &mut self.programs {
                if let Ok(Some(status)) = child.try_wait() {
                    panic!("{program} ended, {status}: {}", self.last_words(program));
                }
            }
            assert!(
                Instant::now() < deadline,
                "{program} is not ready after {START:?}: {}",
                self.last_words(program)
            );
            std::thread::sleep(POLL);
        }
    }

    fn log(&self, program: &str) -> PathBuf {
        self.path(&format!("{program}.log"))
    }

    /// The end of a program's log.
    fn last_words(&self, program: &str) -> String {
        let log = fs::read(self.log(program)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.ground.end();
        for program in &mut self.programs {
            let _ = program.wait();
        }
    }
}

/// A node that has joined a cluster and is ready.
#[derive(Debug)]
pub struct Node {
    machine: Machine,
}

impl Node {
    /// Starts a kubelet on this machine, joins the cluster and waits until the node is ready. Pods
    /// reach Services by their names: kube-proxy and `CoreDNS` run beside it.
    ///
    /// # Panics
    /// When it does not become ready, with the kubelet's last words.
    pub fn join(mut machine: Machine, cluster: &Cluster) -> Self {
        let kubelet = crate::cluster::tools(&machine.cluster_options()).join("kubelet");
        assert!(
            kubelet.is_file(),
            "{} is not there: build it with `make cluster-tools`",
            kubelet.display()
        );
        let settings = config::kubelet(&machine.ground, &cluster.ca());
        machine.write("kubelet.json", &settings);
        let arguments = [
            format!("--config={}", machine.path("kubelet.json").display()),
            format!("--kubeconfig={}", cluster.kubeconfig(USER).display()),
            format!("--hostname-override={NAME}"),
            format!("--node-ip={}", machine.ground.inside),
            format!("--root-dir={}", machine.path("kubelet").display()),
            format!("--cert-dir={}", machine.path("certificates").display()),
        ];
        machine.run(&kubelet, &arguments);
        machine.run_services(cluster);
        machine.wait_until("kubelet", |_| is_ready(cluster));
        Self { machine }
    }

    /// Its machine side.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Process ids, on this machine, of everything that runs in a pod: by the pod's `uid`, which is
    /// in the names of its cgroups.
    pub fn processes_of(&self, uid: &str) -> Vec<u32> {
        leftovers::processes_in_cgroup(uid)
    }

    /// Its logs and containerd's, for a failure.
    pub fn scene(&self) -> String {
        let mut scene = String::new();
        for program in ["kubelet", "containerd", "kube-proxy", "coredns"] {
            let words = self.machine.last_words(program);
            let _ = write!(scene, "--- {program}\n{words}\n");
        }
        scene
    }
}

fn is_ready(cluster: &Cluster) -> bool {
    let Some(node) = cluster.get(&format!("/api/v1/nodes/{NAME}")) else {
        return false;
    };
    let conditions = node["status"]["conditions"].as_array();
    conditions.is_some_and(|conditions| {
        conditions
            .iter()
            .any(|it| it["type"] == "Ready" && it["status"] == "True")
    })
}

fn name_of(program: &Path) -> String {
    program
        .file_name()
        .unwrap_or_default()
        .display()
        .to_string()
}
