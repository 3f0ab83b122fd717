//! Complete lists, page by page.
//!
//! In: a query. Out: every page's sessions, as they arrive. Over REST, where lists are filtered and
//! ordered; over gRPC where an existing API server's REST refuses the token. Pages shift while a
//! list is read, so that it may miss sessions: [`Listed::shifted`] says when that was seen.

use std::{collections::HashSet, future::Future, time::Duration};

use ambient_shared::{
    api::Api,
    phase::Phase,
    proto,
    retry::{GaveUp, Policy, Retry, Retryable, retry},
};
use tonic::{Code, Request};
use tracing::{info, warn};

use super::{
    remote::{RemoteError, call},
    rest::{RestClient, RestError},
};

/// Page sizes, largest first; each is a part of the one before it, so that a list can go on with
/// smaller pages where it is. 500 is the most that existing API servers take over gRPC.
const SIZES: [u32; 6] = [500, 250, 125, 25, 5, 1];

/// Most pages of one list: a server that never comes to an end must not keep us for ever.
const MAX_PAGES: u32 = 20_000;

/// Largest answer to a gRPC list, in bytes.
const MAX_LIST: usize = 32 * 1024 * 1024;

/// Waits between tries of one page.
const PAGE_RETRIES: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(5),
    brief: Duration::from_secs(5),
    longest_asked: Duration::from_secs(30),
};

/// What a list is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Query {
    /// Only sessions in this phase.
    pub(crate) phase: Option<Phase>,
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    /// Sessions on all pages, as the server counts them; 0 when it does not say.
    pub(crate) total: u64,
    /// Its sessions.
    pub(crate) items: Vec<proto::Session>,
}

/// How a complete list went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Pages read.
    pub(crate) pages: u32,
    /// Sessions came or went meanwhile, so that one may have slipped from one page to another that
    /// had been read before.
    pub(crate) shifted: bool,
}

/// Why a list is not complete.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListError {
    /// A page cannot be read over REST.
    #[error("cannot list sessions over REST")]
    Rest(#[source] GaveUp<RestError>),
    /// A page cannot be read over gRPC.
    #[error("cannot list sessions over gRPC")]
    Grpc(#[source] GaveUp<RemoteError>),
    /// The server has had a next page each time.
    #[error("the API server's list of sessions has no end: {MAX_PAGES} pages read")]
    Endless,
}

/// Reads complete lists. Clones share the connections.
#[derive(Clone, Debug)]
pub(crate) struct Lister {
    api: Api,
    rest: RestClient,
}

/// What came of asking for one page.
enum Answer {
    Page(Page),
    /// Ask for less at once.
    TooLarge,
    /// REST takes no token of ours.
    Refused,
}

impl Lister {
    /// Lists over `rest`, or else over `api`.
    pub(crate) fn new(api: Api, rest: RestClient) -> Self {
        Self { api, rest }
    }

    /// Hands all pages' sessions to `each`. A page that fails is tried again for `patience`.
    ///
    /// Cancel-safe: what was handed over stays so.
    ///
    /// # Errors
    /// When a page cannot be had. What was handed over by then is not the whole list.
    pub(crate) async fn all(
        &self,
        query: &Query,
        patience: Duration,
        mut each: impl FnMut(Vec<proto::Session>),
    ) -> Result<Listed, ListError> {
        let over_rest = pages(
            |page, size| async move {
                let ask = || self.rest.page(query, page, size);
                match retry(
                    PAGE_RETRIES,
                    Some(patience),
                    || unless_final(ask()),
                    |_, _| {},
                )
                .await
                {
                    Ok(Ok(page)) => Ok(Answer::Page(page)),
                    Ok(Err(RestError::TooLarge)) => Ok(Answer::TooLarge),
                    Ok(Err(_)) => Ok(Answer::Refused),
                    Err(error) => Err(ListError::Rest(error)),
                }
            },
            &mut each,
        );
        if let Some(listed) = over_rest.await? {
            return Ok(listed);
        }
        info!("the API server's REST refuses the token; listing sessions over gRPC");
        let over_grpc = pages(
            |page, size| async move {
                let ask = || self.grpc_page(page, size);
                match retry(PAGE_RETRIES, Some(patience), ask, |_, _| {}).await {
                    Ok(page) => Ok(Answer::Page(page)),
                    Err(GaveUp::Final(error)) if error.status.code() == Code::OutOfRange => {
                        Ok(Answer::TooLarge)
                    }
                    Err(error) => Err(ListError::Grpc(error)),
                }
            },
            |items: Vec<proto::Session>| {
                let asked_for = |session: &proto::Session| match query.phase {
                    Some(phase) => session.phase.as_deref() == Some(phase.as_str()),
                    None => true,
                };
                each(items.into_iter().filter(asked_for).collect());
            },
        );
        // gRPC answers without a page for good only by an error.
        Ok(over_grpc.await?.unwrap_or_default())
    }

    async fn grpc_page(&self, page: u32, size: u32) -> Result<Page, RemoteError> {
        let mut client = self.api.sessions().max_decoding_message_size(MAX_LIST);
        let request = proto::ListSessionsRequest {
            page: i32::try_from(page).unwrap_or(i32::MAX),
            size: i32::try_from(size).unwrap_or(i32::MAX),
        };
        let answer = call("list sessions", client.list_sessions(Request::new(request))).await?;
        let total = answer.metadata.map_or(0, |metadata| metadata.total);
        Ok(Page {
            total: u64::try_from(total).unwrap_or(0),
            items: answer.items,
        })
    }
}

/// Makes answers of what no retry mends, so that they end the retries.
async fn unless_final(
    page: impl Future<Output = Result<Page, RestError>>,
) -> Result<Result<Page, RestError>, RestError> {
    match page.await {
        Err(error @ (RestError::TooLarge | RestError::Refused(_))) => Ok(Err(error)),
        Err(error) => Err(error),
        Ok(page) => Ok(Ok(page)),
    }
}

/// All pages, in order. None when the server refuses.
async fn pages<F>(
    mut ask: impl FnMut(u32, u32) -> F,
    mut each: impl FnMut(Vec<proto::Session>),
) -> Result<Option<Listed>, ListError>
where
    F: Future<Output = Result<Answer, ListError>>,
{
    let mut sizes = SIZES.into_iter().peekable();
    let mut size = sizes.next().unwrap_or(1);
    let mut number = 1;
    let mut listed = Listed::default();
    let mut total = None;
    let mut ids = HashSet::new();
    let mut count = 0;
    while listed.pages < MAX_PAGES {
        let page = match ask(number, size).await? {
            Answer::Page(page) => page,
            Answer::Refused => return Ok(None),
            Answer::TooLarge => {
                if let Some(smaller) = sizes.next() {
                    number = (number - 1) * (size / smaller) + 1;
                    size = smaller;
                } else {
                    warn!("one session is too large to be listed; going on without it");
                    listed.shifted = true;
                    number += 1;
                }
                listed.pages += 1;
                continue;
            }
        };
        listed.pages += 1;
        listed.shifted |= total.is_some_and(|total| total != page.total);
        total = Some(page.total);
        count += page.items.len() as u64;
        for id in page.items.iter().filter_map(|item| item.metadata.as_ref()) {
            listed.shifted |= !ids.insert(id.id.clone());
        }
        let last = page.items.is_empty() || (page.total > 0 && count >= page.total);
        each(page.items);
        if last {
            return Ok(Some(listed));
        }
        number += 1;
    }
    Err(ListError::Endless)
}

impl Retryable for ListError {
    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn session(number: usize) -> proto::Session {
        proto::Session {
            metadata: Some(proto::ObjectReference {
                id: format!("session-{number:05}"),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// A server that has this many sessions and gives at most `cap` at once, in at most `bytes`
    /// (one session being one byte).
    async fn list(has: usize, cap: usize, bytes: usize, says_total: bool) -> (Listed, Vec<String>) {
        let got = RefCell::new(Vec::new());
        let ask = async |page: u32, size: u32| {
            let size = (size as usize).min(cap);
            if size > bytes {
                return Ok(Answer::TooLarge);
            }
            let start = (page as usize - 1) * size;
            let items = (start..has.min(start + size)).map(session).collect();
            let total = if says_total { has as u64 } else { 0 };
            Ok(Answer::Page(Page { total, items }))
        };
        let each = |items: Vec<proto::Session>| {
            let ids = items.into_iter().map(|item| item.metadata.unwrap().id);
            got.borrow_mut().extend(ids);
        };
        let listed = pages(ask, each).await.unwrap().unwrap();
        (listed, got.into_inner())
    }

    #[tokio::test]
    async fn every_page_is_read_whatever_the_server_makes_of_the_size() {
        for (cap, bytes, says_total) in [
            (1000, 1000, true),
            (1000, 1000, false),
            (20, 1000, true),
            (20, 1000, false),
            (1000, 60, true),
            (1000, 1, false),
        ] {
            for has in [0, 1, 499, 500, 501, 1234] {
                let (listed, got) = list(has, cap, bytes, says_total).await;
                assert_eq!(got.len(), has, "{has} {cap} {bytes} {says_total}");
                assert!(!listed.shifted);
            }
        }
    }

    #[tokio::test]
    async fn shifting_pages_are_noticed() {
        let mut total = 1000;
        let ask = |page: u32, size: u32| {
            total -= 1;
            let start = (page - 1) * size;
            let items = (start..total.min(start + size)).map(|n| session(n as usize));
            let page = Page {
                total: u64::from(total),
                items: items.collect(),
            };
            std::future::ready(Ok(Answer::Page(page)))
        };
        let listed = pages(ask, |_| {}).await.unwrap().unwrap();
        assert!(listed.shifted);
    }

    #[tokio::test]
    async fn a_list_without_end_is_given_up() {
        let ask = |page: u32, _| {
            let items = vec![session(page as usize)];
            std::future::ready(Ok(Answer::Page(Page { total: 0, items })))
        };
        assert!(matches!(pages(ask, |_| {}).await, Err(ListError::Endless)));
    }
}
