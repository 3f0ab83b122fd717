//! How each session is to live and end. Pure: seed and number decide.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// What is to happen to a session.
#[derive(Debug, Clone)]
pub struct Life {
    /// Which one it is.
    pub number: u64,
    /// How long it runs before it ends.
    pub runs: Duration,
    /// Whether its token Secret is deleted while it runs.
    pub loses_secret: bool,
    /// How it ends.
    pub ends: Ending,
    /// Whether it is started once more afterwards, and then completes.
    pub again: bool,
    /// How long it stays after its end.
    pub stays: Duration,
}

/// How a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its agent ends with exit code 0.
    Completes,
    /// Its agent ends with another one.
    Fails,
    /// Somebody stops it.
    Stopped,
    /// Somebody deletes it as it runs.
    Deleted,
    /// Somebody deletes its pod.
    PodDeleted,
}

impl Ending {
    /// The phase that it leads to; none where nothing is left.
    pub fn phase(self) -> Option<&'static str> {
        match self {
            Self::Completes => Some("Completed"),
            Self::Fails | Self::PodDeleted => Some("Failed"),
            Self::Stopped => Some("Stopped"),
            Self::Deleted => None,
        }
    }
}

impl Life {
    /// That of the session of this number.
    pub fn of(seed: u64, number: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let ends = match random.random_range(0..10) {
            0..=3 => Ending::Completes,
            4 => Ending::Fails,
            5 | 6 => Ending::Stopped,
            7 | 8 => Ending::Deleted,
            _ => Ending::PodDeleted,
        };
        Self {
            number,
            runs: Duration::from_millis(random.random_range(1_000..180_000)),
            loses_secret: random.random_bool(0.1),
            ends,
            again: ends != Ending::Deleted && random.random_bool(0.2),
            stays: Duration::from_millis(random.random_range(0..10_000)),
        }
    }
}
