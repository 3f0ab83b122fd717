//! The admin port: `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::telemetry::MetricsPage;

/// Says whether the program is ready; if not, why in a few words.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The routes of an admin port: those of [`health`], and `/metrics` in the Prometheus text format.
pub fn routes(metrics: MetricsPage, readiness: Readiness) -> Router {
    health(readiness).route(
        "/metrics",
        get(move || {
            let page = metrics.render();
            async move {
                let content_type = "text/plain; version=0.0.4; charset=utf-8";
                ([(header::CONTENT_TYPE, content_type)], page).into_response()
            }
        }),
    )
}

/// `/healthz`, which answers 200 `ok` while the program runs, and `/readyz`: 200 `ok`, or 503 with
/// the reason. For ports that everybody reaches.
pub fn health(readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || {
                let ready = readiness();
                async move {
                    match ready {
                        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
                        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
                    }
                }
            }),
        )
}

/// Serves [`routes`] until `shutdown`, and then ends at once: a client that never finishes its
/// request must not hold up the program.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    tokio::select! {
        served = axum::serve(listener, routes) => served,
        () = shutdown.cancelled() => Ok(()),
    }
}
