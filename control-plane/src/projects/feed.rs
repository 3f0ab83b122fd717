//! Follows the API server's projects and their settings, and says which there may be news of.
//!
//! In: a gRPC watch and complete gRPC lists. Out: marks in the [`Catalog`]. The watch is opened
//! first and read while all pages are listed; every reconnect lists again, and so does a slow
//! resync. Nothing follows from a list alone (the worker asks about each project), so pages that
//! shift cost time, never objects.

use std::{collections::HashSet, marker::PhantomData, sync::Arc, time::Duration};

use ambient_shared::{
    api::Api,
    exit,
    retry::{Backoff, Retryable as _},
};
use futures_util::{StreamExt as _, future::BoxFuture};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::catalog::Catalog;
use crate::{
    sessions::remote::RemoteError,
    watching::{self, DOUBTFUL_RESYNC, Opened, RECONNECTS, Reconnects, WatchError},
};

mod source;

use source::Source;
pub(super) use source::{OfProjects, OfSettings};

/// Page size: the most that existing API servers take over gRPC.
const PAGE: i32 = 500;
/// Most pages of one list: a server that never comes to an end must not keep us for ever.
const MAX_PAGES: i32 = 2000;
/// How often one list reads all pages when they shift under it.
const MAX_PASSES: u32 = 3;

/// The task that follows one kind.
pub(super) struct Feed<S> {
    api: Api,
    catalog: Arc<Catalog>,
    resync: Duration,
    source: PhantomData<S>,
}

/// Why a list is not complete.
#[derive(Debug, thiserror::Error)]
enum ListError {
    /// A page cannot be read.
    #[error(transparent)]
    Page(#[from] RemoteError),
    /// The server has had a next page each time.
    #[error("a list of the API server has no end: {MAX_PAGES} pages read")]
    Endless,
}

impl ListError {
    fn wait(&self, backoff: &mut Backoff) -> Duration {
        let wait = match self {
            Self::Page(error) => backoff.after(error.retry()),
            Self::Endless => None,
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
        let mut reconnects = Reconnects::new();
        loop {
            let followed = shutdown.run_until_cancelled(self.follow(&mut reconnects));
            let Some(error) = followed.await else {
                return;
            };
            let wait = reconnects.wait_after(&error);
            warn!(of = S::WHAT, reason = %exit::report(&error), retry_in_s = wait.as_secs_f32(), "watch ended");
            if shutdown.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One connection: opens the watch, lists, follows.
    async fn follow(&self, reconnects: &mut Reconnects) -> WatchError {
        let probe = async { S::page(&self.api, 1, 1).await.map(drop) };
        let opened = watching::open(S::watch(&self.api), probe).await;
        let Opened {
            mut events,
            certain,
        } = match opened {
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
                    None => return WatchError::Ended,
                    Some(Err(status)) => return WatchError::Refused(status),
                    Some(Ok(named)) => S::take(&self.catalog, &named),
                },
                () = listing => {
                    list = None;
                    let doubtful = !reconnects.was_good() && !certain;
                    let wait = if doubtful { self.resync.min(DOUBTFUL_RESYNC) } else { self.resync };
                    next_list = Instant::now() + wait;
                    reconnects.is_good();
                }
                () = sleep_until(next_list), if !is_listing => {
                    list = Some(Box::pin(self.list()));
                }
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

    async fn list_once(&self) -> Result<(), ListError> {
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
    async fn pass(&self, seen: &mut HashSet<String>) -> Result<bool, ListError> {
        let mut of_this = HashSet::new();
        let mut total = None;
        let mut steady = true;
        for number in 1..=MAX_PAGES {
            let page = S::page(&self.api, number, PAGE).await?;
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
        Err(ListError::Endless)
    }
}
