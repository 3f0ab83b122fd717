//! The sessions that the API server has, as last seen.

use ambient_shared::{phase::Phase, proto, session::SessionId};

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
