//! The latest token, and a way to ask for a fresher one.
//!
//! One [`Feed`] publishes, by watching a file or by fetching; any number of [`Tokens`] read. A
//! reader that has reason to doubt the token asks the feed's owner to look again, which happens
//! once for all who ask at the same time.

use std::time::{Duration, SystemTime};

use ambient_shared::{
    clock::{self, Clock},
    token::Token,
};
use metrics::{counter, gauge};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::info;

use crate::metrics as names;

/// Longest wait for a second look: a file system may hang, a token endpoint be slow.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);

/// Most wishes for a second look that wait at once. All waiting ones are served by one look, so
/// who finds the queue full loses little by not waiting.
const MOST_WISHES: usize = 64;

/// A wish for a second look: answered when it was done.
pub(crate) type Wish = oneshot::Sender<()>;

/// The side that publishes. There is one.
#[derive(Debug)]
pub(crate) struct Feed {
    latest: watch::Sender<Option<Token>>,
    wishes: mpsc::Receiver<Wish>,
    clock: Clock,
}

/// The side that reads. Clones see the same token.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    latest: watch::Receiver<Option<Token>>,
    wishes: mpsc::Sender<Wish>,
    clock: Clock,
}

/// A feed without a token yet, and its reader.
pub(crate) fn channel(clock: Clock) -> (Feed, Tokens) {
    let (latest, reader) = watch::channel(None);
    let (wish, wishes) = mpsc::channel(MOST_WISHES);
    let feed = Feed {
        latest,
        wishes,
        clock: clock.clone(),
    };
    let tokens = Tokens {
        latest: reader,
        wishes: wish,
        clock,
    };
    (feed, tokens)
}

impl Feed {
    /// Publishes a token that was read or fetched just now. Says whether it is another one.
    pub(crate) fn publish(&self, token: Token, source: &'static str) -> bool {
        gauge!(names::TOKEN_SUCCESS).set(seconds(self.clock.now()));
        let hash = token.hash();
        let expires_at = token.expires_at();
        let mut another = false;
        self.latest.send_if_modified(|latest| {
            let same = latest.as_ref().is_some_and(|old| {
                another = !old.same_secret(&token);
                !another && old.expires_at() == expires_at
            });
            another |= latest.is_none();
            *latest = Some(token);
            !same
        });
        gauge!(names::TOKEN_EXPIRY).set(expires_at.map_or(0.0, seconds));
        if another {
            counter!(names::TOKEN_CHANGES).increment(1);
            gauge!(names::TOKEN_CHANGED).set(seconds(self.clock.now()));
            let life_s = expires_at
                .and_then(|expiry| expiry.duration_since(self.clock.now()).ok())
                .map(|life| life.as_secs());
            info!(token = %hash, source, life_s, "token changed");
        }
        another
    }

    /// The latest token.
    pub(crate) fn latest(&self) -> Option<Token> {
        self.latest.borrow().clone()
    }

    /// Waits for wishes for a second look, and takes all that wait.
    ///
    /// Cancel-safe: wishes stay in the queue. Never ends when nobody can wish any more; the
    /// owner is told to end by other means.
    pub(crate) async fn wishes(&mut self) -> Vec<Wish> {
        let mut wishes = Vec::new();
        if self.wishes.recv_many(&mut wishes, MOST_WISHES).await == 0 {
            std::future::pending::<()>().await;
        }
        wishes
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact for some million years to come"
)]
fn seconds(time: SystemTime) -> f64 {
    clock::unix_seconds(time) as f64
}

impl Tokens {
    /// The latest token, even when it has expired.
    pub(crate) fn latest(&self) -> Option<Token> {
        self.latest.borrow().clone()
    }

    /// The latest token; looks again before it answers with none or an expired one.
    ///
    /// An expired one is still given: who knows whose clock is wrong.
    pub(crate) async fn fresh(&self) -> Option<Token> {
        let latest = self.latest();
        if latest.as_ref().is_some_and(|token| !self.expired(token)) {
            return latest;
        }
        self.look_again().await;
        self.latest()
    }

    /// Like [`Tokens::fresh`], but none rather than an expired one.
    pub(crate) async fn valid(&self) -> Option<Token> {
        self.fresh().await.filter(|token| !self.expired(token))
    }

    /// Whether the token has expired, by our clock.
    pub(crate) fn expired(&self, token: &Token) -> bool {
        token.is_expired(self.clock.now())
    }

    /// Has the token read (or fetched) again and waits until that is done, at most
    /// [`LOOK_TIMEOUT`].
    pub(crate) async fn look_again(&self) {
        let (wish, done) = oneshot::channel();
        if self.wishes.try_send(wish).is_ok() {
            // Late or never: then the token stays what it was.
            let _ = timeout(LOOK_TIMEOUT, done).await;
        }
    }

    /// Sees every later change of the token.
    pub(crate) fn changes(&self) -> watch::Receiver<Option<Token>> {
        self.latest.clone()
    }

    /// Whether there is a valid token; if not, why.
    ///
    /// # Errors
    /// The reason, for people.
    pub(crate) fn ready(&self) -> Result<(), String> {
        match &*self.latest.borrow() {
            None => Err("no token yet".to_owned()),
            Some(token) if self.expired(token) => Err("token has expired".to_owned()),
            Some(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, expires_at: Option<SystemTime>) -> Token {
        Token::new(text, expires_at).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn ready_only_with_a_token_that_has_not_expired() {
        let clock = Clock::manual(SystemTime::UNIX_EPOCH + Duration::from_secs(1000));
        let (feed, tokens) = channel(clock.clone());
        assert_eq!(tokens.ready(), Err("no token yet".to_owned()));

        feed.publish(
            token("a", Some(clock.now() + Duration::from_secs(5))),
            "test",
        );
        assert_eq!(tokens.ready(), Ok(()));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(tokens.ready(), Err("token has expired".to_owned()));
        assert!(tokens.valid().await.is_none());
        assert!(tokens.fresh().await.is_some());
    }

    #[tokio::test]
    async fn only_another_secret_is_a_change() {
        let (feed, tokens) = channel(Clock::system());
        let mut changes = tokens.changes();
        assert!(feed.publish(token("a", None), "test"));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(!feed.publish(token("a", None), "test"));
        assert!(!changes.has_changed().unwrap());
        assert!(feed.publish(token("b", None), "test"));
        assert!(changes.has_changed().unwrap());
    }

    #[tokio::test]
    async fn one_look_serves_all_who_wait() {
        let (mut feed, tokens) = channel(Clock::system());
        let asking = futures_util::future::join_all((0..40).map(|_| tokens.valid()));
        let looking = async {
            let wishes = feed.wishes().await;
            feed.publish(token("new", None), "test");
            let served = wishes.len();
            for wish in wishes {
                let _ = wish.send(());
            }
            served
        };
        let (found, served) = tokio::join!(asking, looking);
        assert_eq!(served, 40);
        assert!(
            found
                .iter()
                .all(|token| token.as_ref().unwrap().expose() == "new")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_feed_that_hangs_costs_a_bounded_wait() {
        let (_feed, tokens) = channel(Clock::system());
        let asking = (0..200).map(|_| tokens.valid());
        let found = timeout(LOOK_TIMEOUT * 2, futures_util::future::join_all(asking)).await;
        assert!(found.unwrap().iter().all(Option::is_none));
    }
}
