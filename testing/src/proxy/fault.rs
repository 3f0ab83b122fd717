//! What a test does to calls.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use tokio::sync::watch;

use super::{Call, Shared, Which};

/// What happens to a call instead of what should.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This is the answer; the server hears nothing of it.
    Answer(Answer),
    /// It is passed on this much later.
    Late(Duration),
    /// It is passed on once this fault has ended.
    Held,
    /// It is never passed on, and never answered.
    Hang,
    /// The server does it, and its answer is lost with the connection.
    Lost,
    /// The answer begins, and then nothing of it arrives any more, not even its end: as of a watch
    /// that is open and dead.
    Silent,
}

/// An answer that no server gave.
#[derive(Debug, Clone)]
pub struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) body: Bytes,
}

impl Answer {
    /// With this status and body.
    ///
    /// # Panics
    /// When there is no such status.
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: Vec::new(),
            body: body.into(),
        }
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }
}

/// A fault, and whom it befalls.
pub(super) struct Rule {
    pub(super) which: Which,
    pub(super) fault: Fault,
    times: usize,
    hits: AtomicUsize,
    /// Gone with the rule.
    held: watch::Sender<()>,
}

impl Rule {
    pub(super) fn new(times: usize, which: Which, fault: Fault) -> Self {
        Self {
            which,
            fault,
            times,
            hits: AtomicUsize::new(0),
            held: watch::Sender::new(()),
        }
    }

    /// The fault, if it befalls this call, and what is closed when the fault ends. Counts.
    pub(super) fn hit(&self, call: &Call) -> Option<(Fault, watch::Receiver<()>)> {
        // Under the lock of the proxy's state: nobody counts at the same time.
        let is_hit = self.hits.load(Ordering::Acquire) < self.times && (self.which)(call);
        is_hit.then(|| {
            self.hits.fetch_add(1, Ordering::AcqRel);
            (self.fault.clone(), self.held.subscribe())
        })
    }
}

/// A fault in force; ends when dropped.
#[must_use = "it ends when dropped"]
pub struct Injected {
    rule: Arc<Rule>,
    shared: Weak<Shared>,
}

impl Injected {
    pub(super) fn new(rule: Arc<Rule>, shared: &Arc<Shared>) -> Self {
        Self {
            rule,
            shared: Arc::downgrade(shared),
        }
    }

    /// How many calls it has befallen.
    pub fn hits(&self) -> usize {
        self.rule.hits.load(Ordering::Acquire)
    }
}

impl std::fmt::Debug for Injected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injected")
            .field("fault", &self.rule.fault)
            .field("hits", &self.hits())
            .finish_non_exhaustive()
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            let mut state = shared.lock();
            state.rules.retain(|rule| !Arc::ptr_eq(rule, &self.rule));
        }
    }
}
