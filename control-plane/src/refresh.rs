//! The refresh ticker (being written).

use std::time::Duration;

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

/// Settings of the refresh.
#[derive(Debug, Clone, Copy)]
pub struct RefreshSettings {
    /// How often.
    pub interval: Interval,
    /// How many Secrets are written at once.
    pub concurrency: usize,
}

impl Default for RefreshSettings {
    fn default() -> Self {
        Self {
            interval: Interval::Auto,
            concurrency: 16,
        }
    }
}
