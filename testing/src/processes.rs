//! The machine's processes, found by what is in their arguments and environment.
//!
//! For what a program under test has started and the test has no handle of.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process as `/proc` showed it at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its arguments, the program's own name first.
    pub arguments: Vec<String>,
    environment: String,
}

impl Process {
    /// The file name of its program, as it was started.
    pub fn program(&self) -> &str {
        let path = self.arguments.first().map_or("", String::as_str);
        path.rsplit('/').next().unwrap_or(path)
    }

    /// Whether its arguments or environment have this in them.
    pub fn mentions(&self, part: &str) -> bool {
        self.environment.contains(part) || self.arguments.iter().any(|it| it.contains(part))
    }

    /// Sends it a signal; nothing happens when it has ended.
    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.pid) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Whether it still runs: not ended, not a zombie, and not another one of the same id.
    pub fn runs(&self) -> bool {
        read(self.pid).is_some_and(|now| now.arguments == self.arguments)
    }

    /// Value of a field of `/proc/PID/status` that is given in kB, such as `VmRSS`; in bytes.
    pub fn memory(&self, field: &str) -> Option<u64> {
        memory(self.pid, field)
    }
}

/// Value of a field of `/proc/PID/status` that is given in kB, such as `VmRSS`; in bytes.
pub fn memory(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// All processes but this one whose arguments or environment have this in them.
pub fn with(part: &str) -> Vec<Process> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(read)
        .filter(|process| process.mentions(part))
        .collect()
}

/// Kills all of them, and what they start meanwhile. Gives up after 10 s.
#[expect(
    clippy::disallowed_methods,
    reason = "for Drop, which cannot await; nothing announces the end of a stranger's child"
)]
pub fn kill_all(part: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let left = with(part);
        if left.is_empty() {
            return;
        }
        for process in left {
            process.signal(Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// None for what has ended; a zombie has no arguments any more.
fn read(pid: u32) -> Option<Process> {
    let folder = Path::new("/proc").join(pid.to_string());
    let arguments = fs::read(folder.join("cmdline")).ok()?;
    if arguments.is_empty() {
        return None;
    }
    let environment = fs::read(folder.join("environ")).unwrap_or_default();
    Some(Process {
        pid,
        arguments: String::from_utf8_lossy(&arguments)
            .trim_end_matches('\0')
            .split('\0')
            .map(str::to_owned)
            .collect(),
        environment: String::from_utf8_lossy(&environment).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, process::Stdio};

    use super::*;

    #[test]
    fn a_child_is_found_by_its_environment_and_killed() {
        let mark = uuid::Uuid::new_v4().to_string();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo up; read -r end"])
            .env("MARK", &mark)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // For an instant, a process that was just started has no environment yet.
        let mut up = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
        let found = with(&mark);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].program(), "sh");
        assert!(found[0].runs());
        assert!(found[0].memory("VmRSS").unwrap() > 0);
        kill_all(&mark);
        assert!(!child.wait().unwrap().success());
        assert!(!found[0].runs());
    }
}
