//! What is in the Lease, and what follows from it. Pure.
//!
//! Clocks of replicas differ, so nobody believes the times in the record: a holder is alive as long
//! as the record keeps changing, seen by the observer's own clock.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use tokio::time::Instant;

use super::LeaseTimes;

/// What one look at the Lease calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// There is none: make it, with our name.
    Create,
    /// It is ours: say that we live.
    Renew,
    /// Nobody holds it, or its holder has not renewed it in time: put our name in.
    Take,
    /// Somebody else holds it, who has this long to renew it.
    Wait(Duration),
}

/// Remembers since when the record is as it is.
#[derive(Debug, Default)]
pub(super) struct Observer {
    seen: Option<(LeaseSpec, Instant)>,
}

impl Observer {
    /// What follows from the Lease as it is `now`.
    pub(super) fn judge(&mut self, lease: Option<&Lease>, identity: &str, now: Instant) -> Next {
        let Some(lease) = lease else {
            self.seen = None;
            return Next::Create;
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder == identity {
            return Next::Renew;
        }
        if holder.is_empty() {
            return Next::Take;
        }
        let life = life_of(&spec);
        let since = match &self.seen {
            Some((seen, since)) if *seen == spec => *since,
            _ => {
                self.seen = Some((spec, now));
                now
            }
        };
        match (since + life).saturating_duration_since(now) {
            Duration::ZERO => Next::Take,
            left => Next::Wait(left),
        }
    }
}

/// How long its holder may be silent.
fn life_of(spec: &LeaseSpec) -> Duration {
    let seconds = spec.lease_duration_seconds.unwrap_or_default();
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// A new Lease that we hold.
pub(super) fn made(name: &str, identity: &str, times: LeaseTimes, now: Timestamp) -> Lease {
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
        spec: None,
    };
    held(lease, identity, times, now)
}

/// The same Lease with our name in it, renewed now.
pub(super) fn held(lease: Lease, identity: &str, times: LeaseTimes, now: Timestamp) -> Lease {
    let before = lease.spec.unwrap_or_default();
    let is_ours = before.holder_identity.as_deref() == Some(identity);
    let transitions = before.lease_transitions.unwrap_or_default();
    let seconds = i32::try_from(times.recorded().as_secs()).unwrap_or(i32::MAX);
    let spec = if is_ours {
        LeaseSpec {
            renew_time: Some(MicroTime(now)),
            lease_duration_seconds: Some(seconds),
            ..before
        }
    } else {
        LeaseSpec {
            holder_identity: Some(identity.to_owned()),
            acquire_time: Some(MicroTime(now)),
            renew_time: Some(MicroTime(now)),
            lease_duration_seconds: Some(seconds),
            lease_transitions: Some(transitions.saturating_add(1)),
            ..before
        }
    };
    Lease {
        spec: Some(spec),
        ..lease
    }
}

/// The same Lease, held by nobody; none when it is not ours to give up.
pub(super) fn released(lease: Lease, identity: &str, now: Timestamp) -> Option<Lease> {
    let before = lease.spec?;
    if before.holder_identity.as_deref() != Some(identity) {
        return None;
    }
    Some(Lease {
        metadata: lease.metadata,
        spec: Some(LeaseSpec {
            holder_identity: None,
            renew_time: Some(MicroTime(now)),
            // For observers that look at the time alone; 0 is not valid.
            lease_duration_seconds: Some(1),
            ..before
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: LeaseTimes = LeaseTimes::new(Duration::from_secs(15));

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_lives_as_long_as_its_record_changes() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut observer = Observer::default();
        assert_eq!(observer.judge(None, "b", start), Next::Create);
        let mut lease = made("lease", "a", TIMES, at(0));
        // Its times are of no interest: the clock that wrote them may be wrong.
        for second in [0, 8, 16, 24] {
            lease = held(lease, "a", TIMES, at(-3600 + second));
            let second = u64::try_from(second).unwrap();
            let left = observer.judge(Some(&lease), "b", after(second));
            assert_eq!(left, Next::Wait(TIMES.recorded()));
            let left = observer.judge(Some(&lease), "b", after(second + 7));
            assert_eq!(left, Next::Wait(Duration::from_secs(12 - 7)));
        }
        let end = after(24) + TIMES.recorded();
        assert_eq!(observer.judge(Some(&lease), "b", end), Next::Take);
        assert_eq!(observer.judge(Some(&lease), "a", end), Next::Renew);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_given_up_is_taken_at_once_and_counted() {
        let first = made("lease", "a", TIMES, at(0));
        assert_eq!(released(first.clone(), "b", at(1)), None);
        let free = released(first, "a", at(1)).unwrap();
        let next = Observer::default().judge(Some(&free), "b", Instant::now());
        assert_eq!(next, Next::Take);
        let spec = held(free, "b", TIMES, at(2)).spec.unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some("b"));
        assert_eq!(spec.lease_transitions, Some(2));
        assert_eq!(spec.lease_duration_seconds, Some(12));
    }
}
