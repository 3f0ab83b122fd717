//! What this machine must have so that a node can run on it.

use std::{fs, path::Path, process::Command};

use super::{config, leftovers};

/// Programs that must be in `PATH`, and the Debian package of each.
const PROGRAMS: [(&str, &str); 9] = [
    ("busybox", "busybox-static"),
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nsenter", "util-linux"),
    ("hostname", "hostname"),
    ("curl", "curl"),
];

/// Where programs are looked for, beside `PATH`: a user's often has no `sbin`.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Makes sure that a node can run here: installs Debian packages that are missing, on Debian.
///
/// # Errors
/// One sentence that says what is missing, and what to do.
pub fn meet() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err(
            "a node on this machine needs root: run it as root, or set E2E_KUBECONFIG to use \
             another cluster"
                .to_owned(),
        );
    }
    if leftovers::cgroup_hierarchies().is_empty() {
        return Err(
            "no cgroups are mounted at /sys/fs/cgroup, so nothing can hold a pod".to_owned(),
        );
    }
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !is_installed("apt-get") {
        return Err(format!(
            "install what Debian has in the packages {names}, and run this again"
        ));
    }
    install(&missing).map_err(|said| {
        format!("cannot install {names}: {said}; install them and run this again")
    })?;
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} is installed, but not where it is looked for",
        missing.join(" ")
    ))
}

fn missing_packages() -> Vec<&'static str> {
    let mut packages: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| !is_installed(program))
        .map(|(_, package)| *package)
        .collect();
    if config::network_plugins().is_none() {
        packages.push("containernetworking-plugins");
    }
    packages.dedup();
    packages
}

/// What apt-get says goes to our own output; gives a few words when it fails.
fn install(packages: &[&str]) -> Result<(), String> {
    let apt_get = |arguments: &[&str]| {
        let status = Command::new("apt-get")
            .args(["--quiet", "--yes", "--option", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("apt-get {}: {status}", arguments[0])),
            Err(error) => Err(format!("apt-get: {error}")),
        }
    };
    apt_get(&["update"])?;
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend_from_slice(packages);
    apt_get(&arguments)
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(SBIN.map(Into::into));
    folders.any(|folder| is_file(&folder.join(program)))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file())
}
