//! Counts and times each gRPC call, and makes it a span.

use std::{
    mem,
    task::{Context, Poll},
    time::Instant,
};

use futures_util::future::BoxFuture;
use tonic::{Code, body::Body};
use tower::{Layer, Service};
use tracing::{Instrument as _, debug_span, field::Empty};

use crate::{App, metrics};

/// Puts [`Counted`] around the services.
#[derive(Clone)]
pub(super) struct CountCalls(pub(super) App);

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, services: S) -> Counted<S> {
        Counted {
            services,
            app: self.0.clone(),
        }
    }
}

/// Services whose calls are counted.
#[derive(Clone)]
pub(super) struct Counted<S> {
    services: S,
    app: App,
}

impl<S, B> Service<http::Request<B>> for Counted<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.services.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let began = Instant::now();
        let span = debug_span!(
            "gRPC call",
            otel.kind = "server",
            call = name(request.uri().path()),
            code = Empty
        );
        // Those that are ready are called; a clone may not be.
        let next = self.services.clone();
        let mut services = mem::replace(&mut self.services, next);
        let app = self.app.clone();
        Box::pin(async move {
            app.auth.follow(&span, request.headers()).await;
            let answer = services.call(request).instrument(span.clone()).await?;
            // An error stands in the head of its answer; what a stream meets later does not.
            let code = answer.headers().get("grpc-status");
            let code = code.map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
            let code = format!("{code:?}");
            span.record("code", &code);
            metrics::answered("grpc", code, began.elapsed());
            Ok(answer)
        })
    }
}

/// The method of a path such as `/ambient.v1.SessionService/GetSession`. Others write what they
/// like, so what is no name is none.
fn name(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_name = name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphanumeric());
    if is_name { name } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_methods_have_names() {
        assert_eq!(name("/ambient.v1.SessionService/GetSession"), "GetSession");
        assert_eq!(name("/ambient.v1.SessionService/Get%2F1"), "");
        assert_eq!(name(&format!("/x/{}", "a".repeat(41))), "");
    }
}
