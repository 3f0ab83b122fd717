//! Follows the objects of one kind in one place: lists them, then watches, for ever.
//!
//! In: an API and a label selector. Out: a complete list, then each change, in order; a complete
//! list again when the API server has forgotten where we were (410). Lists come in pages, and each
//! object is reduced as it comes, so that neither many nor large ones fill the memory. A list also
//! has strays: objects that have lost their label while nobody watched. Failures are tried again
//! with capped backoff and jitter; meanwhile what was seen last still counts.

use std::{fmt::Debug, time::Duration};

use ambient_shared::{
    exit,
    retry::{Backoff, Policy},
};
use futures_util::StreamExt as _;
use kube::{
    Api,
    api::{ListParams, WatchParams},
    core::WatchEvent,
};
use metrics::counter;
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::metrics::WATCH_FAILURES;

/// Objects on one page of a list: half a megabyte of pods, and several lists are read at a time.
const PAGE: u32 = 50;

/// How long watches last. What happens while one is open but dead is seen after five quarters of
/// `asked` and `margin`, at the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchTimes {
    /// How long a watch is asked to last, in seconds; up to a quarter is added at random, so that
    /// the watches of many namespaces do not end together.
    pub asked: u32,
    /// How long after that a watch may still say something.
    pub margin: Duration,
}

impl Default for WatchTimes {
    /// Less than 5 minutes, as idle connections live behind usual load balancers. API servers say
    /// something only every two minutes at worst, so that silence tells nothing before.
    fn default() -> Self {
        Self {
            asked: 200,
            margin: Duration::from_secs(15),
        }
    }
}

/// Waits after failures. A namespace that we may not read is asked for again and again, as its
/// rights may be mended at any time.
const AGAIN: Policy = Policy {
    initial: Duration::from_millis(500),
    max: Duration::from_secs(30),
    brief: Duration::MAX,
    longest_asked: Duration::from_secs(30),
};

/// Failures in a row before they are warned of: what a restart of the API server causes is no news.
const WARN_FROM: u32 = 3;

/// Failures in a row before a list is taken again: where we were may be what the API server does not
/// like.
const LIST_FROM: u32 = 3;

/// What happened to the objects.
pub(super) enum Happened<T> {
    /// These are all, as of this version.
    Listed(Vec<T>, u64),
    /// One was made or changed.
    Applied(T),
    /// One was deleted, or has lost the label that is watched.
    Deleted(T),
    /// All up to this version has been told.
    Reached(u64),
    /// It cannot be seen now what happens.
    Failed,
}

/// Follows objects of one kind.
pub(super) struct Follower<K> {
    pub(super) api: Api<K>,
    /// The labels of those that are followed.
    pub(super) selector: String,
    /// The labels of those that should be among them and are not, as somebody has changed a label:
    /// they are in lists, and no watch tells of them until they have their label again.
    pub(super) strays: Option<String>,
    /// What is followed, for the log.
    pub(super) kind: &'static str,
    /// Where, for the log.
    pub(super) namespace: String,
    /// How long watches last.
    pub(super) times: WatchTimes,
}

/// Why following was interrupted.
#[derive(Debug, thiserror::Error)]
enum Interruption {
    #[error("cannot list")]
    List(#[source] Box<kube::Error>),
    #[error("cannot watch")]
    Watch(#[source] Box<kube::Error>),
    /// Where we were is forgotten.
    #[error("the API server has forgotten the version that was seen last")]
    Expired,
    #[error("the watch was silent for too long")]
    Silent,
    #[error("the list has no version")]
    NoVersion,
}

impl<K> Follower<K>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Follows until dropped. Cancel-safe: what was told is true, and who follows anew lists first.
    pub(super) async fn run<T: Send>(
        self,
        reduce: impl Fn(&K) -> T + Send,
        mut tell: impl FnMut(Happened<T>) + Send,
    ) {
        let mut backoff = Backoff::new(AGAIN);
        let mut failures = 0_u32;
        let mut version = None;
        loop {
            let mut progress = false;
            let ended = self
                .once(&mut version, &reduce, |happened| {
                    // A list alone is none: the watch may be refused for ever after it.
                    progress |= !matches!(happened, Happened::Listed(..));
                    tell(happened);
                })
                .await;
            if progress {
                if failures >= WARN_FROM {
                    info!(namespace = %self.namespace, kind = self.kind, "watched again");
                }
                failures = 0;
                backoff.reset();
            }
            match ended {
                // As asked: the next one begins where this one ended.
                Ok(()) if progress => continue,
                Ok(()) => {}
                Err(Interruption::Expired) => version = None,
                Err(error) => {
                    failures += 1;
                    counter!(WATCH_FAILURES, "kind" => self.kind).increment(1);
                    self.log(&error, failures);
                    if failures.is_multiple_of(LIST_FROM) {
                        version = None;
                    }
                    tell(Happened::Failed);
                }
            }
            sleep(backoff.next_wait()).await;
        }
    }

    fn log(&self, error: &Interruption, failures: u32) {
        let (namespace, kind, reason) = (&self.namespace, self.kind, exit::report(error));
        if failures == WARN_FROM {
            warn!(%namespace, kind, %reason, "cannot be watched; trying again");
        } else {
            debug!(%namespace, kind, failures, %reason, "cannot be watched; trying again");
        }
    }

    /// Lists, unless a version says where to go on; then watches until the watch ends.
    async fn once<T>(
        &self,
        version: &mut Option<String>,
        reduce: &(impl Fn(&K) -> T + Send),
        mut tell: impl FnMut(Happened<T>) + Send,
    ) -> Result<(), Interruption> {
        let from = if let Some(version) = version {
            version.clone()
        } else {
            let (all, listed) = self.list(reduce).await?;
            tell(Happened::Listed(all, number(&listed)));
            version.insert(listed).clone()
        };
        let WatchTimes { asked, margin } = self.times;
        let seconds = asked + rand::random_range(0..=asked / 4);
        let params = WatchParams::default()
            .labels(&self.selector)
            .timeout(seconds);
        let events = self.api.watch(&params, &from).await.map_err(broken)?;
        tokio::pin!(events);
        let limit = Duration::from_secs(u64::from(seconds)) + margin;
        loop {
            let Ok(event) = timeout(limit, events.next()).await else {
                return Err(Interruption::Silent);
            };
            let Some(event) = event else {
                return Ok(());
            };
            match event.map_err(broken)? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    advance(version, object.meta().resource_version.as_ref());
                    tell(Happened::Applied(reduce(&object)));
                }
                WatchEvent::Deleted(object) => {
                    advance(version, object.meta().resource_version.as_ref());
                    tell(Happened::Deleted(reduce(&object)));
                }
                WatchEvent::Bookmark(bookmark) => {
                    let reached = bookmark.metadata.resource_version;
                    tell(Happened::Reached(number(&reached)));
                    advance(version, Some(&reached));
                }
                WatchEvent::Error(status) => return Err(broken(kube::Error::Api(status))),
            }
        }
    }

    /// All objects and strays, and the version of the former.
    async fn list<T>(&self, reduce: &impl Fn(&K) -> T) -> Result<(Vec<T>, String), Interruption> {
        let mut all = Vec::new();
        let version = self.pages(&self.selector, reduce, &mut all).await?;
        if let Some(strays) = &self.strays {
            self.pages(strays, reduce, &mut all).await?;
        }
        Ok((all, version))
    }

    /// The objects with these labels, page by page; gives their version.
    async fn pages<T>(
        &self,
        selector: &str,
        reduce: &impl Fn(&K) -> T,
        all: &mut Vec<T>,
    ) -> Result<String, Interruption> {
        let mut params = ListParams::default().labels(selector).limit(PAGE);
        loop {
            let page = self.api.list(&params).await.map_err(|error| match error {
                kube::Error::Api(status) if status.code == 410 => Interruption::Expired,
                error => Interruption::List(Box::new(error)),
            })?;
            all.extend(page.items.iter().map(reduce));
            let metadata = page.metadata;
            params.continue_token = metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return metadata.resource_version.ok_or(Interruption::NoVersion);
            }
        }
    }
}

fn broken(error: kube::Error) -> Interruption {
    match error {
        kube::Error::Api(status) if status.code == 410 => Interruption::Expired,
        error => Interruption::Watch(Box::new(error)),
    }
}

fn advance(version: &mut Option<String>, to: Option<&String>) {
    if let Some(to) = to.filter(|to| !to.is_empty()) {
        *version = Some(to.clone());
    }
}

/// As a number, which it is on every API server with etcd below.
fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests;
