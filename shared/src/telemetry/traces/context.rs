//! Traces that go on in the program that is called, by the header `traceparent`.

use http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Tells the called program of this span, when it is exported.
pub fn tell(span: &Span, headers: &mut HeaderMap) {
    if !span.is_disabled() {
        TraceContextPropagator::new().inject_context(&span.context(), &mut HeaderInjector(headers));
    }
}

/// Whether there is anything to [`follow`]: the caller told of a span, and this one is exported.
pub fn is_told(span: &Span, headers: &HeaderMap) -> bool {
    !span.is_disabled() && headers.contains_key("traceparent")
}

/// Makes a span, which nobody has entered yet, a child of that of which the caller told, when it is
/// exported. The caller then decides whether it is: this is for callers who may.
pub fn follow(span: &Span, headers: &HeaderMap) {
    if is_told(span, headers) {
        let caller = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        // An error means that nobody exports it.
        let _ = span.set_parent(caller);
    }
}
