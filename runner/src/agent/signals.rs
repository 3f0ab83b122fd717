//! The signals that the runner passes on to the agent.

use std::{io, pin::Pin};

use futures_util::{
    Stream, StreamExt as _,
    stream::{SelectAll, poll_fn},
};
use nix::libc;
use tokio::signal::unix::{SignalKind, signal};

/// All that a process may be sent for a reason of its own. Not: what cannot be caught; faults of
/// the runner itself; SIGCHLD, which is about the runner's children; SIGPIPE, SIGTTIN and SIGTTOU,
/// which are about its own stdio.
const NAMED: [libc::c_int; 16] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGURG,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGWINCH,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// Signals to the runner, from when this was made. Of a signal that comes again before it was
/// read, one is seen, as with any signal (signal(7)); realtime ones too.
pub(crate) struct Signals(SelectAll<Pin<Box<dyn Stream<Item = i32> + Send>>>);

impl Signals {
    /// Catches them all.
    ///
    /// # Errors
    /// When one cannot be caught.
    pub(crate) fn catch() -> io::Result<Self> {
        let realtime = libc::SIGRTMIN()..=libc::SIGRTMAX();
        let mut all = SelectAll::new();
        for number in NAMED.into_iter().chain(realtime) {
            let mut caught = signal(SignalKind::from_raw(number))?;
            let numbers = poll_fn(move |context| {
                let received = caught.poll_recv(context);
                received.map(|received| received.map(|()| number))
            });
            all.push(Box::pin(numbers) as Pin<Box<dyn Stream<Item = i32> + Send>>);
        }
        Ok(Self(all))
    }

    /// The next one. Cancel-safe.
    pub(crate) async fn next(&mut self) -> i32 {
        match self.0.next().await {
            Some(number) => number,
            // Signal streams have no end.
            None => std::future::pending().await,
        }
    }

    /// The next one that asks for the end. Others are dropped: there is no agent to have them.
    pub(crate) async fn next_end(&mut self) -> i32 {
        loop {
            let number = self.next().await;
            if asks_for_end(number) {
                return number;
            }
        }
    }
}

/// Whether a signal starts the grace period.
pub(crate) fn asks_for_end(number: i32) -> bool {
    matches!(number, libc::SIGTERM | libc::SIGINT)
}

/// Its name, or its number where it has none.
pub(crate) fn name(number: i32) -> String {
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) => format!("signal {number}"),
    }
}
