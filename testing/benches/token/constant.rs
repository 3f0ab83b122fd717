//! The HTTP server of the token endpoint with nothing behind it: the same library, settings and
//! runtime, in a process of its own, and an answer as long as one with a token.

use std::{convert::Infallible, net::SocketAddr};

use ambient_shared::telemetry;
use ambient_testing::programs::{Program, Running};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};

/// Starts it.
pub(crate) async fn start() -> (Running, SocketAddr) {
    let exe = std::env::current_exe().expect("a program knows its own path");
    let mut server = Program::at(exe).arg("--constant").start();
    let address = server.listening("constant").await;
    (server, address)
}

/// Is it.
pub(crate) async fn serve() {
    telemetry::init_logs(telemetry::LogFormat::Json, "info").expect("logs");
    // As long as a minted token.
    let answer = format!(
        r#"{{"token":"{}","expires_at":"2030-01-01T00:00:00Z"}}"#,
        "x".repeat(620)
    );
    let answer = Bytes::from(answer);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let address = listener.local_addr().expect("an address");
    tracing::info!(%address, port_of = "constant", "listening");
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let (stream, _) = accepted.expect("a connection");
                let _ = stream.set_nodelay(true);
                let answer = answer.clone();
                connections.spawn(async move {
                    let service = service_fn(|_: Request<Incoming>| {
                        let answer = constant(answer.clone());
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    let _ = http1::Builder::new()
                        .header_read_timeout(None)
                        .max_buf_size(16 * 1024)
                        .max_headers(100)
                        .half_close(true)
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        }
    }
}

fn constant(body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
