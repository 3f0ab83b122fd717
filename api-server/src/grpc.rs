//! gRPC (contract section 4): the services, health and reflection.

mod calls;
mod messages;
mod project_settings;
mod projects;
mod sessions;

use std::{pin::Pin, time::Duration};

use ambient_shared::{
    api::MAX_MESSAGE,
    proto::{
        DESCRIPTORS, ListMeta, project_service_server::ProjectServiceServer,
        project_settings_service_server::ProjectSettingsServiceServer,
        session_service_server::SessionServiceServer,
    },
};
use futures_util::{Stream, StreamExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Response, Status,
    metadata::{MetadataMap, MetadataValue},
    transport::{Server, server::TcpIncoming},
};

use self::{
    calls::CountCalls, project_settings::ProjectSettingsGrpc, projects::ProjectsGrpc,
    sessions::SessionsGrpc,
};
use crate::{
    App,
    auth::access::Caller,
    error::Error,
    store::{Listed, Page},
};

/// How often a silent connection is pinged, and how long a ping may stay unanswered: so long a
/// watcher that is gone costs memory.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(20);

/// Most calls at once on one connection: a control plane may follow thousands of sessions.
const MAX_STREAMS: u32 = 8192;

/// Page size when none is asked for, or more than [`MAX_PAGE_SIZE`] (contract section 4).
const DEFAULT_PAGE_SIZE: u32 = 20;
const MAX_PAGE_SIZE: u32 = 500;

/// Why gRPC cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The descriptors for reflection are broken.
    #[error("cannot serve reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The listener broke.
    #[error("cannot serve gRPC")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves all services until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let calls = CountCalls(app.clone());
    let sessions =
        SessionServiceServer::new(SessionsGrpc(app.clone())).max_decoding_message_size(MAX_MESSAGE);
    let projects = ProjectServiceServer::new(ProjectsGrpc(app.clone()));
    let project_settings = ProjectSettingsServiceServer::new(ProjectSettingsGrpc(app));
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_serving::<SessionServiceServer<SessionsGrpc>>()
        .await;
    reporter
        .set_serving::<ProjectServiceServer<ProjectsGrpc>>()
        .await;
    reporter
        .set_serving::<ProjectSettingsServiceServer<ProjectSettingsGrpc>>()
        .await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_LIMIT))
        .max_concurrent_streams(MAX_STREAMS)
        .layer(calls)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(sessions)
        .add_service(projects)
        .add_service(project_settings)
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            shutdown.cancelled_owned(),
        )
        .await?;
    Ok(())
}

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Who sent this metadata.
async fn caller(app: &App, metadata: &MetadataMap) -> Result<Caller, Error> {
    let values = metadata.get_all("authorization").iter();
    app.auth.caller(values.map(MetadataValue::as_bytes)).await
}

/// A stream that ends when the caller's token or the server does.
fn answers<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    stream: impl Stream<Item = Result<T, Error>> + Send + 'static,
) -> Response<Answers<T>> {
    let stream = app.ends.of(stream, caller.expires_at);
    Response::new(Box::pin(stream.map(|answer| answer.map_err(Status::from))))
}

/// The page that a list asks for.
fn page(number: i32, size: i32) -> Page {
    let asked = u32::try_from(size).unwrap_or_default();
    Page {
        number: u32::try_from(number).unwrap_or_default().max(1),
        size: if (1..=MAX_PAGE_SIZE).contains(&asked) {
            asked
        } else {
            DEFAULT_PAGE_SIZE
        },
    }
}

/// What is said about a page, `size` being the number of items on it.
#[expect(clippy::unnecessary_wraps, reason = "the generated field is an option")]
fn list_meta<T>(page: Page, listed: &Listed<T>) -> Option<ListMeta> {
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    Some(ListMeta {
        page: number(page.number),
        size: i32::try_from(listed.items.len()).unwrap_or(i32::MAX),
        total: number(listed.total),
    })
}
