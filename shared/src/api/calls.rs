//! Calls of the API server: each is counted, timed and a span.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use metrics::{counter, histogram};
use tokio::time::Instant;
use tonic::{
    Code,
    body::Body,
    transport::{Channel, Error},
};
use tower::Service;
use tracing::{Instrument as _, Span, debug_span, field::Empty};

use crate::telemetry;

/// Counter, labels `call` and `code`: calls of the API server, by gRPC code or HTTP status; `none`
/// when there was no answer.
pub const CALLS: &str = "ambient_api_calls_total";
/// Histogram, label `call`: how long an answer took, in seconds; of a stream, until it began.
pub const CALL_SECONDS: &str = "ambient_api_call_duration_seconds";

/// Counts a call when it ends, in whatever way: by an answer, an error, or by being dropped at a
/// deadline.
#[derive(Debug)]
pub struct Call {
    name: String,
    began: Instant,
    code: Option<String>,
    span: Span,
}

impl Call {
    /// A call that begins now. `name` is that of a method, or an HTTP method and the template of a
    /// path: never with an id in it.
    pub fn begin(name: impl Into<String>) -> Self {
        let name = name.into();
        let span = debug_span!(
            "API call",
            otel.kind = "client",
            call = name,
            code = Empty,
            otel.status_code = Empty
        );
        Self {
            name,
            began: Instant::now(),
            code: None,
            span,
        }
    }

    /// Its span.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// It was answered with this code.
    pub fn answered(mut self, code: String) {
        self.code = Some(code);
    }

    fn took(&self) -> Duration {
        self.began.elapsed()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = self.code.take().unwrap_or_else(|| "none".to_owned());
        self.span.record("code", &code);
        if !matches!(code.as_str(), "Ok" | "200") {
            self.span.record("otel.status_code", "ERROR");
        }
        histogram!(CALL_SECONDS, "call" => self.name.clone()).record(self.took());
        counter!(CALLS, "call" => std::mem::take(&mut self.name), "code" => code).increment(1);
    }
}

/// A channel whose calls are counted.
#[derive(Clone, Debug)]
pub struct Counted(pub(super) Channel);

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Error>> + Send>>;

impl Service<http::Request<Body>> for Counted {
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Answer {
        // Of `/ambient.v1.SessionService/GetSession` the last: no two are the same.
        let path = request.uri().path();
        let call = Call::begin(path.rsplit('/').next().unwrap_or_default());
        telemetry::tell(call.span(), request.headers_mut());
        let answer = self.0.call(request);
        let span = call.span().clone();
        Box::pin(
            async move {
                let answer = answer.await?;
                // What fails after its answer began says so at the end, which is for its reader.
                let code = answer.headers().get("grpc-status");
                let code = code.map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
                call.answered(format!("{code:?}"));
                Ok(answer)
            }
            .instrument(span),
        )
    }
}
