//! Watches over one agent: passes signals on, keeps its time, and ends it and all it started.
//!
//! In: signals, orders and the agent's end. Out: how it ended. Ending means SIGTERM, and SIGKILL
//! for everything below the runner after the grace period.

use std::time::Duration;

use metrics::counter;
use nix::libc;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    RunningAgent, leftovers,
    reaper::Reaper,
    signals::{self, Signals},
    sys::{self, Ended},
};
use crate::metrics as names;

/// Longest wait for an agent that was sent SIGKILL; only an uninterruptible wait takes longer.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Far enough to be never, near enough for the clock.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What the supervisor is to do with the agent when its token has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Send this signal, to the agent's first process alone: its children may not expect it.
    Signal(i32),
    /// End it; who waits for its end starts it again.
    Restart,
}

/// What it takes to supervise, for one agent after the other.
pub(crate) struct Supervisor {
    /// What the runner is sent.
    pub(crate) signals: Signals,
    /// What the handover wants.
    pub(crate) orders: mpsc::Receiver<Order>,
    /// Who collects what ends.
    pub(crate) reaper: Reaper,
    /// From SIGTERM to SIGKILL.
    pub(crate) grace: Duration,
    /// When the time of all agents together is over.
    pub(crate) times_out_at: Option<Instant>,
}

/// How an agent's life ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// How its first process ended.
    pub(crate) ended: Ended,
    /// Why, if it was ended.
    pub(crate) why: Option<Why>,
}

/// Why an agent was ended. In order: a later reason takes the place of an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// To be started again.
    Restart,
    /// Its time was over.
    TimedOut,
    /// The runner cannot go on.
    Stopped,
    /// The runner was asked to end.
    Signalled,
}

/// How far ending the agent has come.
struct Ending {
    why: Option<Why>,
    kill_at: Option<Instant>,
    give_up_at: Option<Instant>,
}

impl Supervisor {
    /// Waits for the agent's end, and ends what it leaves behind. `stop` ends it.
    pub(crate) async fn watch(
        &mut self,
        agent: &mut RunningAgent,
        stop: &CancellationToken,
    ) -> Outcome {
        let mut ending = Ending {
            why: None,
            kill_at: None,
            give_up_at: None,
        };
        let never = Instant::now() + NEVER;
        let ended = loop {
            let timed_out = ending.why.is_some_and(|why| why >= Why::TimedOut);
            tokio::select! {
                biased;
                ended = &mut agent.ended => {
                    break ended.unwrap_or(Ended::Signalled(libc::SIGKILL));
                }
                number = self.signals.next() => self.forward(agent.pid, number, &mut ending),
                () = stop.cancelled(), if ending.why.is_none_or(|why| why < Why::Stopped) => {
                    self.end(agent.pid, Why::Stopped, &mut ending);
                }
                Some(order) = self.orders.recv() => self.obey(agent.pid, order, &mut ending),
                () = sleep_until(self.times_out_at.unwrap_or(never)), if !timed_out => {
                    warn!("the agent's time is over");
                    self.end(agent.pid, Why::TimedOut, &mut ending);
                }
                () = sleep_until(ending.kill_at.unwrap_or(never)) => {
                    self.kill(agent.pid, &mut ending);
                }
                () = sleep_until(ending.give_up_at.unwrap_or(never)) => {
                    error!(pid = agent.pid, "agent does not end");
                    break Ended::Signalled(libc::SIGKILL);
                }
            }
        };
        info!(pid = agent.pid, ?ended, why = ?ending.why, "agent ended");
        let killed = ending.give_up_at.is_some();
        let kept = if ending.why == Some(Why::Restart) {
            self.others(agent.pid)
        } else {
            Vec::new()
        };
        leftovers::end(&self.reaper, &kept, self.grace, killed).await;
        Outcome {
            ended,
            why: ending.why,
        }
    }

    fn forward(&self, pid: i32, number: i32, ending: &mut Ending) {
        let name = signals::name(number);
        counter!(names::SIGNALS).increment(1);
        debug!(signal = name, "signal passed on");
        if signals::asks_for_end(number) {
            info!(signal = name, "ending the agent");
            self.begin(Why::Signalled, ending);
        }
        send(pid, number);
        if signals::asks_for_end(number) {
            // A stopped agent could not act on it.
            send(pid, libc::SIGCONT);
        }
    }

    fn obey(&self, pid: i32, order: Order, ending: &mut Ending) {
        match order {
            Order::Signal(number) => {
                debug!(signal = signals::name(number), "agent told of new token");
                let _ = sys::signal_process(pid, number);
            }
            Order::Restart if ending.why.is_none() => {
                info!("restarting the agent for its new token");
                self.end(pid, Why::Restart, ending);
            }
            Order::Restart => {}
        }
    }

    fn end(&self, pid: i32, why: Why, ending: &mut Ending) {
        self.begin(why, ending);
        send(pid, libc::SIGTERM);
        send(pid, libc::SIGCONT);
    }

    /// Starts the grace period, once.
    fn begin(&self, why: Why, ending: &mut Ending) {
        ending.why = ending.why.max(Some(why));
        if ending.kill_at.is_none() && ending.give_up_at.is_none() {
            ending.kill_at = Some(Instant::now() + self.grace);
        }
    }

    fn kill(&self, pid: i32, ending: &mut Ending) {
        warn!(
            pid,
            grace_s = self.grace.as_secs(),
            "agent did not end in time; killing it"
        );
        send(pid, libc::SIGKILL);
        leftovers::kill(&self.others(pid));
        ending.kill_at = None;
        ending.give_up_at = Some(Instant::now() + KILL_LIMIT);
    }

    /// Children of the runner that are not the agent's.
    fn others(&self, pid: i32) -> Vec<i32> {
        let mut known = self.reaper.known();
        known.retain(|other| *other != pid);
        known
    }
}

/// To the agent's group; to the agent alone should it have left that.
fn send(pid: i32, number: i32) {
    if sys::signal_group(pid, number).is_err() {
        let _ = sys::signal_process(pid, number);
    }
}
