//! The sessions that the API server has, as last seen.
//!
//! [`SessionCache`] holds the current objects and the tombstones of deleted ones; the feed fills it
//! from lists and the watch. A snapshot says nothing about when it is applied: the cache alone
//! decides which of two is the newer one.

use ambient_shared::{
    phase::{Phase, UnknownPhase},
    proto,
    session::{InvalidSessionId, SessionId},
};

mod cache;
pub(crate) mod feed;
pub(crate) mod list;
pub(crate) mod remote;
pub mod rest;

pub use cache::SessionCache;
pub(crate) use cache::{Applied, Confirmed, Revision};

/// A session as the controller sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// Where it stands.
    pub phase: Phase,
    /// How often it was started before (`sdk_restart_count`).
    pub generation: u32,
    /// The whole object.
    pub object: proto::Session,
}

/// Why an object of the API server is no session that the controller can work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnusableSession {
    /// Its id is none.
    #[error("the API server has a session whose id cannot be used")]
    Id(#[from] InvalidSessionId),
    /// Its phase is none that this release knows.
    #[error("the API server has a session in a phase that this release does not know")]
    Phase(#[from] UnknownPhase),
}

impl Session {
    /// Time of its last change as `(seconds, nanoseconds)`, when the API server said.
    pub(crate) fn updated_at(&self) -> Option<(i64, i32)> {
        let time = self.object.metadata.as_ref()?.updated_at.as_ref()?;
        Some((time.seconds, time.nanos))
    }
}

impl TryFrom<proto::Session> for Session {
    type Error = UnusableSession;

    fn try_from(object: proto::Session) -> Result<Self, UnusableSession> {
        let id = object.metadata.as_ref().map_or("", |metadata| &metadata.id);
        Ok(Self {
            id: SessionId::parse(id)?,
            phase: Phase::of(object.phase.as_deref())?,
            // A negative count is nobody's start.
            generation: object
                .sdk_restart_count
                .and_then(|count| u32::try_from(count).ok())
                .unwrap_or(0),
            object,
        })
    }
}
