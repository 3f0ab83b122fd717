//! A moment at which the world stops, so that a program can be killed between two of its steps.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::watch;

/// On which side of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The call has come, and has not been passed to the server.
    Before,
    /// The server has answered, and the answer has not been passed on.
    After,
}

/// Stops the world at the N-th call of those that are counted: that one, and every call that comes
/// later to a proxy with this cut, gets no answer. One cut may be in several proxies, which then
/// count together.
#[derive(Debug, Clone)]
pub struct Cut(Arc<State>);

#[derive(Debug)]
struct State {
    number: usize,
    side: Side,
    counted: AtomicUsize,
    reached: watch::Sender<bool>,
}

/// What happens to a call.
pub(super) enum Turn {
    /// It passes.
    Pass,
    /// It is the one; on which side of it the world stops.
    Last(Side),
    /// The world has stopped.
    Stopped,
}

impl Cut {
    /// Stops at the call of this number; the first is 1.
    pub fn at(number: usize, side: Side) -> Self {
        Self(Arc::new(State {
            number,
            side,
            counted: AtomicUsize::new(0),
            reached: watch::Sender::new(false),
        }))
    }

    /// Waits until the world has stopped.
    pub async fn reached(&self) {
        // The sender lives in self.
        let _ = self
            .0
            .reached
            .subscribe()
            .wait_for(|reached| *reached)
            .await;
    }

    /// Whether the call of that number has come: the world stops now, or has stopped.
    pub fn has_come(&self) -> bool {
        self.0.counted.load(Ordering::Acquire) >= self.0.number
    }

    /// Whether the world has stopped.
    pub fn is_reached(&self) -> bool {
        *self.0.reached.borrow()
    }

    pub(super) fn turn(&self, is_counted: bool) -> Turn {
        if self.is_reached() {
            return Turn::Stopped;
        }
        if !is_counted {
            return Turn::Pass;
        }
        let number = self.0.counted.fetch_add(1, Ordering::AcqRel) + 1;
        match number.cmp(&self.0.number) {
            std::cmp::Ordering::Less => Turn::Pass,
            std::cmp::Ordering::Equal => Turn::Last(self.0.side),
            std::cmp::Ordering::Greater => Turn::Stopped,
        }
    }

    /// Stops the world.
    pub(super) async fn stop(&self) -> ! {
        self.0.reached.send_replace(true);
        std::future::pending().await
    }
}
