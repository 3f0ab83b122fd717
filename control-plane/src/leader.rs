//! Who of several replicas runs the controllers: the holder of a Lease (design 5.7).
//!
//! In: a `Lease` in our own namespace. Out: terms, one after the other, in which this replica leads;
//! and [`Leadership`], which is held only while nobody else can have the Lease. A term ends when the
//! Lease was not renewed in time, when somebody else has it, or with the program, which gives it up
//! so that the next one need not wait.
//!
//! ```text
//! last renewal ── renew, renew … ── no more writes ── others may take it
//!              0                     lease / 2         lease × 4/5       at the latest: lease
//! ```

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{clock::Clock, exit};
use k8s_openapi::{api::coordination::v1::Lease, jiff::Timestamp};
use kube::{Api, api::PostParams};
use metrics::{counter, gauge};
use rand::RngExt as _;
use tokio::{
    pin,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::record::{Next, Observer};
use crate::metrics::{LEADER, LEADERSHIP_CHANGES, LEASE_RENEWED};

mod record;

/// Name of the Lease in the control plane's own namespace.
pub const LEASE: &str = "ambient-control-plane";

/// Longest wait for the answer to giving the Lease up: the program ends.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// The times of a Lease, all parts of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTimes {
    lease: Duration,
}

impl Default for LeaseTimes {
    /// 15 s, as Kubernetes' own controllers have it.
    fn default() -> Self {
        Self::new(Duration::from_secs(15))
    }
}

impl LeaseTimes {
    /// Shortest lease: the record counts whole seconds.
    pub const MIN: Duration = Duration::from_secs(3);

    /// Longest: so long nobody would start a session after the leader was killed.
    pub const MAX: Duration = Duration::from_mins(5);

    /// `lease` is how long it takes at most until another replica leads once the leader was killed.
    pub const fn new(lease: Duration) -> Self {
        Self { lease }
    }

    /// What the record says: a fifth less, as others look only now and then.
    fn recorded(self) -> Duration {
        Duration::from_secs((self.lease * 4 / 5).as_secs().max(1))
    }

    /// How long we write after the last renewal began: what left us last has time to arrive.
    fn fence(self) -> Duration {
        self.lease / 2
    }

    fn between_renewals(self) -> Duration {
        self.lease / 8
    }

    fn between_looks(self) -> Duration {
        self.lease / 15
    }
}

/// Whether this replica may write for sessions: it leads, and renewed its Lease so lately that
/// nobody else can have it. Clones share it.
///
/// It counts by the monotonic clock, which goes on while the process is stopped.
#[derive(Debug, Clone, Default)]
pub struct Leadership(Arc<Mutex<Option<Instant>>>);

impl Leadership {
    /// Whether a write that begins now is still ours to make.
    pub fn is_held(&self) -> bool {
        self.until().is_some_and(|until| Instant::now() < until)
    }

    fn extend(&self, until: Instant) {
        *self.until() = Some(until);
    }

    fn end(&self) {
        *self.until() = None;
    }

    /// Until when it is held; this very moment when it is not.
    fn held_until(&self) -> Instant {
        self.until().unwrap_or_else(Instant::now)
    }

    fn until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why one look at the Lease came to nothing. All of these are tried again.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("cannot read or write the Lease {LEASE}")]
    Kubernetes(#[from] kube::Error),
    #[error("the Lease {LEASE} cannot be read or written in time")]
    Slow,
}

/// What one look at the Lease came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It is ours.
    Ours,
    /// Somebody else has it, and this long to renew it.
    Theirs(Duration),
    /// It was changed by somebody else at the same time: look again.
    Overtaken,
}

/// Why a term ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// The Lease could not be renewed.
    NotRenewed,
    /// Somebody else holds it.
    Taken,
}

/// Contends for the Lease.
pub struct Elector {
    leases: Api<Lease>,
    identity: String,
    times: LeaseTimes,
    leadership: Leadership,
    clock: Clock,
    observer: Observer,
    is_failing: bool,
    /// It may be ours without our knowing: a write was begun.
    is_unsure: bool,
}

impl Elector {
    /// Contends for the Lease in `namespace`. The client must not be one that only the leader may write with. `name` tells
    /// people which replica it is; a suffix at random tells its lives apart.
    pub fn new(
        client: kube::Client,
        namespace: &str,
        name: &str,
        times: LeaseTimes,
        leadership: Leadership,
        clock: Clock,
    ) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            identity: format!("{name}_{}", uuid::Uuid::new_v4()),
            times,
            leadership,
            clock,
            observer: Observer::default(),
            is_failing: false,
            is_unsure: false,
        }
    }

    /// Calls `lead` for each term, with what ends it, until `shutdown` or until `lead` fails. It
    /// must end soon after it was told to; the Lease is given up only then.
    ///
    /// # Errors
    /// That of `lead`.
    pub async fn run<L, T, E>(mut self, lead: L, shutdown: CancellationToken) -> Result<(), E>
    where
        L: Fn(CancellationToken) -> T,
        T: Future<Output = Result<(), E>>,
    {
        gauge!(LEADER).set(0.0);
        while shutdown.run_until_cancelled(self.acquire()).await.is_some() {
            info!(lease = LEASE, identity = %self.identity, "leading");
            counter!(LEADERSHIP_CHANGES, "to" => "leader").increment(1);
            gauge!(LEADER).set(1.0);
            let term = shutdown.child_token();
            let leading = lead(term.clone());
            pin!(leading);
            let ended = tokio::select! {
                ended = &mut leading => Ok(ended),
                lost = self.hold() => Err(lost),
            };
            self.leadership.end();
            gauge!(LEADER).set(0.0);
            counter!(LEADERSHIP_CHANGES, "to" => "standby").increment(1);
            match ended {
                Ok(ended) => {
                    self.release().await;
                    self.is_unsure = false;
                    ended?;
                }
                Err(lost) => {
                    warn!(lease = LEASE, why = ?lost, "not leading any more");
                    term.cancel();
                    leading.await?;
                }
            }
        }
        if self.is_unsure {
            self.release().await;
        }
        Ok(())
    }

    /// Waits until the Lease is ours.
    ///
    /// Cancel-safe: whether it was taken at that very moment is not known then.
    async fn acquire(&mut self) {
        loop {
            let look = self.look().await;
            self.tell(look.as_ref().err());
            let wait = match look {
                Ok(Look::Ours) => return,
                Ok(Look::Theirs(left)) => left.min(self.times.between_looks()),
                Ok(Look::Overtaken) | Err(_) => jittered(self.times.between_looks()),
            };
            sleep(wait).await;
        }
    }

    /// Renews the Lease for as long as that can be done in time.
    ///
    /// Cancel-safe.
    async fn hold(&mut self) -> Lost {
        loop {
            let held_until = self.leadership.held_until();
            let next = Instant::now() + self.times.between_renewals();
            sleep_until(next.min(held_until)).await;
            loop {
                if Instant::now() >= held_until {
                    return Lost::NotRenewed;
                }
                let look = self.look().await;
                self.tell(look.as_ref().err());
                match look {
                    Ok(Look::Ours) => break,
                    Ok(Look::Theirs(_)) => return Lost::Taken,
                    Ok(Look::Overtaken) | Err(_) => {
                        let pause = Instant::now() + jittered(self.times.between_looks());
                        sleep_until(pause.min(held_until)).await;
                    }
                }
            }
        }
    }

    /// One look at the Lease, and what follows from it; extends the leadership when it is ours.
    async fn look(&mut self) -> Result<Look, LeaseError> {
        // Before the request: the record is not older than this moment.
        let began = Instant::now();
        let looked = timeout(self.times.fence() / 2, self.read_and_write()).await;
        let look = looked.unwrap_or(Err(LeaseError::Slow))?;
        if look == Look::Ours {
            self.leadership.extend(began + self.times.fence());
            #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
            gauge!(LEASE_RENEWED).set(self.clock.unix_seconds() as f64);
        }
        Ok(look)
    }

    async fn read_and_write(&mut self) -> Result<Look, LeaseError> {
        let lease = self.leases.get_opt(LEASE).await?;
        let next = self
            .observer
            .judge(lease.as_ref(), &self.identity, Instant::now());
        self.is_unsure |= !matches!(next, Next::Wait(_));
        let now = timestamp(self.clock.now());
        let written = match (next, lease) {
            (Next::Wait(left), _) => return Ok(Look::Theirs(left)),
            (Next::Renew | Next::Take, Some(lease)) => {
                let lease = record::held(lease, &self.identity, self.times, now);
                self.leases.replace(LEASE, &by_us(), &lease).await
            }
            (Next::Create | Next::Renew | Next::Take, _) => {
                let lease = record::made(LEASE, &self.identity, self.times, now);
                self.leases.create(&by_us(), &lease).await
            }
        };
        match written {
            Ok(_) => Ok(Look::Ours),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                debug!(lease = LEASE, "the Lease was changed meanwhile");
                Ok(Look::Overtaken)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the next one have it at once.
    async fn release(&self) {
        let released = timeout(RELEASE_LIMIT, self.write_release()).await;
        match released.unwrap_or(Err(LeaseError::Slow)) {
            Ok(()) => info!(lease = LEASE, "gave the Lease up"),
            Err(error) => {
                warn!(lease = LEASE, reason = %exit::report(&error), "cannot give the Lease up; it runs out");
            }
        }
    }

    async fn write_release(&self) -> Result<(), LeaseError> {
        loop {
            let Some(lease) = self.leases.get_opt(LEASE).await? else {
                return Ok(());
            };
            let now = timestamp(self.clock.now());
            let Some(lease) = record::released(lease, &self.identity, now) else {
                return Ok(());
            };
            match self.leases.replace(LEASE, &by_us(), &lease).await {
                // A renewal of ours that was cut off has arrived all the same.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                written => return Ok(written.map(drop)?),
            }
        }
    }

    /// Says when the Lease begins to fail, and when that is over.
    fn tell(&mut self, error: Option<&LeaseError>) {
        match (
            std::mem::replace(&mut self.is_failing, error.is_some()),
            error,
        ) {
            (false, Some(error)) => {
                let reason = exit::report(error);
                warn!(lease = LEASE, %reason, "cannot use the Lease; trying again");
            }
            (true, None) => info!(lease = LEASE, "the Lease can be used again"),
            _ => {}
        }
    }
}

impl std::fmt::Debug for Elector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Elector")
            .field("identity", &self.identity)
            .field("times", &self.times)
            .finish_non_exhaustive()
    }
}

fn by_us() -> PostParams {
    PostParams {
        field_manager: Some(crate::rules::CONTROL_PLANE.to_owned()),
        ..PostParams::default()
    }
}

/// Half of a time to all of it.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(0.5..1.0))
}

fn timestamp(now: SystemTime) -> Timestamp {
    Timestamp::try_from(now).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, convert::Infallible, future::ready};

    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::json;

    use super::*;

    /// A Kubernetes API that has this Lease, and answers each write with the next of these.
    fn kubernetes(lease: &Lease, writes: &Arc<Mutex<VecDeque<u16>>>) -> kube::Client {
        let lease = serde_json::to_value(lease).unwrap();
        let writes = Arc::clone(writes);
        let answer = tower::service_fn(move |request: Request<Body>| {
            let status = if request.method() == Method::GET {
                200
            } else {
                writes.lock().unwrap().pop_front().expect("one write less")
            };
            let body = if status == 200 {
                lease.clone()
            } else {
                json!({"kind": "Status", "status": "Failure", "message": "", "reason": "",
                    "code": status})
            };
            let answer = Response::builder().status(status);
            let body = Body::from(body.to_string().into_bytes());
            ready(Ok::<_, Infallible>(answer.body(body).unwrap()))
        });
        kube::Client::new(answer, "here")
    }

    #[tokio::test]
    async fn a_renewal_that_arrives_late_does_not_keep_the_lease() {
        let (times, clock) = (LeaseTimes::default(), Clock::system());
        let lease = record::made(LEASE, "us", times, timestamp(clock.now()));
        let writes = Arc::new(Mutex::new(VecDeque::from([409, 409, 200])));
        let client = kubernetes(&lease, &writes);
        let mut elector = Elector::new(client, "here", "us", times, Leadership::default(), clock);
        elector.identity = "us".to_owned();

        elector.release().await;

        assert!(writes.lock().unwrap().is_empty());
    }
}
