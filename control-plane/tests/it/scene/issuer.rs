//! An issuer of opaque tokens that live as long as a test says.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ambient_control_plane::issuer::{IssueError, Issuer, Subject};
use ambient_shared::{clock::Clock, token::Token};
use futures_util::future::BoxFuture;

/// Counts and remembers for whom it issues.
pub struct FakeIssuer {
    life: Duration,
    issued: AtomicUsize,
    subjects: Mutex<Vec<Subject>>,
}

impl FakeIssuer {
    /// Of tokens with this life.
    pub fn new(life: Duration) -> Self {
        Self {
            life,
            issued: AtomicUsize::new(0),
            subjects: Mutex::default(),
        }
    }

    /// For whom tokens were issued so far.
    pub fn subjects(&self) -> Vec<Subject> {
        self.subjects.lock().unwrap().clone()
    }
}

impl Issuer for FakeIssuer {
    fn issue<'a>(
        &'a self,
        subject: &'a Subject,
        _min_life: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        let number = self.issued.fetch_add(1, Ordering::SeqCst);
        self.subjects.lock().unwrap().push(subject.clone());
        let expires_at = Clock::system().now() + self.life;
        let token = Token::new(&format!("token-{number}"), Some(expires_at)).unwrap();
        Box::pin(std::future::ready(Ok(token)))
    }

    fn life(&self) -> Option<Duration> {
        Some(self.life)
    }
}
