//! When tokens are looked at, and which are due. Pure.

use std::time::{Duration, SystemTime};

use ambient_shared::{clock::unix_seconds, token::ASSUMED_LIFE};

use crate::{backend::TokenTimes, keypair::id::KeyId};

/// Shortest time between two ticks, however short tokens live.
const SHORTEST: Duration = Duration::from_millis(200);

/// Clocks of two replicas may differ by so much.
const REPLICAS_AGREE: Duration = Duration::from_mins(1);

/// How often tokens of running sessions are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Interval {
    /// A third of the tokens' life.
    #[default]
    Auto,
    /// Never: sessions have to fetch their tokens.
    Off,
    /// This often, but never less often than twice in a token's life.
    Every(Duration),
}

impl Interval {
    /// Time between two ticks for tokens that live so long; tokens of unknown life count as living
    /// [`ASSUMED_LIFE`]. None when there are no ticks.
    pub(crate) fn between_ticks(self, life: Option<Duration>) -> Option<Duration> {
        let third = life.unwrap_or(ASSUMED_LIFE) / 3;
        let wait = match self {
            Self::Off => return None,
            Self::Auto => third,
            Self::Every(wait) => life.map_or(wait, |life| wait.min(life / 2)),
        };
        Some(wait.max(SHORTEST))
    }
}

/// When a token is due to be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Time between two ticks; zero when there are none.
    interval: Duration,
    /// From a write to its being seen in the session.
    lag: Duration,
    /// The whole life of the issuer's tokens; none when they do not expire.
    life: Option<Duration>,
    /// When this control plane started.
    started_at: SystemTime,
}

impl Rule {
    /// The rule of these settings, for an issuer whose tokens have this whole life.
    pub(crate) fn new(
        interval: Interval,
        life: Option<Duration>,
        lag: Duration,
        started_at: SystemTime,
    ) -> Self {
        Self {
            interval: interval.between_ticks(life).unwrap_or_default(),
            lag,
            life,
            started_at,
        }
    }

    /// Least life of a token that is written: what it takes not to be due at once.
    pub(crate) fn min_life(&self) -> Duration {
        self.bridged(self.life)
    }

    /// Whether tokens live too short for push alone to keep a session supplied, whatever the
    /// interval: less than two and a half times the lag, which for Kubernetes is 5 minutes.
    pub(crate) fn is_too_short(&self) -> bool {
        self.life.is_some_and(|life| life * 2 < self.lag * 5)
    }

    /// Whether a Secret is due to be replaced: for its token, or since the session's key in it is of
    /// another root than this one. None is a Secret that is not there.
    pub(crate) fn is_due(&self, times: Option<TokenTimes>, root: KeyId, now: SystemTime) -> bool {
        let is_of_root = times.is_some_and(|times| times.root == Some(root));
        !is_of_root || self.is_token_due(times, now)
    }

    /// Whether the token in a Secret with these times is due; none is a Secret that is not there.
    pub(crate) fn is_token_due(&self, times: Option<TokenTimes>, now: SystemTime) -> bool {
        let Some(times) = times else { return true };
        if !is_told_by(times, now) {
            return true;
        }
        let Some(expires_at) = times.expires_at else {
            // It stays valid, unless another one, or one of another kind, is configured since.
            let (issued, started) = (unix_seconds(times.issued_at), unix_seconds(self.started_at));
            return self.life.is_some() || issued < started;
        };
        let whole = expires_at.duration_since(times.issued_at).ok();
        let left = expires_at.duration_since(now).unwrap_or_default();
        left < self.bridged(whole)
    }

    /// What a token must last for: the next tick, the write after it, and a tenth to spare.
    fn bridged(&self, whole: Option<Duration>) -> Duration {
        self.interval + self.lag + whole.unwrap_or_default() / 10
    }
}

/// Whether the times of a Secret may be by the clock that shows `now`. When it was written after
/// that, a clock was wrong then, or is now: it says nothing of when the token expires.
pub(crate) fn is_told_by(times: TokenTimes, now: SystemTime) -> bool {
    times.issued_at <= now + REPLICAS_AGREE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOT: KeyId = KeyId::from_bytes([1; 8]);

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + secs(seconds)
    }

    fn times(issued: u64, expires: u64) -> TokenTimes {
        TokenTimes {
            issued_at: at(issued),
            expires_at: Some(at(expires)),
            root: Some(ROOT),
        }
    }

    #[test]
    fn ticks_come_at_least_twice_in_a_life() {
        let life = Some(secs(900));
        assert_eq!(Interval::Auto.between_ticks(life), Some(secs(300)));
        assert_eq!(
            Interval::Every(secs(600)).between_ticks(life),
            Some(secs(450))
        );
        assert_eq!(
            Interval::Every(secs(60)).between_ticks(life),
            Some(secs(60))
        );
        assert_eq!(
            Interval::Every(secs(600)).between_ticks(None),
            Some(secs(600))
        );
        assert_eq!(Interval::Auto.between_ticks(None), Some(secs(100)));
        assert_eq!(Interval::Off.between_ticks(life), None);
        assert_eq!(Interval::Auto.between_ticks(Some(secs(0))), Some(SHORTEST));
    }

    #[test]
    fn due_is_what_does_not_last_to_the_write_after_the_next_tick() {
        // 300 s to the next tick, 120 s for the kubelet, a tenth of 900 s: 510 s.
        let rule = Rule::new(Interval::Auto, Some(secs(900)), secs(120), at(0));
        assert_eq!(rule.min_life(), secs(510));
        assert!(!rule.is_token_due(Some(times(0, 900)), at(390)));
        assert!(rule.is_token_due(Some(times(0, 900)), at(391)));
        assert!(rule.is_token_due(Some(times(0, 900)), at(2000)));
        assert!(rule.is_token_due(None, at(0)));
    }

    #[test]
    fn a_session_key_of_another_root_is_due_however_fresh_the_token() {
        let rule = Rule::new(Interval::Auto, Some(secs(900)), secs(120), at(0));
        let fresh = times(0, 900);
        assert!(!rule.is_due(Some(fresh), ROOT, at(1)));
        assert!(rule.is_due(Some(fresh), KeyId::from_bytes([2; 8]), at(1)));
        let unknown = TokenTimes {
            root: None,
            ..fresh
        };
        assert!(rule.is_due(Some(unknown), ROOT, at(1)));
        assert!(rule.is_due(Some(fresh), ROOT, at(391)) && rule.is_due(None, ROOT, at(1)));
    }

    #[test]
    fn kubernetes_needs_tokens_of_five_minutes() {
        let rule = |life| Rule::new(Interval::Auto, life, secs(120), at(0));
        assert!(rule(Some(secs(299))).is_too_short());
        assert!(!rule(Some(secs(300))).is_too_short());
        assert!(!rule(None).is_too_short());
    }

    #[test]
    fn a_token_without_expiry_is_written_once_after_a_start() {
        let endless = |issued| {
            Some(TokenTimes {
                issued_at: at(issued),
                expires_at: None,
                root: Some(ROOT),
            })
        };
        let rule = Rule::new(Interval::Auto, None, secs(1), at(100));
        assert!(rule.is_token_due(endless(99), at(100)));
        assert!(!rule.is_token_due(endless(100), at(10_000)));
        let expiring = Rule::new(Interval::Auto, Some(secs(60)), secs(1), at(100));
        assert!(expiring.is_token_due(endless(100), at(101)));
    }

    #[test]
    fn a_token_from_the_future_is_replaced() {
        let rule = Rule::new(Interval::Auto, Some(secs(900)), secs(1), at(0));
        // As written by a clock that was an hour ahead, and is right now.
        assert!(rule.is_token_due(Some(times(3600, 4500)), at(10)));
        // Of another replica, whose clock is a little ahead.
        assert!(!rule.is_token_due(Some(times(40, 940)), at(10)));
    }

    proptest! {
        /// However ticks and writes fall, a session never sees an expired token: as long as the
        /// ticker is on time and each write is seen within the lag.
        #[test]
        fn no_token_expires_between_ticks(
            life in 10_u64..4000,
            lag in 0_u64..3,
            every in 1_u64..2000,
            offset in 0_u64..4000,
        ) {
            let interval = Interval::Every(secs(every));
            let rule = Rule::new(interval, Some(secs(life)), secs(lag), at(0));
            let step = interval.between_ticks(Some(secs(life))).unwrap();
            let (mut issued, mut now) = (at(10_000), at(10_000) + secs(offset).min(step));
            for _ in 0..50 {
                let expires = issued + secs(life);
                let token = Some(TokenTimes { issued_at: issued, expires_at: Some(expires), root: None });
                if rule.is_token_due(token, now) {
                    prop_assert!(now + secs(lag) <= expires, "seen after {life}");
                    issued = now;
                }
                now += step;
            }
        }
    }
}
