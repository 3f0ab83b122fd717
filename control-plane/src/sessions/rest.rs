//! Lists of sessions over REST (contract section 5).

use std::{fmt, time::Duration};

use ambient_shared::{
    api::Call,
    proto,
    rest::{BASE, List, Session},
    retry::{Retry, Retryable},
    telemetry::tell,
    token::Token,
};
use futures_util::TryStreamExt as _;
use reqwest::{StatusCode, header};
use tokio::sync::watch;
use tracing::Instrument as _;
use url::Url;

use super::list::{Page, Query};

/// Largest page accepted, in bytes. Sessions carry prompts, so 500 of them can be large; a page
/// that is larger still is asked for in smaller ones.
const MAX_BODY: usize = 32 * 1024 * 1024;

/// Longest wait for one page.
const PAGE_LIMIT: Duration = Duration::from_secs(30);

/// Reads sessions over REST, with the latest token. Clones share the connections.
#[derive(Clone)]
pub struct RestClient {
    http: reqwest::Client,
    sessions: Url,
    token: watch::Receiver<Option<Token>>,
}

/// Why a page could not be read over REST.
#[derive(Debug, thiserror::Error)]
pub enum RestError {
    /// There is no token yet.
    #[error("no token for the API server yet")]
    NoToken,
    /// The API server's REST does not accept the token (existing ones take a static token over
    /// gRPC only).
    #[error("the API server's REST refuses the token with {0}")]
    Refused(StatusCode),
    /// The API server cannot be reached, or broke off.
    #[error("cannot read sessions from {url}")]
    Unreachable {
        /// The list's URL.
        url: Url,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// Another status than 200.
    #[error("the API server answered {status} to a list of sessions")]
    Status {
        /// The status.
        status: StatusCode,
        /// What `Retry-After` asked for.
        retry_after: Option<Duration>,
    },
    /// The page is larger than we take.
    #[error("a page of sessions has more than {MAX_BODY} bytes")]
    TooLarge,
    /// The page is not what the contract says.
    #[error("the API server's list of sessions cannot be read")]
    Malformed(#[source] serde_json::Error),
}

impl Retryable for RestError {
    fn retry(&self) -> Retry {
        match self {
            Self::Status { retry_after, .. } => retry_after.map_or(Retry::Backoff, Retry::After),
            // The feed goes on for ever: a server that is mended is used again.
            Self::NoToken
            | Self::Refused(_)
            | Self::Unreachable { .. }
            | Self::TooLarge
            | Self::Malformed(_) => Retry::Backoff,
        }
    }
}

impl RestClient {
    /// A client of the API server at `base` (the URL before `/api/ambient/v1`).
    ///
    /// `http` should follow no redirects, as [`ambient_shared::client::http_client`] does not.
    pub fn new(http: reqwest::Client, base: &Url, token: watch::Receiver<Option<Token>>) -> Self {
        let mut sessions = base.clone();
        let path = format!("{}{BASE}/sessions", base.path().trim_end_matches('/'));
        sessions.set_path(&path);
        sessions.set_query(None);
        Self {
            http,
            sessions,
            token,
        }
    }

    /// One page of all projects' sessions, ordered by id.
    ///
    /// # Errors
    /// [`RestError`] says why not.
    pub(crate) async fn page(
        &self,
        query: &Query,
        page: u32,
        size: u32,
    ) -> Result<Page, RestError> {
        let authorization = match &*self.token.borrow() {
            Some(token) => token.authorization(),
            None => return Err(RestError::NoToken),
        };
        let mut url = self.sessions.clone();
        {
            let mut pairs = url.query_pairs_mut();
            pairs.append_pair("page", &page.to_string());
            pairs.append_pair("size", &size.to_string());
            pairs.append_pair("orderBy", "id");
            if let Some(phase) = query.phase {
                pairs.append_pair("search", &format!("phase = '{phase}'"));
            }
        }
        let unreachable = |source: reqwest::Error| RestError::Unreachable {
            url: self.sessions.clone(),
            source: source.without_url(),
        };
        let call = Call::begin("GET /sessions");
        let mut request = self
            .http
            .get(url)
            .timeout(PAGE_LIMIT)
            .header(header::AUTHORIZATION, authorization)
            .header(header::ACCEPT, "application/json")
            .build()
            .map_err(unreachable)?;
        tell(call.span(), request.headers_mut());
        let sent = self.http.execute(request).instrument(call.span().clone());
        let response = sent.await.map_err(unreachable)?;
        call.answered(response.status().as_str().to_owned());
        match response.status() {
            StatusCode::OK => {}
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(RestError::Refused(status));
            }
            status => {
                let retry_after = response
                    .headers()
                    .get(header::RETRY_AFTER)
                    .and_then(|value| value.to_str().ok())
                    .and_then(|value| value.trim().parse().ok())
                    .map(Duration::from_secs);
                return Err(RestError::Status {
                    status,
                    retry_after,
                });
            }
        }
        let mut body = Vec::new();
        let mut chunks = response.bytes_stream();
        while let Some(chunk) = chunks.try_next().await.map_err(unreachable)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(RestError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        let list: List<Session> = serde_json::from_slice(&body).map_err(RestError::Malformed)?;
        Ok(Page {
            total: u64::from(list.total),
            items: list.items.into_iter().map(proto::Session::from).collect(),
        })
    }
}

impl fmt::Debug for RestClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestClient")
            .field("sessions", &self.sessions.as_str())
            .finish_non_exhaustive()
    }
}
