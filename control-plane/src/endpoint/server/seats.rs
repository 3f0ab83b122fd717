//! Places for connections, and who gives one up when all are taken.
//!
//! What a connection does is one atomic number, which its own task sets and the accept loop reads:
//! a request costs no lock. Only when somebody must leave is everybody looked at, and then several
//! leave at a time, so that a flood of newcomers costs little each.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Waker,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::{task::Id, time::Instant};

/// Part of all places that one network may have while others want one: an ingress may have all of
/// them as long as nobody else comes.
const SHARE: usize = 4;

/// Part of all places that is made free at a time, and of those who wait at most.
const BATCH: usize = 64;
const FEW: usize = 8;

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doing {
    /// It is open after an answer, and nothing has come since. First to leave: whoever finds it
    /// closed opens another.
    Idle,
    /// Its head is not complete.
    Head,
    /// Its request is being answered.
    Answer,
    /// It has given up its place.
    Left,
}

/// One connection's place.
#[derive(Debug)]
pub(super) struct Seat {
    network: IpAddr,
    began: Instant,
    /// What it does in the lowest two bits, above them since when, in microseconds since it began.
    state: AtomicU64,
    drains: AtomicBool,
    waker: AtomicWaker,
}

impl Seat {
    /// A place for a connection from this network, from which nothing has come yet.
    pub(super) fn new(network: IpAddr, now: Instant) -> Self {
        Self {
            network,
            began: now,
            state: AtomicU64::new(encode(Doing::Head, Duration::ZERO)),
            drains: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    /// When the connection was accepted.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// What it does, and since when.
    pub(super) fn doing(&self) -> (Doing, Instant) {
        let (doing, since) = decode(self.state.load(Ordering::Acquire));
        (doing, self.began + since)
    }

    /// Something came.
    pub(super) fn heard(&self) {
        let seen = self.state.load(Ordering::Acquire);
        if decode(seen).0 == Doing::Idle {
            self.turn(seen, Doing::Head);
        }
    }

    /// A head is complete.
    pub(super) fn asked(&self) {
        let mut seen = self.state.load(Ordering::Acquire);
        while decode(seen).0 != Doing::Left && !self.turn(seen, Doing::Answer) {
            seen = self.state.load(Ordering::Acquire);
        }
    }

    /// Its answer is ready to be sent.
    pub(super) fn answered(&self) {
        let seen = self.state.load(Ordering::Acquire);
        if decode(seen).0 == Doing::Answer {
            self.turn(seen, Doing::Idle);
        }
    }

    /// Asks it to end after the request that is under way.
    pub(super) fn drain(&self) {
        self.drains.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(super) fn drains(&self) -> bool {
        self.drains.load(Ordering::Acquire)
    }

    /// Who is woken when the connection is to leave or to drain.
    pub(super) fn wake_with(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    /// Takes the place back, unless the connection did anything since it was looked at.
    fn leave(&self, seen: u64) -> bool {
        let left = self.turn(seen, Doing::Left);
        if left {
            self.waker.wake();
        }
        left
    }

    fn turn(&self, seen: u64, doing: Doing) -> bool {
        let new = encode(doing, self.began.elapsed());
        let turned = self
            .state
            .compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire);
        turned.is_ok()
    }
}

fn encode(doing: Doing, since: Duration) -> u64 {
    // Enough for as long as a machine runs.
    let micros = u64::try_from(since.as_micros()).unwrap_or(u64::MAX >> 2);
    micros << 2 | doing as u64
}

fn decode(state: u64) -> (Doing, Duration) {
    let doing = match state & 3 {
        0 => Doing::Idle,
        1 => Doing::Head,
        2 => Doing::Answer,
        _ => Doing::Left,
    };
    (doing, Duration::from_micros(state >> 2))
}

/// All places. Owned by the accept loop.
pub(super) struct Seats {
    places: usize,
    taken: HashMap<Id, Arc<Seat>>,
    networks: HashMap<IpAddr, usize>,
}

impl Seats {
    pub(super) fn new(places: usize) -> Self {
        Self {
            places,
            taken: HashMap::new(),
            networks: HashMap::new(),
        }
    }

    /// Whether a connection from this network can have a place; if need be, others leave.
    pub(super) fn have_room_for(&mut self, network: IpAddr) -> bool {
        self.taken.len() < self.places || self.make_room(Some(network)) > 0
    }

    /// A connection's task has a place from now on.
    pub(super) fn take(&mut self, task: Id, seat: Arc<Seat>) {
        *self.networks.entry(seat.network).or_default() += 1;
        self.taken.insert(task, seat);
    }

    /// A connection's task has ended.
    pub(super) fn free(&mut self, task: Id) {
        if let Some(seat) = self.taken.remove(&task)
            && let Some(count) = self.networks.get_mut(&seat.network)
        {
            *count -= 1;
            if *count == 0 {
                self.networks.remove(&seat.network);
            }
        }
    }

    /// Asks all to end.
    pub(super) fn drain(&self) {
        for seat in self.taken.values() {
            seat.drain();
        }
    }

    /// Has those leave who have waited longest for a head of theirs, idle ones first, and gives how
    /// many do. Nobody who is being answered leaves.
    ///
    /// Networks that have more than their share, a newcomer's own counted with it, make room for
    /// the others; only when there is none do all.
    pub(super) fn make_room(&mut self, newcomer: Option<IpAddr>) -> usize {
        let share = (self.places / SHARE).max(1);
        let is_over = |network: &IpAddr| {
            let has = self.networks.get(network).copied().unwrap_or(0);
            has + usize::from(newcomer.as_ref() == Some(network)) > share
        };
        let mut waiting = self.waiting(is_over);
        if waiting.is_empty() && !newcomer.as_ref().is_some_and(is_over) {
            waiting = self.waiting(|_| true);
        }
        if waiting.is_empty() {
            return 0;
        }
        // Never all of a few: whoever has just come is about to ask.
        let leaving = (waiting.len() / FEW).min(self.places / BATCH).max(1);
        waiting.select_nth_unstable_by_key(leaving - 1, |one| (one.doing, one.since));
        let mut left = 0;
        for one in waiting.into_iter().take(leaving) {
            if one.seat.leave(one.seen) {
                self.free(one.task);
                left += 1;
            }
        }
        left
    }

    fn waiting(&self, of: impl Fn(&IpAddr) -> bool) -> Vec<Waiting> {
        let each = self.taken.iter().filter_map(|(task, seat)| {
            let seen = seat.state.load(Ordering::Acquire);
            let (doing, since) = decode(seen);
            let waits = matches!(doing, Doing::Idle | Doing::Head) && of(&seat.network);
            waits.then(|| Waiting {
                doing,
                since: seat.began + since,
                task: *task,
                seen,
                seat: Arc::clone(seat),
            })
        });
        each.collect()
    }
}

/// A connection that waits for a head, as it was seen.
struct Waiting {
    doing: Doing,
    since: Instant,
    task: Id,
    seen: u64,
    seat: Arc<Seat>,
}

#[cfg(test)]
mod tests;
