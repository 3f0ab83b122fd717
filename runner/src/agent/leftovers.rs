//! Ends what an agent leaves behind: processes that outlived it, in whatever group or session.
//!
//! They are all descendants of the runner, as orphans come to PID 1 or to the sub-reaper. A process
//! is held by a pidfd before it is signalled: a number may belong to somebody else a moment later.

use std::{collections::HashMap, fs, os::fd::OwnedFd, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{reaper::Reaper, sys};

/// Longest time that leftovers get between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// Longest wait for what was killed: a process in an uninterruptible wait must not hold up the
/// end of the container, which ends it too.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How often the process table is read: only children, not grandchildren, give a sign.
const POLL: Duration = Duration::from_millis(20);

/// Ends all descendants but the `kept` ones and theirs. `at_once` spares them no grace.
pub(crate) async fn end(reaper: &Reaper, kept: &[i32], grace: Duration, at_once: bool) {
    let mut found = descendants(kept);
    if found.is_empty() {
        return;
    }
    info!(processes = found.len(), "ending what the agent left behind");
    if !at_once {
        signal_all(&found, Signal::TERM);
        let until = Instant::now() + grace.min(GRACE);
        while !found.is_empty() && Instant::now() < until {
            pause(reaper).await;
            found = descendants(kept);
        }
    }
    let until = Instant::now() + KILL_LIMIT;
    while !found.is_empty() {
        // Again each time: who is not dead yet may have started another.
        signal_all(&found, Signal::KILL);
        if Instant::now() >= until {
            warn!(processes = found.len(), "processes do not end");
            return;
        }
        pause(reaper).await;
        found = descendants(kept);
    }
}

/// Sends SIGKILL to all descendants but the `kept` ones and theirs.
pub(crate) fn kill(kept: &[i32]) {
    signal_all(&descendants(kept), Signal::KILL);
}

async fn pause(reaper: &Reaper) {
    tokio::select! {
        () = reaper.reaped() => {}
        () = sleep(POLL) => {}
    }
}

fn signal_all(processes: &[Process], signal: Signal) {
    for process in processes {
        if let Some(handle) = hold(process) {
            let _ = pidfd_send_signal(&handle, signal);
        }
    }
}

/// A handle on the very process that was found, not on one that got its number since.
fn hold(process: &Process) -> Option<OwnedFd> {
    let pid = Pid::from_raw(process.pid)?;
    let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    (Process::read(process.pid)?.started == process.started).then_some(handle)
}

/// A line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    /// In clock ticks since boot: with the number, it names one process only.
    started: u64,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Self::parse(pid, &stat)
    }

    /// `proc_pid_stat(5)`. The name, in parentheses, may hold anything. None for zombies: they have
    /// ended, and only wait to be collected.
    fn parse(pid: i32, stat: &str) -> Option<Self> {
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let started = fields.nth(17)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self {
            pid,
            parent,
            started,
        })
    }
}

fn descendants(kept: &[i32]) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    let table = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = table.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for process in pids.filter_map(Process::read) {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut parents = vec![sys::own_pid()];
    while let Some(parent) = parents.pop() {
        for process in children.remove(&parent).unwrap_or_default() {
            if !kept.contains(&process.pid) {
                parents.push(process.pid);
                found.push(process);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_confuse_the_table() {
        let stat = "42 (a) R 1 (b) S 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 99887 1 2";
        let expected = Process {
            pid: 42,
            parent: 7,
            started: 99887,
        };
        assert_eq!(Process::parse(42, stat), Some(expected));
        let zombie = stat.replace(") S", ") Z");
        assert_eq!(Process::parse(42, &zombie), None);
        assert_eq!(Process::parse(42, "garbage"), None);
    }

    #[test]
    fn own_entry_can_be_read() {
        let own = Process::read(sys::own_pid()).unwrap();
        assert!(own.parent > 0 && own.started > 0);
    }
}
