//! What a node has left on this machine: looks for it, and removes what killed tests left.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::ground::{PREFIX, Traces};
use crate::processes;

/// Places of this machine that a container runtime writes to by default; a node must not.
const PLACES: [&str; 9] = [
    "/run/containerd",
    "/run/netns",
    "/run/runc",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
    "/etc/cni",
];

/// Each cgroup hierarchy's folder: many with version 1, one with version 2.
pub(super) fn cgroup_hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut hierarchies: Vec<_> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(path))
        })
        .collect();
    hierarchies.sort();
    hierarchies.dedup();
    hierarchies
}

/// Ids of the processes with this in the name of one of their cgroups.
pub(super) fn processes_in_cgroup(part: &str) -> Vec<u32> {
    processes_where(|folder| reads(&folder.join("cgroup"), part))
}

/// All that is still there of a node, a line each; empty when it is gone.
pub fn of(traces: &Traces) -> Vec<String> {
    let mut found = Vec::new();
    let name = traces.name.as_str();
    for process in processes::with(name) {
        found.push(format!("process {}: {:?}", process.pid, process.arguments));
    }
    for pid in processes_in_cgroup(name) {
        found.push(format!("process {pid} in a cgroup of the node"));
    }
    for pid in processes_where(|folder| {
        ["pid", "net", "mnt"].iter().any(|kind| {
            let namespace = fs::read_link(folder.join("ns").join(kind));
            namespace.is_ok_and(|it| traces.namespaces.contains(&it.display().to_string()))
        })
    }) {
        found.push(format!("process {pid} in a namespace of the node"));
    }
    for pid in processes_where(|folder| reads(&folder.join("mountinfo"), name)) {
        found.push(format!("process {pid} sees a mount of the node"));
    }
    for hierarchy in cgroup_hierarchies() {
        let path = hierarchy.join(name);
        if path.exists() {
            found.push(format!("cgroup {}", path.display()));
        }
    }
    if Path::new("/sys/class/net").join(name).exists() {
        found.push(format!("link {name}"));
    }
    if reads(Path::new("/proc/net/route"), name) {
        found.push(format!("route by {name}"));
    }
    if traces.folder.exists() {
        found.push(format!("folder {}", traces.folder.display()));
    }
    found
}

/// What of this machine's own a node could have changed, to compare before and after.
pub fn machine() -> BTreeMap<String, String> {
    let mut state = BTreeMap::new();
    for place in PLACES {
        let mut names: Vec<_> = fs::read_dir(place)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().display().to_string())
            .collect();
        names.sort();
        let there = Path::new(place).exists();
        state.insert(place.to_owned(), format!("{there} {names:?}"));
    }
    for setting in ["net/ipv4/ip_forward", "net/ipv4/conf/all/forwarding"] {
        let value = fs::read_to_string(Path::new("/proc/sys").join(setting));
        state.insert(setting.to_owned(), value.unwrap_or_default());
    }
    // Without iptables there is nothing that could have written rules.
    for program in ["iptables-save", "ip6tables-save"] {
        let rules = Command::new(program).output();
        let rules = rules.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
        // Counters and times change by themselves.
        let rules: Vec<_> = rules
            .unwrap_or_default()
            .lines()
            .filter(|line| line.starts_with("-A"))
            .map(str::to_owned)
            .collect();
        state.insert(program.to_owned(), rules.join("\n"));
    }
    state
}

/// Removes cgroups and folders of nodes whose guard was killed too: everything else of such a node
/// has ended with it.
pub(super) fn sweep() {
    let mut names = Vec::new();
    let folders = cgroup_hierarchies()
        .into_iter()
        .chain([std::env::temp_dir()]);
    for entry in folders.flat_map(fs::read_dir).flatten().flatten() {
        let name = entry.file_name().display().to_string();
        let name = name.strip_suffix("-node").unwrap_or(&name);
        let id = name.strip_prefix(PREFIX).unwrap_or_default();
        if id.len() == 7 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    names.dedup();
    for name in names {
        let folder = std::env::temp_dir().join(format!("{name}-node"));
        let used = is_new(&folder)
            || !processes::with(&name).is_empty()
            || !processes_in_cgroup(&name).is_empty();
        if used {
            continue;
        }
        for hierarchy in cgroup_hierarchies() {
            remove_cgroup(&hierarchy.join(&name));
        }
        let _ = fs::remove_dir_all(folder);
    }
}

/// Whether another test may be about to start its guard.
fn is_new(folder: &Path) -> bool {
    let changed = fs::metadata(folder).and_then(|it| it.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < Duration::from_secs(60)))
}

/// A cgroup's files cannot be removed, and go with it.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

fn processes_where(holds: impl Fn(&Path) -> bool) -> Vec<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            holds(&entry.path()).then_some(pid)
        })
        .collect()
}

/// Whether a file can be read and has this in it.
fn reads(file: &Path, part: &str) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.contains(part))
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, process::Stdio};

    use super::*;

    #[test]
    fn what_is_there_is_found_and_what_is_gone_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().file_name().unwrap().display().to_string();
        let traces = Traces {
            name: name.clone(),
            folder: folder.path().to_owned(),
            namespaces: vec!["net:[1]".to_owned()],
        };
        let mut left = Command::new("sh")
            .args(["-c", "echo up; read -r end"])
            .env("OF", &name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // For an instant, a process that was just started has no environment yet.
        let mut up = [0; 3];
        left.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();

        let found = of(&traces);
        left.kill().unwrap();
        left.wait().unwrap();
        drop(folder);

        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(found[0].starts_with(&format!("process {}", left.id())));
        assert!(found[1].starts_with("folder "));
        assert_eq!(of(&traces), [""; 0]);
    }

    #[test]
    fn a_namespace_that_somebody_is_in_is_found() {
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let traces = Traces {
            name: "ambient-0000000".to_owned(),
            folder: "/nowhere".into(),
            namespaces: vec![own.display().to_string()],
        };
        let found = of(&traces).join("\n");
        assert!(found.contains(&format!("process {} in a", std::process::id())));
    }
}
