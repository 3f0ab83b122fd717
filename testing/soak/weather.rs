//! Which faults are in force, and were lately: what explains that something does not work.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::plan::Fault;

/// How long after its end a fault still explains something: a program starts, and connections are
/// made again.
const SETTLED: Duration = Duration::from_secs(10);

/// All faults so far. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Weather(Arc<Mutex<Vec<Seen>>>);

#[derive(Debug)]
struct Seen {
    fault: Fault,
    until: Option<Instant>,
}

impl Weather {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A fault begins.
    pub fn begins(&self, fault: Fault) {
        self.lock().push(Seen { fault, until: None });
    }

    /// It is mended.
    pub fn ends(&self, fault: Fault, now: Instant) {
        let mut all = self.lock();
        let open = all.iter_mut().rfind(|it| it.fault == fault);
        if let Some(seen) = open {
            seen.until = Some(now);
        }
    }

    /// Whether one of these faults explains what has failed between `since` and this moment.
    pub fn explains(&self, since: Instant, which: impl Fn(Fault) -> bool) -> bool {
        let all = self.lock();
        let mut lately = all
            .iter()
            .filter(|it| it.until.is_none_or(|until| until + SETTLED > since));
        lately.any(|it| which(it.fault))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_explains_what_fails_until_all_has_settled() {
        let weather = Weather::new();
        let now = Instant::now();
        let explains = |since, replica| weather.explains(since, |it| it.replica() == Some(replica));
        assert!(!explains(now, 0));

        weather.begins(Fault::FreezeReplica(0));
        assert!(explains(now + SETTLED * 9, 0));
        assert!(!explains(now, 1));

        weather.ends(Fault::FreezeReplica(0), now);
        assert!(explains(now + SETTLED / 2, 0));
        assert!(!explains(now + SETTLED, 0));
        weather.begins(Fault::FreezeReplica(0));
        assert!(explains(now + SETTLED, 0));
    }
}
