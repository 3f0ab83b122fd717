//! Wall time that tests can set.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Where a program reads wall time. Clones share it.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System,
    /// Runs along tokio's clock, so that a test which pauses that pauses this.
    Manual(Arc<Mutex<(SystemTime, tokio::time::Instant)>>),
}

impl Clock {
    /// The machine's wall clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows `start` now and goes on with tokio's (maybe paused) clock.
    pub fn manual(start: SystemTime) -> Self {
        Self(Source::Manual(Arc::new(Mutex::new((
            start,
            tokio::time::Instant::now(),
        )))))
    }

    /// The wall time.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that asks the machine"
    )]
    pub fn now(&self) -> SystemTime {
        match &self.0 {
            Source::System => SystemTime::now(),
            Source::Manual(start) => {
                let (wall, since) = *start.lock().unwrap_or_else(PoisonError::into_inner);
                wall + since.elapsed()
            }
        }
    }

    /// Sets a manual clock; without effect on the machine's.
    pub fn set(&self, now: SystemTime) {
        if let Source::Manual(start) = &self.0 {
            *start.lock().unwrap_or_else(PoisonError::into_inner) =
                (now, tokio::time::Instant::now());
        }
    }

    /// Seconds since the Unix epoch; 0 before it.
    pub fn unix_seconds(&self) -> u64 {
        unix_seconds(self.now())
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::System => "Clock(system)",
            Source::Manual(_) => "Clock(manual)",
        })
    }
}

/// Clocks that are further apart do not agree: one of them is wrong. Less is the age of an answer, and
/// times in whole seconds.
pub const CLOCKS_AGREE: Duration = Duration::from_secs(10);

/// How far apart two times are.
pub fn apart(one: SystemTime, other: SystemTime) -> Duration {
    let later = one.duration_since(other);
    later.unwrap_or_else(|earlier| earlier.duration())
}

/// Seconds from the Unix epoch to `time`; 0 before it.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// The time `seconds` after the Unix epoch; none when it is beyond what the machine can hold.
pub fn from_unix_seconds(seconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}
