//! How often who may ask.
//!
//! Failures before authentication are charged to the source address, everything after it to the
//! session; a refusal that took a decryption to both, so that no session's key is worth all
//! decryptions there are. An address that has used up its share still gets tokens for ciphertexts
//! that are known: behind an ingress many share one.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ambient_shared::session::SessionId;
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock, Reference as _},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use moka::future::Cache;

/// Failures of one source address in a second, and at once.
const SOURCE: (NonZeroU32, NonZeroU32) = (nonzero(20), nonzero(200));

/// Requests of one session in a second, and at once.
const SESSION: (NonZeroU32, NonZeroU32) = (nonzero(2), nonzero(20));

/// Most addresses, and most sessions, that are counted at a time. Who is forgotten for want of
/// room starts with a full share.
const COUNTED: u64 = 20_000;

/// How long nothing must come from somebody to be forgotten: a full burst has come back by then.
const FORGET_AFTER: Duration = Duration::from_secs(15);

/// Counts who asks.
pub(super) struct Limits<C: Clock = DefaultClock> {
    clock: C,
    sources: Cache<IpAddr, Arc<Meter<C>>>,
    sessions: Cache<SessionId, Arc<Meter<C>>>,
}

type Limiter<C> = RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// Lines about refusals, and about the issuer's failures, in a second, and at once, whoever they are about: what many addresses
/// send must not fill a disk either.
const LINES: (NonZeroU32, NonZeroU32) = (nonzero(50), nonzero(500));

/// Counts lines of one kind.
pub(super) struct Lines<C: Clock = DefaultClock>(Limiter<C>);

impl Default for Lines {
    fn default() -> Self {
        Self::new(&DefaultClock::default())
    }
}

impl<C: Clock + Clone> Lines<C> {
    fn new(clock: &C) -> Self {
        let quota = Quota::per_second(LINES.0).allow_burst(LINES.1);
        Self(RateLimiter::direct_with_clock(quota, clock.clone()))
    }

    /// Whether one more may be written.
    pub(super) fn has_room(&self) -> bool {
        self.0.check().is_ok()
    }
}

/// One share.
struct Meter<C: Clock> {
    limiter: Limiter<C>,
    /// When there is something again, once it was used up.
    used_up_until: Mutex<Option<C::Instant>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self::new(DefaultClock::default())
    }
}

impl<C> Limits<C>
where
    C: Clock + Clone + Send + Sync + 'static,
    C::Instant: Send + Sync,
{
    fn new(clock: C) -> Self {
        Self {
            clock,
            sources: counted(),
            sessions: counted(),
        }
    }

    /// Whether an address may have more work done for it; charges nothing.
    ///
    /// # Errors
    /// With the time to wait.
    pub(super) async fn admit(&self, source: IpAddr) -> Result<(), Duration> {
        match self.sources.get(&network(source)).await {
            Some(meter) => meter.is_used_up(&self.clock),
            None => Ok(()),
        }
    }

    /// Charges an address for a failure.
    ///
    /// # Errors
    /// With the time to wait, when it has used up its share.
    pub(super) async fn charge_source(&self, source: IpAddr) -> Result<(), Duration> {
        let new = async { Arc::new(Meter::new(SOURCE, &self.clock)) };
        let meter = self.sources.get_with(network(source), new).await;
        meter.charge(&self.clock)
    }

    /// Charges a session for a request.
    ///
    /// # Errors
    /// With the time to wait, when it has used up its share.
    pub(super) async fn charge_session(&self, id: &SessionId) -> Result<(), Duration> {
        let new = async { Arc::new(Meter::new(SESSION, &self.clock)) };
        let meter = self.sessions.get_with_by_ref(id, new).await;
        meter.charge(&self.clock)
    }
}

impl<C: Clock + Clone> Meter<C> {
    fn new((per_second, burst): (NonZeroU32, NonZeroU32), clock: &C) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        Self {
            limiter: RateLimiter::direct_with_clock(quota, clock.clone()),
            used_up_until: Mutex::new(None),
        }
    }

    fn charge(&self, clock: &C) -> Result<(), Duration> {
        self.limiter.check().map_err(|not_until| {
            let mut used_up_until = self
                .used_up_until
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *used_up_until = Some(not_until.earliest_possible());
            not_until.wait_time_from(clock.now())
        })
    }

    fn is_used_up(&self, clock: &C) -> Result<(), Duration> {
        let until = *self
            .used_up_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let wait: Duration = until.map_or(Duration::ZERO, |until| {
            until.duration_since(clock.now()).into()
        });
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }
}

fn counted<K, V>() -> Cache<K, V>
where
    K: std::hash::Hash + Eq + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    Cache::builder()
        .max_capacity(COUNTED)
        .time_to_idle(FORGET_AFTER)
        .build()
}

/// An IPv6 address counts by its /64: whoever has one address has all of those.
pub(super) fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

const fn nonzero(number: u32) -> NonZeroU32 {
    match NonZeroU32::new(number) {
        Some(number) => number,
        None => NonZeroU32::MIN,
    }
}

#[cfg(test)]
mod tests;
