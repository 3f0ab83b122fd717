//! The session API over gRPC, with a bearer that is always the latest.
//!
//! In: a channel and a `watch` with the current [`Token`]. Out: typed clients. Each call reads the
//! token when it starts, so a refresh needs no new connection; a stream that is open goes on with
//! the token it started with until the server ends it.

mod calls;

use tokio::sync::watch;
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{
    proto::{
        project_service_client::ProjectServiceClient,
        project_settings_service_client::ProjectSettingsServiceClient,
        session_service_client::SessionServiceClient,
    },
    retry::Retry,
    token::Token,
};

/// Metadata by which a pushed message is known, so that a repeat is stored once (contract
/// section 4).
pub const MESSAGE_ID: &str = "ambient-message-id";

/// Largest message in either direction, in bytes: a payload of 1 MiB (contract section 5), its
/// escapes and its envelope.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;

pub use calls::{CALL_SECONDS, CALLS, Call, Counted};

/// A channel whose calls carry the current token, and are counted.
pub type Authorized = InterceptedService<Counted, BearerInterceptor>;

/// Adds `authorization: Bearer <token>` to each call.
#[derive(Clone, Debug)]
pub struct BearerInterceptor {
    token: watch::Receiver<Option<Token>>,
}

impl Interceptor for BearerInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let value = match &*self.token.borrow() {
            Some(token) => MetadataValue::try_from(token.authorization().as_bytes()),
            // The server will say UNAUTHENTICATED, which callers handle anyway.
            None => return Err(Status::unauthenticated("no token yet")),
        };
        let mut value = value.map_err(|_| Status::internal("token is not a header value"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

/// Typed clients of one API server.
#[derive(Clone, Debug)]
pub struct Api {
    channel: Channel,
    token: watch::Receiver<Option<Token>>,
}

impl Api {
    /// Calls over `channel` with the latest token of `token`.
    pub fn new(channel: Channel, token: watch::Receiver<Option<Token>>) -> Self {
        Self { channel, token }
    }

    /// Sessions and their messages.
    pub fn sessions(&self) -> SessionServiceClient<Authorized> {
        SessionServiceClient::new(self.authorized())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Projects.
    pub fn projects(&self) -> ProjectServiceClient<Authorized> {
        ProjectServiceClient::new(self.authorized())
    }

    /// Project settings.
    pub fn project_settings(&self) -> ProjectSettingsServiceClient<Authorized> {
        ProjectSettingsServiceClient::new(self.authorized())
    }

    fn authorized(&self) -> Authorized {
        InterceptedService::new(
            Counted(self.channel.clone()),
            BearerInterceptor {
                token: self.token.clone(),
            },
        )
    }
}

/// What a retry loop does after a gRPC status.
///
/// `UNAUTHENTICATED` counts as brief: a fresh token mends it, but not for ever. `ABORTED` is how
/// our server ends a watcher that was too slow: it lists again.
pub fn retry_of(status: &Status) -> Retry {
    use tonic::Code;
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => Retry::Briefly,
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unknown
        | Code::Cancelled
        | Code::DataLoss
        | Code::Ok => Retry::Backoff,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented => Retry::Never,
    }
}
