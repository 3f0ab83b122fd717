//! What this machine must have so that a node can run on it.

use std::{fs, path::Path};

use super::{config, leftovers};

/// Programs that must be in `PATH`, and the Debian package of each.
const PROGRAMS: [(&str, &str); 7] = [
    ("busybox", "busybox-static"),
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("curl", "curl"),
];

/// Where programs are looked for, beside `PATH`: a user's often has no `sbin`.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// What is missing, in one sentence; none when a node can run.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("a node needs root: run `sudo make e2e`, or set E2E_KUBECONFIG to run on another cluster".to_owned());
    }
    let mut packages: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| !is_installed(program))
        .map(|(_, package)| *package)
        .collect();
    if config::network_plugins().is_none() {
        packages.push("containernetworking-plugins");
    }
    packages.dedup();
    if !packages.is_empty() {
        let names = packages.join(" ");
        return Some(format!("install {names} (the names are Debian's)"));
    }
    if leftovers::cgroup_hierarchies().is_empty() {
        return Some("no cgroups are mounted, so nothing can hold a pod".to_owned());
    }
    None
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SBIN.map(Into::into));
    folders
        .into_iter()
        .any(|folder| is_file(&folder.join(program)))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file())
}
