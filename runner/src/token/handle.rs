//! The token as its users see it: the latest, and a way to ask for another.

use std::{sync::Arc, time::Duration};

use ambient_shared::token::Token;
use tokio::{sync::watch, time::timeout};

/// Longest wait for another token after a server rejected one.
pub(super) const RENEW_TIMEOUT: Duration = Duration::from_secs(30);

/// What the rest of the runner sees of the token. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct TokenHandle {
    pub(super) latest: watch::Receiver<Option<Token>>,
    pub(super) rejected: Arc<watch::Sender<Option<Token>>>,
}

/// Why there is no other token in place of one that was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RenewError {
    /// No source had another one in time; each failure is in the log.
    #[error("no other token within {}", humantime::format_duration(RENEW_TIMEOUT))]
    Deadline,
    /// The runner is ending.
    #[error("tokens are no longer renewed, as the runner is ending")]
    Ended,
}

impl TokenHandle {
    /// The end of both channels that users of the token have.
    pub(super) fn new(
        latest: watch::Receiver<Option<Token>>,
        rejected: watch::Sender<Option<Token>>,
    ) -> Self {
        Self {
            latest,
            rejected: Arc::new(rejected),
        }
    }

    /// A handle without a refresher, for tests of what uses tokens: the sender publishes tokens,
    /// the receiver shows what was rejected.
    #[cfg(test)]
    pub(crate) fn for_tests(
        first: Option<Token>,
    ) -> (
        Self,
        watch::Sender<Option<Token>>,
        watch::Receiver<Option<Token>>,
    ) {
        let (sender, latest) = watch::channel(first);
        let (rejected, rejections) = watch::channel(None);
        let rejected = Arc::new(rejected);
        (Self { latest, rejected }, sender, rejections)
    }

    /// The current token, and each that follows. None before the first.
    pub(crate) fn latest(&self) -> watch::Receiver<Option<Token>> {
        self.latest.clone()
    }

    /// Asks for a token other than the one that a server rejected, and waits until there is one:
    /// no time when it came meanwhile, at most 30 s.
    ///
    /// Cancel-safe: the request stands, the next caller profits.
    ///
    /// # Errors
    /// [`RenewError`] when there is none in time.
    pub(crate) async fn renew(&self, rejected: &Token) -> Result<Token, RenewError> {
        let other = |token: &Option<Token>| {
            token
                .as_ref()
                .is_some_and(|token| !token.same_secret(rejected))
        };
        let mut latest = self.latest.clone();
        if !other(&latest.borrow()) {
            self.rejected.send_replace(Some(rejected.clone()));
        }
        let found = timeout(RENEW_TIMEOUT, latest.wait_for(other)).await;
        match found {
            Ok(Ok(token)) => token.clone().ok_or(RenewError::Ended),
            Ok(Err(_)) => Err(RenewError::Ended),
            Err(_) => Err(RenewError::Deadline),
        }
    }
}
