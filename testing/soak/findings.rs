//! What must not have happened, and did.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How many of a kind are shown in full.
const SHOWN: usize = 5;

/// All of them. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Findings(Arc<Mutex<BTreeMap<&'static str, Vec<String>>>>);

impl Findings {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more of a kind.
    #[expect(clippy::print_stderr, reason = "for whoever waits")]
    pub fn add(&self, kind: &'static str, what: impl Into<String>) {
        let what = what.into();
        eprintln!("FOUND {kind}: {what}");
        self.lock().entry(kind).or_default().push(what);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Vec<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, all) in self.lock().iter() {
            writeln!(f, "{kind}: {}", all.len())?;
            for one in all.iter().take(SHOWN) {
                writeln!(f, "  {one}")?;
            }
        }
        Ok(())
    }
}
