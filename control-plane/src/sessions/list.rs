//! Complete lists, page by page (being written).

use ambient_shared::{phase::Phase, proto};

/// What a list is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Query {
    /// Only sessions in this phase.
    pub(crate) phase: Option<Phase>,
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    /// Sessions on all pages, as the server counts them.
    pub(crate) total: u64,
    /// Its sessions.
    pub(crate) items: Vec<proto::Session>,
}
