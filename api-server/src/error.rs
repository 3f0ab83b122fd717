//! One error for everything a caller can be told, and its one map to REST and to gRPC.
//!
//! What [`Error`] displays is for the client; its `source` is for the log alone.

use std::{borrow::Cow, sync::Arc};

use ambient_shared::exit;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use tonic::{Code, Status};
use tracing::error;

/// SQLite's `SQLITE_INTERRUPT`: a query was stopped by its time limit.
const INTERRUPTED: &str = "9";

/// SQLite's `SQLITE_FULL`, and `SQLITE_IOERR_SHMSIZE` of the file beside the write-ahead log, which
/// grows with that: there is no room on the disk.
const FULL: [&str; 2] = ["13", "4874"];

/// Why a call was not answered as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Not signed in, or no longer.
    #[error("{0}")]
    Unauthenticated(Cow<'static, str>),
    /// Signed in, but not allowed.
    #[error("{0}")]
    Forbidden(Cow<'static, str>),
    /// The session exists but is somebody else's: over REST it looks as if it did not exist.
    #[error("{over_grpc}")]
    NotYours {
        /// What gRPC says.
        over_grpc: &'static str,
    },
    /// There is no such object.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// Such as `session`.
        kind: &'static str,
        /// As asked for.
        id: String,
    },
    /// There is no such path.
    #[error("no such path; the API is below {}", ambient_shared::rest::BASE)]
    NoSuchPath,
    /// The path has no such method.
    #[error("method not allowed here; the Allow header names those that are")]
    MethodNotAllowed,
    /// The request makes no sense, with the reason.
    #[error("{0}")]
    Invalid(String),
    /// There is one of that name already.
    #[error("{0}")]
    Exists(String),
    /// The session's phase does not permit it.
    #[error("{0}")]
    WrongPhase(String),
    /// Larger than we take.
    #[error("{0}")]
    TooLarge(String),
    /// The body took too long.
    #[error("the request's body did not arrive in time")]
    SlowBody,
    /// A watcher of objects did not keep up, and events had to be dropped.
    #[error("events were dropped because they were read too slowly; list, then watch again")]
    SlowWatcher,
    /// Not now.
    #[error("{0}")]
    Unavailable(&'static str),
    /// The database failed.
    #[error("{}", told(.0))]
    Database(#[from] sqlx::Error),
}

impl Error {
    /// The caller's token does not (or no longer) say who calls.
    pub(crate) fn unauthenticated(why: impl Into<Cow<'static, str>>) -> Self {
        Self::Unauthenticated(why.into())
    }

    /// The caller may not do that.
    pub(crate) fn forbidden(why: impl Into<Cow<'static, str>>) -> Self {
        Self::Forbidden(why.into())
    }

    /// There is no session of this id.
    pub(crate) fn no_session(id: &str) -> Self {
        Self::NotFound {
            kind: "session",
            id: id.to_owned(),
        }
    }

    /// The status over REST. No `_` arm: new variants must decide.
    pub(crate) fn rest_status(&self) -> StatusCode {
        match self {
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotYours { .. } | Self::NotFound { .. } | Self::NoSuchPath => {
                StatusCode::NOT_FOUND
            }
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Exists(_) | Self::WrongPhase(_) => StatusCode::CONFLICT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::SlowWatcher | Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(error) => match Trouble::of(error) {
                Trouble::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
                Trouble::Full => StatusCode::INSUFFICIENT_STORAGE,
                Trouble::Broken => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// The code over gRPC. No `_` arm: new variants must decide.
    pub(crate) fn grpc_code(&self) -> Code {
        match self {
            Self::Unauthenticated(_) => Code::Unauthenticated,
            Self::Forbidden(_) | Self::NotYours { .. } => Code::PermissionDenied,
            Self::NotFound { .. } => Code::NotFound,
            Self::NoSuchPath | Self::MethodNotAllowed => Code::Unimplemented,
            // Not RESOURCE_EXHAUSTED, which clients try again.
            Self::Invalid(_) | Self::TooLarge(_) => Code::InvalidArgument,
            Self::Exists(_) => Code::AlreadyExists,
            Self::WrongPhase(_) => Code::FailedPrecondition,
            Self::SlowBody => Code::DeadlineExceeded,
            Self::SlowWatcher => Code::Aborted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Database(error) => match Trouble::of(error) {
                Trouble::Overloaded => Code::Unavailable,
                // Nothing was stored, and it may be later: clients try again.
                Trouble::Full => Code::ResourceExhausted,
                Trouble::Broken => Code::Internal,
            },
        }
    }

    /// What REST tells the client.
    pub(crate) fn rest_reason(&self) -> String {
        match self {
            Self::NotYours { .. } => "session not found".to_owned(),
            told => told.to_string(),
        }
    }

    /// Logs what the client is not told. Only faults of ours have such a part.
    pub(crate) fn log(&self, operation_id: Option<&str>) {
        if let Self::Database(_) = self {
            error!(operation_id, reason = %exit::report(self), "call failed");
        }
    }
}

/// What a client is told of a database that failed.
fn told(error: &sqlx::Error) -> &'static str {
    match Trouble::of(error) {
        Trouble::Overloaded => "the database did not answer in time; try again, or ask for less",
        Trouble::Full => {
            "the server's disk is full: nothing can be stored; what is stored can be read"
        }
        Trouble::Broken => "the server cannot use its database",
    }
}

/// What is the matter with a database that failed.
enum Trouble {
    /// It works but is asked for too much: no connection was free in time, or the query was
    /// interrupted at its time limit.
    Overloaded,
    /// It can be read, but there is no room for more.
    Full,
    /// Anything else.
    Broken,
}

impl Trouble {
    fn of(error: &sqlx::Error) -> Self {
        let code = match error {
            sqlx::Error::PoolTimedOut => return Self::Overloaded,
            sqlx::Error::Database(error) => error.code(),
            _ => None,
        };
        match code.as_deref() {
            Some(INTERRUPTED) => Self::Overloaded,
            Some(code) if FULL.contains(&code) => Self::Full,
            _ => Self::Broken,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        error.log(None);
        Self::new(error.grpc_code(), error.to_string())
    }
}

/// The body is written by [`crate::rest`], which knows the operation's id.
impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut response = self.rest_status().into_response();
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}
