//! What only the operating system can do; the only unsafe code of the product.
//!
//! Signals are raw numbers here: a realtime signal has no name, and is passed on all the same.
#![allow(unsafe_code)]

use std::{
    io::{self, IsTerminal as _},
    os::unix::process::{CommandExt as _, parent_id},
    process::Command,
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
    },
    unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp},
};

/// Ended processes are collected by the runner, and no core dump of it or its agent holds a token.
///
/// What the kernel refuses is left as it is: no agent should fail for it.
pub(crate) fn prepare_process() {
    let _ = prctl::set_dumpable(false);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_CORE) {
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, hard);
    }
    if std::process::id() != 1 {
        let _ = prctl::set_child_subreaper(true);
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Exited(u8),
    /// This signal ended it.
    Signalled(i32),
}

/// Collects one ended child, if there is one, and says which.
pub(crate) fn reap_one() -> Option<(i32, Ended)> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int to the address, which is that of a live local.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid < 0 && Errno::last() == Errno::EINTR {
            continue;
        }
        if pid <= 0 {
            return None;
        }
        let ended = if libc::WIFEXITED(status) {
            Ended::Exited(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
        } else {
            Ended::Signalled(libc::WTERMSIG(status))
        };
        return Some((pid, ended));
    }
}

/// Sends a signal to one process.
///
/// # Errors
/// `ESRCH` when there is none.
pub(crate) fn signal_process(pid: i32, signal: i32) -> io::Result<()> {
    // 0 and negative numbers are groups, 1 is everybody's parent.
    if pid <= 1 {
        return Err(Errno::ESRCH.into());
    }
    // SAFETY: kill touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Sends a signal to a process group.
///
/// # Errors
/// `ESRCH` when it has no member.
pub(crate) fn signal_group(leader: i32, signal: i32) -> io::Result<()> {
    if leader <= 1 {
        return Err(Errno::ESRCH.into());
    }
    // SAFETY: killpg touches no memory of ours.
    Errno::result(unsafe { libc::killpg(leader, signal) })?;
    Ok(())
}

/// The child will lead a process group of its own, which has the terminal when `foreground`, and
/// will not outlive the runner.
pub(crate) fn own_group(command: &mut Command, foreground: bool) {
    let runner = std::process::id();
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe functions may be called: prctl,
    // getppid, signal, getpid and tcsetpgrp are (signal-safety(7)); nothing allocates.
    unsafe {
        command.pre_exec(move || {
            // Set for the thread that forked: the runner's only one that lives as long as it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if parent_id() != runner {
                // The runner ended before the line above.
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            if foreground {
                // A background process that takes the terminal is stopped, unless it ignores it.
                let before = libc::signal(libc::SIGTTOU, libc::SIG_IGN);
                libc::tcsetpgrp(libc::STDIN_FILENO, libc::getpid());
                libc::signal(libc::SIGTTOU, before);
            }
            Ok(())
        });
    }
}

/// Whether stdin is a terminal which the runner may give to the agent.
pub(crate) fn has_terminal() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal() && tcgetpgrp(&stdin).is_ok_and(|group| group == getpgrp())
}

/// Takes the terminal back from an agent that has ended.
pub(crate) fn take_terminal() {
    use nix::sys::signal::{SigSet, Signal};
    let stdin = io::stdin();
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTTOU);
    if stop.thread_block().is_ok() {
        let _ = tcsetpgrp(&stdin, getpgrp());
        let _ = stop.thread_unblock();
    }
}

/// The runner's own process id.
pub(crate) fn own_pid() -> i32 {
    Pid::this().as_raw()
}
