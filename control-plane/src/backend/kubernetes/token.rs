//! Replacing a session's token.

use std::time::Duration;

use ambient_shared::{exit, session::SessionId};
use humantime::format_duration;
use tokio::time::timeout;

use super::{
    Inner,
    events::News,
    names::{REFRESH_MANAGER, SessionRef},
    seen::Entry,
};
use crate::backend::{BackendError, Credentials};

/// Longest time for one write. The refresh gives a token 30 s, its issue included, and what it cuts
/// off itself nobody is told of.
const WRITE_LIMIT: Duration = Duration::from_secs(20);

impl Inner {
    /// With one request, whether the Secret is there, was edited, or is gone. Owner and namespace
    /// come from what is seen; an owner that is gone in truth has the Secret collected.
    pub(super) async fn write_token(
        &self,
        id: &SessionId,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        let namespace = self.seen.namespace(id).ok_or(BackendError::NotFound)?;
        let entry = self.seen.entry(&namespace, id);
        let session = self.session(id, &namespace, &entry);
        let (Some(owner), Some(session)) = (entry.owner(), session) else {
            return Err(BackendError::NotFound);
        };
        let client = &self.clients.refresh;
        let written = self.apply_secret(client, &session, owner, credentials, REFRESH_MANAGER);
        let written = timeout(WRITE_LIMIT, written).await.unwrap_or_else(|_| {
            Err(BackendError::Failed {
                action: "write the token of a session",
                source: format!("no answer within {}", format_duration(WRITE_LIMIT)).into(),
            })
        });
        self.tell_refresh(&session, &entry, written.as_ref().err());
        written
    }

    /// Tells of the first of several failures, and of the first success after them.
    fn tell_refresh(&self, session: &SessionRef, entry: &Entry, error: Option<&BackendError>) {
        let failed_before = self.note_failing(&session.id, error.is_some());
        if failed_before == error.is_some() {
            return;
        }
        let news = match error {
            Some(error) => {
                let text = exit::report(error);
                News::RefreshFailed(text)
            }
            None => News::RefreshWorks,
        };
        if let Some((held, _)) = entry.pod() {
            self.teller.tell(session, &held.facts.uid, news);
        }
    }
}
