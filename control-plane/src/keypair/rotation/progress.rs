//! When a rotation takes its next step. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::keypair::{KeyIds, kind::KeyKind, readers::Behind, secret::change::Step};

/// How long a rotation waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// How long the next signing key is published before it signs.
    publish: Duration,
    /// For how long on end nobody may have needed a keypair or a root before it goes: more than a
    /// session's start takes that has begun with it.
    unused: Duration,
    /// What is added to the life of tokens, and to the time that a Secret takes to be seen in its
    /// session: replicas do not read at the same moment.
    pub(super) leeway: Duration,
    /// For how long on end a replica may not have followed before it is taken for gone: it was
    /// killed, most likely.
    gone: Duration,
}

impl Waits {
    /// Shortest unit: replicas read their keys again every 10 s, so this is for tests.
    pub const MIN: Duration = Duration::from_secs(1);

    /// Longest.
    pub const MAX: Duration = Duration::from_hours(24);

    /// All waits from one: how long the next signing key is published before it signs.
    pub fn of(unit: Duration) -> Self {
        Self {
            publish: unit,
            unused: unit * 3 / 2,
            leeway: unit / 2,
            gone: unit * 30,
        }
    }

    /// What is not seen for less than this counts as seen as it was: a new namespace is read within
    /// seconds.
    fn blink(&self) -> Duration {
        self.leeway / 6
    }

    /// How often to look: often enough for the shortest.
    pub(super) fn tick(&self) -> Duration {
        self.leeway.max(Duration::from_millis(100))
    }
}

impl Default for Waits {
    /// By 2 minutes (design section 5.1).
    fn default() -> Self {
        Self::of(Duration::from_mins(2))
    }
}

/// What is seen at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) keys: KeyIds,
    pub(super) runs: Runs,
    /// Tokens that lived longer than those of now, and that the signing key before has signed, may
    /// still be valid.
    pub(super) longer_tokens: bool,
    pub(super) behind: Behind,
}

/// Who needs which keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// There may be more than is seen.
    pub(super) unknown: bool,
    /// Runs that have not ended.
    pub(super) live: usize,
    /// Those that were started with another keypair than the current one.
    pub(super) of_other_keypair: usize,
    /// Those whose Secret has a key that was made from another root than the current one.
    pub(super) of_other_root: usize,
}

/// What this leader has seen so far. The next one begins anew: it only waits longer.
#[derive(Debug)]
pub(super) struct Progress {
    waits: Waits,
    /// The life of minted tokens.
    token_life: Duration,
    /// From the write of a Secret to its being seen in the session.
    lag: Duration,
    next_unread: Since<String>,
    next_signing: Since<String>,
    current_unread: Since<String>,
    old_signing: Since<(String, String)>,
    unused_keypair: Since<String>,
    unused_root: Since<String>,
    unknown: Since<()>,
}

impl Progress {
    pub(super) fn new(waits: Waits, token_life: Duration, lag: Duration) -> Self {
        Self {
            waits,
            token_life,
            lag,
            next_unread: Since::default(),
            next_signing: Since::default(),
            current_unread: Since::default(),
            old_signing: Since::default(),
            unused_keypair: Since::default(),
            unused_root: Since::default(),
            unknown: Since::default(),
        }
    }

    /// The steps that are due.
    pub(super) fn decide(&mut self, sight: &Sight, now: Instant) -> Vec<Step> {
        let (keys, runs, behind, waits) = (&sight.keys, &sight.runs, sight.behind, self.waits);
        let mut steps = Vec::new();

        // Only one key before the current one is kept, so it must have gone first.
        let next = keys.signing.next.clone();
        let next = next.filter(|_| keys.signing.previous.is_none());
        let unread = next.clone().filter(|_| behind.of_next > 0);
        let are_gone = self.next_unread.held(unread, waits.gone, now).is_some();
        let next = next.filter(|_| behind.of_next == 0 || are_gone);
        if let Some(next) = self.next_signing.held(next, waits.publish, now) {
            let life = self.token_life;
            steps.push(Step::Promote { next, life });
        }
        let old = keys.signing.previous.clone();
        let current = &keys.signing.current;
        let unread = old.as_ref().filter(|_| behind.of_current > 0);
        let unread = unread.map(|_| current.clone());
        let are_gone = self.current_unread.held(unread, waits.gone, now).is_some();
        let old = old.filter(|_| behind.of_current == 0 || are_gone);
        let old = old.map(|old| (old, current.clone()));
        let last_token = self.token_life.saturating_add(waits.leeway);
        if let Some((previous, _)) = self.old_signing.held(old, last_token, now)
            && !sight.longer_tokens
        {
            let kind = KeyKind::SigningKey;
            steps.push(Step::Drop { kind, previous });
        }

        let is_unknown = runs.unknown.then_some(());
        let is_blind = self.unknown.held(is_unknown, waits.blink(), now).is_some();
        let seen = if runs.live == 0 {
            waits.unused
        } else {
            waits.unused.max(self.lag + waits.leeway)
        };
        let olds = [
            (
                KeyKind::Keypair,
                keys.keypair.previous,
                runs.of_other_keypair,
                waits.unused,
                &mut self.unused_keypair,
            ),
            (
                KeyKind::SessionRoot,
                keys.root.previous,
                runs.of_other_root,
                seen,
                &mut self.unused_root,
            ),
        ];
        for (kind, previous, needing, wait, unused) in olds {
            let previous = previous.map(|id| id.to_string());
            // Who is not seen may need it, or need it no more since a moment ago.
            let previous = previous.filter(|_| needing == 0 && !is_blind);
            if let Some(previous) = unused.held(previous, wait, now)
                && !runs.unknown
            {
                steps.push(Step::Drop { kind, previous });
            }
        }
        steps
    }
}

/// Since when something has been as it is.
#[derive(Debug)]
struct Since<T>(Option<(T, Instant)>);

impl<T> Default for Since<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Clone + PartialEq> Since<T> {
    /// It is so now; gives it when it has been so for `wait`.
    fn held(&mut self, is: Option<T>, wait: Duration, now: Instant) -> Option<T> {
        let since = match (&self.0, is) {
            (_, None) => None,
            (Some((was, since)), Some(is)) if *was == is => Some((is, *since)),
            (_, Some(is)) => Some((is, now)),
        };
        self.0 = since;
        let (is, since) = self.0.as_ref()?;
        (now.duration_since(*since) >= wait).then(|| is.clone())
    }
}

#[cfg(test)]
mod tests;
