//! Kubernetes Events on our own pod, for `kubectl describe`: why it is not ready, or has ended.
//!
//! In: what `/readyz` says. Out: an Event once that has been so for a while. They are for people and
//! nothing depends on them: what cannot be sent is only logged.

use std::time::Duration;

use ambient_shared::{admin::Readiness, clock::Clock, exit};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::ServeError;
use crate::backend::kubernetes::events::{OnPod, What, send};

/// How long a start may take before it is told of. A usual one takes a second or two.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often is looked.
const LOOK: Duration = Duration::from_secs(1);

/// How often the same is told at most: more often than Kubernetes forgets Events, after an hour.
const AGAIN: Duration = Duration::from_mins(30);

/// How often something else is told at most: two reasons may take turns.
const AT_MOST: Duration = Duration::from_mins(1);

/// Tells of one pod.
pub(super) struct Notices {
    client: kube::Client,
    pod: OnPod,
    clock: Clock,
}

impl Notices {
    /// For this pod of ours; none when it does not know itself.
    pub(super) fn of(
        client: kube::Client,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> Option<Self> {
        Some(Self {
            client,
            pod: OnPod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: uid?.to_owned(),
            },
            clock: Clock::system(),
        })
    }

    /// Does `work`, and tells when the program is not ready meanwhile, and when it fails.
    ///
    /// # Errors
    /// That of `work`.
    pub(super) async fn during(
        self,
        readiness: Readiness,
        work: impl Future<Output = Result<(), ServeError>>,
    ) -> Result<(), ServeError> {
        let end = CancellationToken::new();
        let work = async {
            let done = work.await;
            end.cancel();
            done
        };
        let (done, ()) = tokio::join!(work, self.watch(readiness, end.clone()));
        if let Err(error) = &done {
            let why = exit::report(error);
            self.tell("ControlPlaneEnded", "End", why).await;
        }
        done
    }

    /// Tells why the program is not ready, whenever that lasts, until `shutdown`.
    async fn watch(&self, readiness: Readiness, shutdown: CancellationToken) {
        let mut pacing = Pacing::new(Instant::now());
        loop {
            let now = Instant::now();
            if let Some(why) = pacing.look(readiness().err(), now) {
                let told = self.tell("ControlPlaneNotReady", "Start", why);
                if shutdown.run_until_cancelled(told).await.is_none() {
                    return;
                }
            }
            if shutdown.run_until_cancelled(sleep(LOOK)).await.is_none() {
                return;
            }
        }
    }

    async fn tell(&self, reason: &'static str, action: &'static str, note: String) {
        let what = What {
            reason,
            action,
            note,
            is_warning: true,
        };
        let event = self.pod.event(&what, self.clock.now());
        let sent = send(self.client.clone(), &self.pod.namespace, &event).await;
        if let Err(error) = sent {
            debug!(%error, "an Event could not be sent");
        }
    }
}

/// When something is worth an Event.
struct Pacing {
    /// Since when the program has not been ready.
    since: Instant,
    told: Option<(Instant, String)>,
}

impl Pacing {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            told: None,
        }
    }

    /// What to tell now, by why the program is not ready; none when it is.
    fn look(&mut self, why: Option<String>, now: Instant) -> Option<String> {
        let Some(why) = why else {
            self.since = now;
            return None;
        };
        if now.duration_since(self.since) < PATIENCE {
            return None;
        }
        let is_due = self.told.as_ref().is_none_or(|(at, last)| {
            let pause = if *last == why { AGAIN } else { AT_MOST };
            now.duration_since(*at) >= pause
        });
        is_due.then(|| {
            self.told = Some((now, why.clone()));
            why
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn only_what_lasts_is_told_and_not_again_soon() {
        let start = Instant::now();
        let mut pacing = Pacing::new(start);
        assert_eq!(
            pacing.look(Some("no keys".into()), start + 9 * SECOND),
            None
        );
        let ten = start + PATIENCE;
        assert_eq!(
            pacing.look(Some("no keys".into()), ten),
            Some("no keys".into())
        );
        assert_eq!(pacing.look(Some("no keys".into()), ten + SECOND), None);
        // Another reason is news, the same one after half an hour.
        assert_eq!(pacing.look(Some("no list".into()), ten + SECOND), None);
        let later = ten + AT_MOST;
        assert_eq!(
            pacing.look(Some("no list".into()), later),
            Some("no list".into())
        );
        assert_eq!(pacing.look(Some("no list".into()), later + AGAIN / 2), None);
        assert_eq!(
            pacing.look(Some("no list".into()), later + AGAIN),
            Some("no list".into())
        );
    }

    #[test]
    fn who_is_ready_has_time_again() {
        let start = Instant::now();
        let mut pacing = Pacing::new(start);
        assert_eq!(pacing.look(None, start + 20 * SECOND), None);
        assert_eq!(
            pacing.look(Some("no list".into()), start + 25 * SECOND),
            None
        );
        let told = pacing.look(Some("no list".into()), start + 30 * SECOND);
        assert_eq!(told.as_deref(), Some("no list"));
    }
}
