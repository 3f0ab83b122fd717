//! Finding and ending whatever still runs of a session.
//!
//! A process belongs to a run if it was recorded, descends from one that was, or carries the run's
//! mark in its environment: what an agent started in the background may have lost its parent, but
//! hardly its environment.

use std::{collections::BTreeSet, fs, io::Read as _, time::Duration};

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::identity::{ProcessIdentity, Stat};

/// Name of the variable with the mark of a run. Not secret: a random UUID.
pub(crate) const MARK: &str = "AMBIENT_RUN_MARK";

/// How long what is asked to end may take before it is killed, when nobody is left to supervise it.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

/// How long to wait for what was killed: a process in uninterruptible sleep takes its time.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Pause between two looks at `/proc`.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Largest environment that is searched for the mark (Linux: a quarter of the stack limit of 8 MiB).
const MAX_ENVIRONMENT: u64 = 2 * 1024 * 1024;

/// What may be ended.
#[derive(Debug, Clone)]
pub(crate) struct Family {
    /// Processes that were recorded, and with them all that descends from them.
    pub(crate) recorded: Vec<ProcessIdentity>,
    /// Descendants of this process (not itself) belong too: the shim's, while it lives.
    pub(crate) ancestor: Option<u32>,
    /// Value of [`MARK`].
    pub(crate) mark: String,
}

impl Family {
    /// Who of it runs now, this process left out.
    pub(crate) fn alive(&self) -> Vec<ProcessIdentity> {
        let processes = processes();
        let mut members: BTreeSet<u32> = self
            .recorded
            .iter()
            .filter(|process| process.is_alive())
            .map(|process| process.pid)
            .collect();
        let mark = format!("{MARK}={}", self.mark);
        members.extend(
            processes
                .iter()
                .map(|(pid, _)| *pid)
                .filter(|pid| has_variable(*pid, mark.as_bytes())),
        );
        let mut roots: BTreeSet<u32> = members.clone();
        roots.extend(self.ancestor);
        // Parents usually come before their children, so that one or two rounds are enough.
        loop {
            let more: Vec<u32> = processes
                .iter()
                .filter(|(pid, stat)| !roots.contains(pid) && roots.contains(&stat.parent))
                .map(|(pid, _)| *pid)
                .collect();
            if more.is_empty() {
                break;
            }
            roots.extend(&more);
            members.extend(more);
        }
        let own = std::process::id();
        members
            .into_iter()
            .filter(|pid| *pid != own && Some(*pid) != self.ancestor)
            .filter_map(|pid| ProcessIdentity::of(pid).ok())
            .filter(ProcessIdentity::is_alive)
            .collect()
    }

    /// Asks all of it to end, kills what has not after `grace`, and returns when nothing of it is
    /// left. False when something could not be killed.
    pub(crate) async fn end(&self, grace: Duration) -> bool {
        let asked = Instant::now();
        let mut told: Vec<ProcessIdentity> = Vec::new();
        loop {
            let alive = self.alive();
            if alive.is_empty() {
                return true;
            }
            if asked.elapsed() >= grace + KILL_LIMIT {
                return false;
            }
            let kill = asked.elapsed() >= grace;
            for process in &alive {
                // An error means that it is not ours to signal, or gone: the next look tells.
                if kill {
                    let _ = process.signal(Signal::KILL);
                } else if !told.contains(process) {
                    let _ = process.signal(Signal::TERM);
                    // One that was stopped sees the signal only when it goes on.
                    let _ = process.signal(Signal::CONT);
                }
            }
            told.extend(alive);
            sleep(LOOK_AGAIN).await;
        }
    }
}

/// Processes that have ended and wait for this process, their parent, to reap them.
pub(crate) fn ended_children() -> Vec<u32> {
    let own = std::process::id();
    processes()
        .into_iter()
        .filter(|(_, stat)| stat.parent == own && stat.has_ended())
        .map(|(pid, _)| pid)
        .collect()
}

fn processes() -> Vec<(u32, Stat)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, Stat::of(pid).ok()?)))
        .collect()
}

/// Only of processes of the same user can the environment be read; others are not ours.
fn has_variable(pid: u32, variable: &[u8]) -> bool {
    let mut environment = Vec::new();
    fs::File::open(format!("/proc/{pid}/environ"))
        .and_then(|file| file.take(MAX_ENVIRONMENT).read_to_end(&mut environment))
        .is_ok()
        && environment
            .split(|byte| *byte == 0)
            .any(|entry| entry == variable)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sleeper(mark: &str, script: &str) -> std::process::Child {
        Command::new("sh")
            .args(["-c", script])
            .env(MARK, mark)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn family(mark: &str) -> Family {
        Family {
            recorded: Vec::new(),
            ancestor: None,
            mark: mark.to_owned(),
        }
    }

    async fn until(what: impl Fn() -> bool) {
        tokio::time::timeout(Duration::from_secs(20), async {
            while !what() {
                sleep(LOOK_AGAIN).await;
            }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn what_carries_the_mark_is_ended_and_nothing_else() {
        let mark = uuid::Uuid::new_v4().to_string();
        let mut marked = sleeper(&mark, "sleep 300 & wait");
        let mut other = sleeper("another", "sleep 300");
        until(|| family(&mark).alive().len() == 2).await;

        assert!(family(&mark).end(Duration::from_secs(5)).await);

        marked.wait().unwrap();
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[tokio::test]
    async fn what_ignores_the_request_is_killed() {
        let mark = uuid::Uuid::new_v4().to_string();
        let mut stubborn = sleeper(&mark, "trap '' TERM; while :; do sleep 1; done");
        until(|| family(&mark).alive().len() == 2).await;
        assert!(family(&mark).end(Duration::from_millis(200)).await);
        stubborn.wait().unwrap();
    }

    #[tokio::test]
    async fn descendants_of_the_recorded_belong_even_without_the_mark() {
        let mut parent = sleeper("unknown", "unset AMBIENT_RUN_MARK; sleep 300 & wait");
        let recorded = ProcessIdentity::of(parent.id()).unwrap();
        let family = Family {
            recorded: vec![recorded],
            ..family("nothing has this mark")
        };
        until(|| family.alive().len() == 2).await;
        assert!(family.end(Duration::from_secs(5)).await);
        parent.wait().unwrap();
        assert!(family.alive().is_empty());
    }
}
