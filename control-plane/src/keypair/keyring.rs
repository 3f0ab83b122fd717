//! The keys in use, which a rotation changes while everything runs.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

use super::Keys;

/// The keys in use. All clones are one: who holds it asks for the keys at the moment of use and
/// keeps them only for the one piece of work.
#[derive(Clone)]
pub struct Keyring {
    keys: watch::Sender<Arc<Keys>>,
}

impl Keyring {
    /// Begins with these keys.
    pub fn new(keys: Keys) -> Self {
        Self {
            keys: watch::Sender::new(Arc::new(keys)),
        }
    }

    /// The keys at this moment.
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.borrow())
    }

    /// Uses these from now on. What has begun ends with those before.
    pub fn replace(&self, keys: Keys) {
        self.keys.send_replace(Arc::new(keys));
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.current()).finish()
    }
}
