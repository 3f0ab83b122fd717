//! How we behave towards the Kubernetes API: every request passes here.
//!
//! In: requests of kube. Out: answers. A call (everything but a watch) has one of its client's
//! places and [`CALL_DEADLINE`] in all, its answer's body included. A server that is too busy is
//! asked again after the time that it named. While the [`Fence`] is closed, nothing is sent that
//! would change anything. A watch has no place and no time limit once it began; who reads it has
//! (kube's watcher gives up one that is silent for longer than it asked for).

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use ambient_shared::retry::{Backoff, Policy, Retry};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method};
use http::{
    Request, Response, StatusCode,
    header::{AUTHORIZATION, RETRY_AFTER, USER_AGENT},
    request::Parts,
};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::Incoming;
use kube::client::Body;
use metrics::{counter, histogram};
use tokio::{
    sync::{AcquireError, Semaphore},
    time::{Instant, sleep, timeout},
};
use tower::{BoxError, Service, ServiceExt as _, util::BoxCloneSyncService};
use tracing::{Instrument as _, Span, debug_span, field::Empty};

use super::{fence::Fence, token::TokenFile};
use crate::metrics::{KUBERNETES_REQUESTS, KUBERNETES_SECONDS};

/// Longest time of a call, waiting for a place and trying again included. API servers give up a
/// request after 60 s.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// Longest answer that is read, in bytes. Lists come in pages, which are far smaller.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// How often a call is tried again when the server is too busy. Then the caller hears of it, which
/// has a longer patience of its own.
const MAX_RETRIES: u32 = 3;

/// The longest wait that a server may ask for. A longer one is for the caller to know.
const LONGEST_ASKED: Duration = Duration::from_secs(20);

/// Waits where the server names no time.
const BACKOFF: Policy = Policy {
    initial: Duration::from_millis(500),
    max: Duration::from_secs(5),
    brief: Duration::ZERO,
    longest_asked: LONGEST_ASKED,
};

const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("ambient-control-plane/", env!("CARGO_PKG_VERSION")));

/// What sends requests.
pub(super) type Transport = BoxCloneSyncService<Request<Full<Bytes>>, Response<Incoming>, BoxError>;

/// An answer: of a watch as it comes, of a call whole.
type Answer = Response<Either<Incoming, Full<Bytes>>>;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("no answer within {}", humantime::format_duration(CALL_DEADLINE))]
    Deadline,
    #[error("no more calls are made, as the program ends")]
    Closed(#[from] AcquireError),
    #[error("not the leader any more: nothing was written")]
    Fenced,
}

/// The service that kube's client sends its requests to.
#[derive(Clone)]
pub(super) struct Manners {
    transport: Transport,
    token: Option<TokenFile>,
    calls: Arc<Semaphore>,
    fence: Fence,
}

impl Manners {
    pub(super) fn new(
        transport: Transport,
        token: Option<TokenFile>,
        calls: Arc<Semaphore>,
        fence: Fence,
    ) -> Self {
        Self {
            transport,
            token,
            calls,
            fence,
        }
    }

    async fn answer(self, request: Request<Body>) -> Result<Answer, BoxError> {
        let (mut parts, body) = request.into_parts();
        // In memory already: kube streams no request.
        let body = body.collect_bytes().await?;
        parts.headers.insert(USER_AGENT, AGENT);
        timeout(CALL_DEADLINE, self.tries(&mut parts, body))
            .await
            .unwrap_or_else(|_| Err(NoAnswer::Deadline.into()))
    }

    async fn tries(&self, parts: &mut Parts, body: Bytes) -> Result<Answer, BoxError> {
        let verb = Verb::of(parts);
        let mut backoff = Backoff::new(BACKOFF);
        let mut left = MAX_RETRIES;
        if let Some(token) = &self.token {
            parts.headers.insert(AUTHORIZATION, token.header().await);
        }
        loop {
            let answer = self.once(verb, parts, body.clone()).await?;
            if answer.status() == StatusCode::UNAUTHORIZED
                && let Some(renewed) = self.renewed(parts).await
            {
                parts.headers.insert(AUTHORIZATION, renewed);
                continue;
            }
            let wait = retry(verb, &answer)
                .filter(|_| left > 0)
                .and_then(|retry| backoff.after(retry));
            let Some(wait) = wait else {
                return Ok(answer);
            };
            left -= 1;
            // Without a place: who waits holds up nobody.
            sleep(wait).await;
        }
    }

    /// Another token than the one that was refused, if the file has one.
    async fn renewed(&self, refused: &Parts) -> Option<HeaderValue> {
        let refused = refused.headers.get(AUTHORIZATION)?;
        self.token.as_ref()?.newer_than(refused).await
    }

    /// One try, counted.
    async fn once(&self, verb: Verb, parts: &Parts, body: Bytes) -> Result<Answer, BoxError> {
        let request = Request::from_parts(parts.clone(), Full::new(body));
        let place = match verb {
            Verb::Watch => None,
            _ => Some(self.calls.acquire().await.map_err(NoAnswer::from)?),
        };
        // Last of all: waiting for the place may have taken long.
        if verb.writes() && !self.fence.is_open() {
            return Err(NoAnswer::Fenced.into());
        }
        let counted = Counted::new(verb);
        let span = counted.span.clone();
        let answer = self.sent(verb, request).instrument(span).await?;
        counted.answered(answer.status());
        drop(place);
        Ok(answer)
    }

    async fn sent(&self, verb: Verb, request: Request<Full<Bytes>>) -> Result<Answer, BoxError> {
        let (head, body) = self.transport.clone().oneshot(request).await?.into_parts();
        let body = if matches!(verb, Verb::Watch) && head.status.is_success() {
            Either::Left(body)
        } else {
            Either::Right(Full::new(whole(body).await?))
        };
        Ok(Response::from_parts(head, body))
    }
}

impl Service<Request<Body>> for Manners {
    type Response = Answer;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().answer(request))
    }
}

async fn whole(body: Incoming) -> Result<Bytes, BoxError> {
    Ok(Limited::new(body, MAX_ANSWER).collect().await?.to_bytes())
}

/// Whether and when this is tried again. 429 says that nothing was done, whatever was asked. 503
/// does not quite: an object may have been made, so making is left to the caller.
fn retry(verb: Verb, answer: &Answer) -> Option<Retry> {
    match answer.status() {
        StatusCode::TOO_MANY_REQUESTS => {}
        StatusCode::SERVICE_UNAVAILABLE if !matches!(verb, Verb::Create) => {}
        _ => return None,
    }
    // API servers name seconds, never a date.
    let asked = answer
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    match asked.map(Duration::from_secs) {
        None => Some(Retry::Backoff),
        Some(asked) if asked <= LONGEST_ASKED => Some(Retry::After(asked)),
        Some(_) => None,
    }
}

/// What is asked, in the words of Kubernetes' permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    fn of(request: &Parts) -> Self {
        // kube says there what it does.
        let said = |prefix: &str| {
            let name = request.extensions.get::<&'static str>();
            name.is_some_and(|name| name.starts_with(prefix))
        };
        let asks_for = |pair: &str| {
            let query = request.uri.query().unwrap_or_default();
            query.split('&').any(|it| it == pair)
        };
        match request.method {
            Method::POST => Self::Create,
            Method::PUT => Self::Update,
            Method::PATCH => Self::Patch,
            Method::DELETE if said("delete_collection") => Self::DeleteCollection,
            Method::DELETE => Self::Delete,
            _ if asks_for("watch=true") || asks_for("watch=1") => Self::Watch,
            _ if said("list") => Self::List,
            _ => Self::Get,
        }
    }

    /// Whether it may change anything.
    fn writes(self) -> bool {
        match self {
            Self::Get | Self::List | Self::Watch => false,
            Self::Create | Self::Update | Self::Patch | Self::Delete | Self::DeleteCollection => {
                true
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }
}

/// Counts a try when it ends, in whatever way: by an answer, an error, or by being dropped at a
/// deadline.
struct Counted {
    verb: Verb,
    span: Span,
    began: Instant,
    status: Option<StatusCode>,
}

impl Counted {
    fn new(verb: Verb) -> Self {
        Self {
            verb,
            // Without its path, which has names in it.
            span: debug_span!(
                "Kubernetes call",
                otel.kind = "client",
                verb = verb.name(),
                code = Empty,
                otel.status_code = Empty
            ),
            began: Instant::now(),
            status: None,
        }
    }

    fn answered(mut self, status: StatusCode) {
        self.status = Some(status);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let code = self
            .status
            .map_or_else(|| "none".to_owned(), |status| status.as_str().to_owned());
        let verb = self.verb.name();
        self.span.record("code", &code);
        if !self.status.is_some_and(|status| status.is_success()) {
            self.span.record("otel.status_code", "ERROR");
        }
        counter!(KUBERNETES_REQUESTS, "verb" => verb, "code" => code).increment(1);
        histogram!(KUBERNETES_SECONDS, "verb" => verb).record(self.began.elapsed().as_secs_f64());
    }
}
