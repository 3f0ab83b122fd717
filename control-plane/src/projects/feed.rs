//! Follows the API server's projects and their settings, and says which there may be news of.
//!
//! In: a gRPC watch and complete gRPC lists. Out: marks in the [`Catalog`]. The watch is opened
//! first and read while all pages are listed; every reconnect lists again, and so does a slow
//! resync. Nothing follows from a list alone (the worker asks about each project), so pages that
//! shift cost time, never objects.

use std::{collections::HashSet, marker::PhantomData, sync::Arc, time::Duration};

use ambient_shared::{
    api::{Api, retry_of},
    exit,
    retry::{Backoff, Policy},
};
use futures_util::{StreamExt as _, future::BoxFuture};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, warn};

use super::catalog::Catalog;
use crate::sessions::remote::RemoteError;

mod source;

use source::{Events, Source};
pub(super) use source::{OfProjects, OfSettings};

/// Page size: the most that existing API servers take over gRPC.
const PAGE: i32 = 500;
/// Most pages of one list: a server that never comes to an end must not keep us for ever.
const MAX_PAGES: i32 = 2000;
/// How often one list reads all pages when they shift under it.
const MAX_PASSES: u32 = 3;

/// Waits between connections, and between lists that failed.
const RECONNECTS: Policy = Policy {
    initial: Duration::from_millis(250),
    max: Duration::from_secs(30),
    brief: Duration::from_secs(30),
    longest_asked: Duration::from_mins(1),
};

/// How long a connection must have been good before the next failure starts with the shortest wait
/// again.
const GOOD_AFTER: Duration = Duration::from_secs(5);

/// How long to wait for the watch to begin once the server has answered another call on the same
/// connection. Existing servers send nothing at all before the first event.
const SETTLE: Duration = Duration::from_secs(1);

/// How soon to list again when it was not certain that the watch had begun before the first list.
const DOUBTFUL_RESYNC: Duration = Duration::from_secs(30);

/// The task that follows one kind.
pub(super) struct Feed<S> {
    api: Api,
    catalog: Arc<Catalog>,
    resync: Duration,
    source: PhantomData<S>,
}

/// Why a connection ended, or a list is not complete.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    /// The server refuses, or broke off.
    #[error("the API server says {:?} ({}) to a watch", .0.code(), .0.message())]
    Refused(Status),
    /// The server does not answer.
    #[error("the API server does not answer")]
    Silent(#[source] RemoteError),
    /// The server ended the stream.
    #[error("the API server ended a watch")]
    Ended,
    /// The server has had a next page each time.
    #[error("a list of the API server has no end: {MAX_PAGES} pages read")]
    Endless,
}

impl FeedError {
    fn wait(&self, backoff: &mut Backoff) -> Duration {
        let wait = match self {
            Self::Refused(status) => backoff.after(retry_of(status)),
            Self::Silent(error) => backoff.after(retry_of(&error.status)),
            Self::Ended | Self::Endless => None,
        };
        // Never for good: what is refused today may be allowed tomorrow.
        wait.unwrap_or_else(|| backoff.next_wait())
    }
}

impl<S: Source> Feed<S> {
    pub(super) fn new(api: Api, catalog: Arc<Catalog>, resync: Duration) -> Self {
        Self {
            api,
            catalog,
            resync,
            source: PhantomData,
        }
    }

    /// Follows until `shutdown`. Cancel-safe.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(RECONNECTS);
        loop {
            let mut good_since = None;
            let followed = shutdown.run_until_cancelled(self.follow(&mut good_since));
            let Some(error) = followed.await else {
                return;
            };
            if good_since.is_some_and(|since: Instant| since.elapsed() >= GOOD_AFTER) {
                backoff.reset();
            }
            let wait = error.wait(&mut backoff);
            warn!(of = S::WHAT, reason = %exit::report(&error), retry_in_s = wait.as_secs_f32(), "watch ended");
            if shutdown.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One connection: opens the watch, lists, follows.
    async fn follow(&self, good_since: &mut Option<Instant>) -> FeedError {
        let (mut events, certain) = match self.open().await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        let mut list: Option<BoxFuture<'_, ()>> = Some(Box::pin(self.list()));
        let mut next_list = Instant::now();
        loop {
            let is_listing = list.is_some();
            let listing = async {
                match &mut list {
                    Some(list) => list.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    None => return FeedError::Ended,
                    Some(Err(status)) => return FeedError::Refused(status),
                    Some(Ok(named)) => S::take(&self.catalog, &named),
                },
                () = listing => {
                    list = None;
                    let doubtful = good_since.is_none() && !certain;
                    let wait = if doubtful { self.resync.min(DOUBTFUL_RESYNC) } else { self.resync };
                    next_list = Instant::now() + wait;
                    good_since.get_or_insert_with(Instant::now);
                }
                () = sleep_until(next_list), if !is_listing => {
                    list = Some(Box::pin(self.list()));
                }
            }
        }
    }

    /// Opens the watch, and says whether it has certainly begun.
    async fn open(&self) -> Result<(Events, bool), FeedError> {
        let mut opening = S::watch(&self.api);
        // Follows on the same connection: once it is answered, the server has received the watch.
        let probe = S::page(&self.api, 1, 1);
        let opened = tokio::select! {
            biased;
            opened = &mut opening => Some(opened),
            answered = probe => {
                answered.map_err(FeedError::Silent)?;
                timeout(SETTLE, &mut opening).await.ok()
            }
        };
        match opened {
            Some(Ok(events)) => Ok((events, true)),
            Some(Err(status)) => Err(FeedError::Refused(status)),
            None => {
                let later = futures_util::stream::once(opening).flat_map(|opened| match opened {
                    Ok(events) => events,
                    Err(status) => futures_util::stream::iter([Err(status)]).boxed(),
                });
                Ok((later.boxed(), false))
            }
        }
    }

    /// Lists until a list is complete.
    async fn list(&self) {
        let mut backoff = Backoff::new(RECONNECTS);
        while let Err(error) = self.list_once().await {
            let wait = error.wait(&mut backoff);
            warn!(of = S::WHAT, reason = %exit::report(&error), retry_in_s = wait.as_secs_f32(), "list failed");
            sleep(wait).await;
        }
    }

    async fn list_once(&self) -> Result<(), FeedError> {
        let mut seen = HashSet::new();
        let mut certain = false;
        for _ in 0..MAX_PASSES {
            certain = self.pass(&mut seen).await?;
            if certain {
                break;
            }
        }
        debug!(of = S::WHAT, count = seen.len(), certain, "listed");
        S::listed(&self.catalog, &seen, certain);
        Ok(())
    }

    /// Reads all pages; says whether none can have slipped from one page to another meanwhile.
    async fn pass(&self, seen: &mut HashSet<String>) -> Result<bool, FeedError> {
        let mut of_this = HashSet::new();
        let mut total = None;
        let mut steady = true;
        for number in 1..=MAX_PAGES {
            let page = S::page(&self.api, number, PAGE).await;
            let page = page.map_err(FeedError::Silent)?;
            steady &= total.is_none_or(|total| total == page.total);
            total = Some(page.total);
            let is_empty = page.items.is_empty();
            for named in page.items {
                steady &= of_this.insert(named.id.clone());
                if seen.insert(named.id.clone()) {
                    S::take(&self.catalog, &named);
                }
            }
            let has_all = usize::try_from(page.total).is_ok_and(|it| it > 0 && of_this.len() >= it);
            if is_empty || has_all {
                // One page cannot shift.
                return Ok(steady || number == 1);
            }
        }
        Err(FeedError::Endless)
    }
}
