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
    proto::{self, EventType},
    retry::{Backoff, Policy},
};
use futures_util::{StreamExt as _, future::BoxFuture, stream::BoxStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};
use tracing::{debug, warn};

use super::catalog::Catalog;
use crate::sessions::remote::{RemoteError, call};

/// Page size: the most that existing API servers take over gRPC.
const PAGE: i32 = 500;
/// Most pages of one list: a server that never comes to an end must not keep us for ever.
const MAX_PAGES: i32 = 2000;
/// How often one list reads all pages when they shift under it.
const MAX_PASSES: u32 = 3;
/// Largest answer to a list, in bytes.
const MAX_LIST: usize = 32 * 1024 * 1024;

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

/// What an event or an item is about.
#[derive(Debug)]
pub(super) struct Named {
    id: String,
    /// The project of settings; of a project itself its id. None in a deletion.
    project: Option<String>,
}

/// One page of a list.
pub(super) struct Page {
    items: Vec<Named>,
    /// On all pages; 0 when the server does not say.
    total: i32,
}

/// What is followed: projects, or their settings.
pub(super) trait Source: Send + Sync + 'static {
    /// For logs.
    const WHAT: &'static str;

    /// Opens the watch.
    fn watch(
        api: &Api,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Result<Named, Status>>, Status>>;

    /// Reads one page, from 1.
    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>>;

    /// Takes note of one.
    fn take(catalog: &Catalog, named: &Named);

    /// Takes note of a complete list.
    fn listed(catalog: &Catalog, seen: &HashSet<String>, certain: bool);
}

/// [`Source`]: projects.
pub(super) struct OfProjects;

impl Source for OfProjects {
    const WHAT: &'static str = "projects";

    fn watch(
        api: &Api,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Result<Named, Status>>, Status>> {
        let mut client = api.projects();
        Box::pin(async move {
            let request = Request::new(proto::WatchProjectsRequest {});
            let events = client.watch_projects(request).await?.into_inner();
            Ok(events
                .map(|event| {
                    let event = event?;
                    let deleted = event.r#type() == EventType::Deleted;
                    let id = event.project.and_then(|it| id_of(it.metadata));
                    let id = id.unwrap_or(event.resource_id);
                    Ok(Named {
                        project: (!deleted).then(|| id.clone()),
                        id,
                    })
                })
                .boxed())
        })
    }

    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>> {
        let mut client = api.projects().max_decoding_message_size(MAX_LIST);
        Box::pin(async move {
            let request = proto::ListProjectsRequest { page, size };
            let answer = client.list_projects(Request::new(request));
            let answer = call("list projects", answer).await?;
            let ids = answer.items.into_iter().filter_map(|it| id_of(it.metadata));
            Ok(Page {
                items: ids
                    .map(|id| Named {
                        project: Some(id.clone()),
                        id,
                    })
                    .collect(),
                total: answer.metadata.map_or(0, |it| it.total),
            })
        })
    }

    fn take(catalog: &Catalog, named: &Named) {
        if named.project.is_some() {
            catalog.project_seen(&named.id);
        } else {
            catalog.project_doubted(&named.id);
        }
    }

    fn listed(catalog: &Catalog, seen: &HashSet<String>, _certain: bool) {
        catalog.projects_listed(seen);
    }
}

/// [`Source`]: settings of projects.
pub(super) struct OfSettings;

impl Source for OfSettings {
    const WHAT: &'static str = "project settings";

    fn watch(
        api: &Api,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Result<Named, Status>>, Status>> {
        let mut client = api.project_settings();
        Box::pin(async move {
            let request = Request::new(proto::WatchProjectSettingsRequest {});
            let events = client.watch_project_settings(request).await?.into_inner();
            Ok(events
                .map(|event| {
                    let event = event?;
                    let deleted = event.r#type() == EventType::Deleted;
                    let resource = event.resource_id;
                    Ok(match event.project_settings {
                        Some(settings) if !deleted => Named {
                            id: id_of(settings.metadata).unwrap_or(resource),
                            project: Some(settings.project_id),
                        },
                        settings => Named {
                            id: settings
                                .and_then(|it| id_of(it.metadata))
                                .unwrap_or(resource),
                            project: None,
                        },
                    })
                })
                .boxed())
        })
    }

    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>> {
        let mut client = api.project_settings().max_decoding_message_size(MAX_LIST);
        Box::pin(async move {
            let request = proto::ListProjectSettingsRequest { page, size };
            let answer = client.list_project_settings(Request::new(request));
            let answer = call("list project settings", answer).await?;
            let items = answer.items.into_iter().filter_map(|it| {
                Some(Named {
                    id: id_of(it.metadata)?,
                    project: Some(it.project_id),
                })
            });
            Ok(Page {
                items: items.collect(),
                total: answer.metadata.map_or(0, |it| it.total),
            })
        })
    }

    fn take(catalog: &Catalog, named: &Named) {
        match &named.project {
            Some(project) => catalog.settings_seen(&named.id, project),
            None => catalog.settings_doubted(&named.id),
        }
    }

    fn listed(catalog: &Catalog, seen: &HashSet<String>, certain: bool) {
        catalog.settings_listed(seen, certain);
    }
}

fn id_of(metadata: Option<proto::ObjectReference>) -> Option<String> {
    metadata.map(|it| it.id).filter(|id| !id.is_empty())
}

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
    async fn open(&self) -> Result<(BoxStream<'static, Result<Named, Status>>, bool), FeedError> {
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
