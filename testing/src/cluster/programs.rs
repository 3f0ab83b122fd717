//! The cluster's programs as processes, and the janitor that ends them.
//!
//! A janitor waits for our end of a pipe to close, which the kernel does even when this process is
//! killed. It then kills every process that has the cluster's folder as its working directory, and
//! removes the folder.

use std::{
    fs::{self, OpenOptions},
    io::PipeWriter,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::ClusterOptions;

/// Which build of the programs this source tree needs; part of the cache folder's name.
const TOOLS_VERSION: &str = include_str!("../../cluster/version");

/// The second round is for a process that was just being started when the first one looked.
const JANITOR: &str = r#"
cat >/dev/null
for round in 1 2; do
    for try in $(seq 100); do
        found=$(find /proc/[0-9]*/cwd -maxdepth 0 -lname "$1*" 2>/dev/null | cut -d/ -f3)
        [ "$found" ] || break
        kill -KILL $found
        sleep 0.05
    done
    rm -rf -- "$1"
    sleep 0.1
done
"#;

/// The folder with the cluster's programs.
///
/// # Panics
/// When one that these options need is not there, with a sentence on how to get it.
pub fn tools(options: &ClusterOptions) -> PathBuf {
    let folder = std::env::var_os("KUBEBUILDER_ASSETS").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            let name = format!("cluster-{}", TOOLS_VERSION.trim());
            Path::new(&home).join(".cache/ambient-tools").join(name)
        },
        PathBuf::from,
    );
    let mut needed = vec![
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kubectl",
    ];
    if options.nodes {
        needed.push("kube-scheduler");
    }
    for program in needed {
        assert!(
            folder.join(program).is_file(),
            "{program} is not in {}: build it with `make cluster-tools`, or set KUBEBUILDER_ASSETS \
             to a folder that has it",
            folder.display()
        );
    }
    folder
}

/// What runs in a cluster's folder; all ends when dropped.
#[derive(Debug)]
pub(super) struct Programs {
    tools: PathBuf,
    folder: PathBuf,
    running: Vec<(&'static str, Child)>,
    /// None only while it is being dropped.
    janitor: Option<(PipeWriter, Child)>,
}

impl Programs {
    pub(super) fn new(tools: PathBuf, folder: &Path) -> Self {
        let (reader, writer) = std::io::pipe().expect("pipe");
        // In a session of its own: a terminal's Ctrl-C is for the test, not for who cleans up.
        let janitor = Command::new("setsid")
            .args(["sh", "-c", JANITOR, "janitor"])
            .arg(folder)
            .current_dir("/")
            .stdin(reader)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setsid and sh are there");
        Self {
            tools,
            folder: folder.to_owned(),
            running: Vec::new(),
            janitor: Some((writer, janitor)),
        }
    }

    pub(super) fn path(&self, program: &str) -> PathBuf {
        self.tools.join(program)
    }

    pub(super) fn run(&mut self, program: &'static str, arguments: &[String]) {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(program))
            .expect("disk is there");
        let child = Command::new(self.path(program))
            .args(arguments)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
        self.running.push((program, child));
    }

    /// Kills a program and waits for its end.
    pub(super) fn end(&mut self, program: &str) {
        let place = self.place(program);
        let (_, mut child) = self.running.remove(place);
        end(&mut child);
    }

    pub(super) fn pid(&self, program: &str) -> u32 {
        let (_, child) = &self.running[self.place(program)];
        child.id()
    }

    pub(super) fn signal(&self, program: &str, signal: Signal) {
        let pid = i32::try_from(self.pid(program)).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("a process of ours");
    }

    /// Panics with the last words of a program that has ended by itself.
    pub(super) fn check(&mut self) {
        for (program, child) in &mut self.running {
            if let Ok(Some(status)) = child.try_wait() {
                let program = *program;
                panic!("{program}: {status}: {}", self.last_words(program));
            }
        }
    }

    /// The end of a program's log.
    pub(super) fn last_words(&self, program: &str) -> String {
        let log = fs::read_to_string(self.log(program)).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn log(&self, program: &str) -> PathBuf {
        self.folder.join(format!("{program}.log"))
    }

    fn place(&self, program: &str) -> usize {
        let mut running = self.running.iter();
        let place = running.position(|(name, _)| *name == program);
        place.unwrap_or_else(|| panic!("{program} does not run"))
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Programs {
    fn drop(&mut self) {
        for (_, child) in self.running.iter_mut().rev() {
            end(child);
        }
        if let Some((pipe, mut janitor)) = self.janitor.take() {
            drop(pipe);
            let _ = janitor.wait();
        }
    }
}
