//! Whether we may write: only the control plane that leads changes what sessions have.

use std::{fmt, sync::Arc};

/// Asked right before each try of a request that changes anything. Closed, it fails the request,
/// and nothing is sent.
#[derive(Clone)]
pub struct Fence(Arc<dyn Fn() -> bool + Send + Sync>);

impl Fence {
    /// One that is open while `may_write` says so. It is asked often, and must not block.
    pub fn new(may_write: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(may_write))
    }

    /// One that is always open, for what leads nothing.
    pub fn open() -> Self {
        Self::new(|| true)
    }

    pub(crate) fn is_open(&self) -> bool {
        (self.0)()
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence")
            .field("open", &self.is_open())
            .finish()
    }
}
