//! Telling one process from a later one with the same number.
//!
//! In: `/proc`. A process is known by its number, its start time and the boot it belongs to; it is
//! signalled through a pidfd that was checked, so that a reused number is never hit.

use std::{fs, io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One process, and no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    /// Its number.
    pub(crate) pid: u32,
    /// Clock ticks from boot to its start (field 22 of `/proc/PID/stat`).
    pub(crate) start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub(crate) boot_id: String,
}

impl ProcessIdentity {
    /// The process that has this number now.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_time: Stat::of(pid)?.start_time,
            boot_id: boot_id()?,
        })
    }

    /// This process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(crate) fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs; one that has ended and waits to be reaped does not.
    pub(crate) fn is_alive(&self) -> bool {
        Stat::of(self.pid).is_ok_and(|stat| self.is(&stat) && !stat.has_ended())
    }

    /// A handle that means this process for ever; none when it has ended already.
    fn open(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Checked after opening: from now on the handle means this process, whatever happens.
        self.is_alive().then_some(handle)
    }

    /// Sends a signal. False when the process has ended already.
    ///
    /// # Errors
    /// When the signal may not be sent.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<bool> {
        match self.open() {
            None => Ok(false),
            Some(handle) => match pidfd_send_signal(handle, signal) {
                Ok(()) => Ok(true),
                Err(rustix::io::Errno::SRCH) => Ok(false),
                Err(error) => Err(error.into()),
            },
        }
    }

    fn is(&self, stat: &Stat) -> bool {
        self.start_time == stat.start_time && boot_id().is_ok_and(|now| now == self.boot_id)
    }
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    /// One letter, such as `S`.
    pub(super) state: char,
    /// Its parent's number.
    pub(super) parent: u32,
    /// Clock ticks from boot to its start.
    pub(super) start_time: u64,
}

impl Stat {
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let line = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&line).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "unknown form of /proc/PID/stat")
        })
    }

    /// The name in parentheses may hold anything, so fields count from the last `)`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.rsplit_once(')')?.1.split_ascii_whitespace();
        Some(Self {
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
            start_time: fields.nth(17)?.parse().ok()?,
        })
    }

    pub(super) fn has_ended(self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let line = "7 (a) b ) (c) S 3 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 12345 9 9";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                state: 'S',
                parent: 3,
                start_time: 12345
            })
        );
        assert_eq!(Stat::parse("7 (cut off"), None);
    }

    #[test]
    fn another_start_time_or_boot_is_another_process() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.is_alive());
        let earlier = ProcessIdentity {
            start_time: own.start_time - 1,
            ..own.clone()
        };
        let other_boot = ProcessIdentity {
            boot_id: "another".to_owned(),
            ..own
        };
        for gone in [earlier, other_boot] {
            assert!(!gone.is_alive());
            assert!(gone.open().is_none());
            assert!(!gone.signal(Signal::TERM).unwrap());
        }
    }
}
