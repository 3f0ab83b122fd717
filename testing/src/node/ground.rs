//! The namespaces that a node lives in, and their link to this machine.

use std::{
    fs,
    io::PipeWriter,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::leftovers;

/// Start of the name of everything of a node that is visible on this machine: link, cgroups, and
/// part of its folder's.
pub(super) const PREFIX: &str = "ambient-";

/// Networks that a node takes the first free one of: 10.N.0.0/16.
const NETWORKS: std::ops::RangeInclusive<u8> = 201..=249;

/// Longest wait for the namespaces to be there, or gone.
const LIMIT: Duration = Duration::from_secs(60);

/// Where a node lives. Dropping it ends every process in it and removes all of it.
#[derive(Debug)]
pub(super) struct Ground {
    /// Of the link, the cgroups and the host.
    pub(super) name: String,
    /// All files of the node.
    pub(super) folder: PathBuf,
    /// This machine's end of the link.
    pub(super) outside: Ipv4Addr,
    /// The node's end.
    pub(super) inside: Ipv4Addr,
    /// The pods' addresses, as `10.N.1.0/24`.
    pub(super) pods: String,
    /// The first process in the namespaces.
    first: String,
    /// Closed by the kernel if this process is killed; what the guard waits for.
    lifeline: Option<PipeWriter>,
    guard: Child,
}

/// What a node leaves on this machine while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces {
    /// Name of its link and cgroups.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Its PID and network namespaces, as `/proc/PID/ns` names them.
    pub namespaces: Vec<String>,
}

impl Ground {
    /// Makes namespaces, cgroups and link, and first removes what killed tests have left.
    pub(super) fn lay() -> Self {
        leftovers::sweep();
        // A link's name has at most 15 bytes.
        let id = Uuid::new_v4().simple().to_string();
        let name = format!("{PREFIX}{}", &id[..7]);
        let folder = std::env::temp_dir().join(format!("{name}-node"));
        fs::create_dir(&folder).expect("a temporary folder can be made");
        for (script, text) in [
            ("guard.sh", include_str!("guard.sh")),
            ("inside.sh", include_str!("inside.sh")),
        ] {
            fs::write(folder.join(script), text).expect("disk is there");
        }
        let (reader, lifeline) = std::io::pipe().expect("pipe");
        let log = fs::File::create(folder.join("guard.log")).expect("disk is there");
        // In a session of its own: a terminal's Ctrl-C is for the test, not for who cleans up.
        let guard = Command::new("setsid")
            .arg("sh")
            .arg(folder.join("guard.sh"))
            .arg(&folder)
            .arg(&name)
            .current_dir("/")
            .stdin(reader)
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("setsid and sh are there");
        let mut ground = Self {
            name,
            folder,
            outside: Ipv4Addr::UNSPECIFIED,
            inside: Ipv4Addr::UNSPECIFIED,
            pods: String::new(),
            first: String::new(),
            lifeline: Some(lifeline),
            guard,
        };
        ground.first = ground.wait_for_first();
        ground.make_cgroups();
        ground.connect();
        let resolver = format!("nameserver {}\n", ground.outside);
        fs::write(ground.folder.join("resolv.conf"), resolver).expect("disk is there");
        ground
    }

    /// A program in the namespaces, with no environment but a path.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .args(["--target", &self.first, "--all", "--"])
            .arg(program)
            .current_dir("/");
        command
    }

    pub(super) fn traces(&self) -> Traces {
        let namespace = |kind: &str| {
            let link = format!("/proc/{}/ns/{kind}", self.first);
            fs::read_link(link)
                .expect("the node runs")
                .display()
                .to_string()
        };
        Traces {
            name: self.name.clone(),
            folder: self.folder.clone(),
            namespaces: ["pid", "net", "mnt"].map(namespace).to_vec(),
        }
    }

    /// Ends every process in the namespaces, and waits until all of it is removed.
    pub(super) fn end(&mut self) {
        self.lifeline = None;
        // It gives up by itself.
        let _ = self.guard.wait();
    }

    /// Whether its folder is in an overlay (as in a container), which cannot be overlaid again.
    pub(super) fn in_overlay(&self) -> bool {
        run(
            "stat",
            &[
                "--file-system",
                "--format=%T",
                &self.folder.display().to_string(),
            ],
        )
        .is_ok_and(|kind| kind.trim() == "overlayfs")
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a script writes a file when it is ready; has a deadline"
    )]
    fn wait_for_first(&mut self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(pid) = fs::read_to_string(self.folder.join("pid")) {
                return pid.trim().to_owned();
            }
            let ended = self.guard.try_wait().expect("a child can be waited for");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "cannot make namespaces: {}",
                fs::read_to_string(self.folder.join("guard.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The kubelet wants its root cgroup to be there.
    fn make_cgroups(&self) {
        for hierarchy in leftovers::cgroup_hierarchies() {
            // With one hierarchy for all, controllers have to be passed down.
            for controller in ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"] {
                let _ = fs::write(
                    hierarchy.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
            let path = hierarchy.join(&self.name);
            fs::create_dir(&path)
                .unwrap_or_else(|error| panic!("cannot make cgroup {}: {error}", path.display()));
        }
    }

    /// Makes the link, in a network that nobody uses.
    fn connect(&mut self) {
        let ip = |arguments: &[&str]| {
            run("ip", arguments).unwrap_or_else(|error| panic!("ip {arguments:?}: {error}"));
        };
        let (name, first) = (self.name.as_str(), self.first.as_str());
        ip(&[
            "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", first,
        ]);
        ip(&["link", "set", name, "up"]);
        let number = NETWORKS
            .filter(|number| is_free(*number))
            // Refused where another test was faster.
            .find(|number| {
                let network = format!("10.{number}.0.0/16");
                run("ip", &["route", "add", &network, "dev", name]).is_ok()
            })
            .expect("a network of 10.201.0.0 to 10.249.0.0 is free");
        self.outside = Ipv4Addr::new(10, number, 0, 1);
        self.inside = Ipv4Addr::new(10, number, 0, 2);
        self.pods = format!("10.{number}.1.0/24");

        let outside = format!("{}/30", self.outside);
        let inside = format!("{}/30", self.inside);
        let gateway = self.inside.to_string();
        ip(&["address", "add", &outside, "dev", name]);
        ip(&["route", "add", &self.pods, "via", &gateway, "dev", name]);

        let within = |arguments: &[&str]| {
            let output = self.command(Path::new("ip")).args(arguments).output();
            let output = output.expect("nsenter is there");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "ip {arguments:?}: {said}");
        };
        within(&["address", "add", &inside, "dev", "eth0"]);
        within(&["link", "set", "eth0", "up"]);
        let gateway = self.outside.to_string();
        within(&["route", "add", "default", "via", &gateway]);
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether this machine has no address and no way to 10.N.0.0/16.
fn is_free(number: u8) -> bool {
    let within = format!("10.{number}.0.0/16");
    ["root", "match"].iter().all(|relation| {
        let found = run(
            "ip",
            &[
                "-4", "route", "show", "table", "all", "to", relation, &within,
            ],
        );
        found.is_ok_and(|routes| {
            routes
                .lines()
                .all(|route| route.starts_with("default") || route.is_empty())
        })
    })
}

/// Runs a program to its end; gives its output, or what it said when it failed.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}
