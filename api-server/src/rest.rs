//! REST (contract section 5): routes, and the form of every answer.
//!
//! Handlers give objects or an [`Error`]; here each call gets an operation id, and each error its
//! body, those of the HTTP library (unknown path, wrong method) included.

mod body;
mod messages;
mod project_settings;
mod projects;
mod query;
mod sessions;

use std::{io, sync::Arc, time::Instant};

use ambient_shared::rest::{BASE, ErrorBody, List, SESSION_TOKENS_HEADER};
use axum::{
    Router,
    body::Body,
    extract::{FromRequestParts, MatchedPath, Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::get,
    serve::ListenerExt as _,
};
use http::{HeaderName, HeaderValue, Method, StatusCode, Version, header, request::Parts};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, debug_span, field::Empty};
use uuid::Uuid;

use crate::{
    App,
    auth::access::Caller,
    error::Error,
    metrics,
    store::{Listed, Page},
};

/// Names the call in our log.
const OPERATION_ID: HeaderName = HeaderName::from_static("x-operation-id");

/// Tells control planes that minted tokens open one session here.
const SESSION_TOKENS: HeaderName = HeaderName::from_static(SESSION_TOKENS_HEADER);

/// Seconds after which a call that found us busy may come again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// All routes. Those `beside` the API are served as they are.
pub(crate) fn routes(app: App, beside: Router) -> Router {
    let api = Router::new()
        .route("/sessions", get(sessions::list).post(sessions::create))
        .route(
            "/sessions/{id}",
            get(sessions::get)
                .patch(sessions::change)
                .delete(sessions::delete),
        )
        .route(
            "/sessions/{id}/status",
            axum::routing::patch(sessions::status),
        )
        .route("/sessions/{id}/start", axum::routing::post(sessions::start))
        .route("/sessions/{id}/stop", axum::routing::post(sessions::stop))
        .route(
            "/sessions/{id}/messages",
            get(messages::read).post(messages::push),
        )
        .route("/projects", get(projects::list).post(projects::create))
        .route(
            "/projects/{id}",
            get(projects::get)
                .patch(projects::change)
                .delete(projects::delete),
        )
        .route(
            "/project_settings",
            get(project_settings::list).post(project_settings::create),
        )
        .route(
            "/project_settings/{id}",
            get(project_settings::get)
                .patch(project_settings::change)
                .delete(project_settings::delete),
        )
        .method_not_allowed_fallback(async || Error::MethodNotAllowed);
    let api = Router::new()
        .nest(BASE, api)
        .fallback(async || Error::NoSuchPath)
        .with_state(app.clone())
        .layer(from_fn_with_state(app, answer));
    api.merge(beside)
}

/// Serves the routes until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    routes: Router,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // Small answers at once; if it cannot be had, they are only slower.
        let _ = connection.set_nodelay(true);
    });
    axum::serve(listener, routes)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await
}

/// Somebody who is signed in.
struct Signed(Caller);

impl FromRequestParts<App> for Signed {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let values = parts.headers.get_all(header::AUTHORIZATION);
        let values = values.iter().map(HeaderValue::as_bytes);
        Ok(Self(app.auth.caller(values).await?))
    }
}

/// Gives each call an operation id and each error its body.
async fn answer(State(app): State<App>, request: Request, next: Next) -> Response {
    let operation_id = Uuid::now_v7().to_string();
    let method: Method = request.method().clone();
    let is_http1 = request.version() < Version::HTTP_2;
    // The template, not the path, which has session ids in it.
    let path = request.extensions().get::<MatchedPath>().cloned();
    let began = Instant::now();
    let span = debug_span!(
        "REST call",
        otel.kind = "server",
        method = method.as_str(),
        path = path.as_ref().map(MatchedPath::as_str),
        status = Empty
    );
    app.auth.follow(&span, request.headers()).await;
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    span.record("status", status.as_u16());
    if status.is_client_error() || status.is_server_error() {
        let error = response.extensions_mut().remove::<Arc<Error>>();
        let reason = match &error {
            Some(error) => {
                error.log(Some(&operation_id));
                error.rest_reason()
            }
            None => status.canonical_reason().unwrap_or("error").to_owned(),
        };
        write_error(&mut response, status, reason, &operation_id);
        let body_is_unread = matches!(
            status,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT
        );
        if is_http1 && body_is_unread {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
    }
    metrics::answered("rest", metrics::class(status), began.elapsed());
    let path = path.as_ref().map_or("", MatchedPath::as_str);
    debug!(operation_id, %method, path, status = status.as_u16(), "answered");
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::try_from(operation_id) {
        headers.insert(OPERATION_ID, value);
    }
    headers.insert(SESSION_TOKENS, HeaderValue::from_static("v1"));
    response
}

fn write_error(response: &mut Response, status: StatusCode, reason: String, operation_id: &str) {
    let id = status.as_u16().to_string();
    let body = ErrorBody {
        kind: "Error".to_owned(),
        href: format!("{BASE}/errors/{id}"),
        code: format!("ambient-{id}"),
        id,
        reason,
        operation_id: operation_id.to_owned(),
    };
    let body = serde_json::to_vec(&body).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    if status == StatusCode::UNAUTHORIZED {
        let bearer = HeaderValue::from_static("Bearer");
        headers.insert(header::WWW_AUTHENTICATE, bearer);
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, RETRY_AFTER);
    }
}

/// The envelope of a list.
fn envelope<T: Serialize>(kind: &str, page: Page, listed: Listed<T>) -> axum::Json<List<T>> {
    axum::Json(List {
        kind: kind.to_owned(),
        page: page.number,
        size: u32::try_from(listed.items.len()).unwrap_or(u32::MAX),
        total: listed.total,
        items: listed.items,
    })
}
