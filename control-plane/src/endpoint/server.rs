//! Connections of the token endpoint, and their limits.
//!
//! HTTP/1.1 only: a request is one small head. A connection that sends nothing, or a head slowly,
//! is closed; when many are open, each is closed after one answer, so that whoever comes next,
//! health checks among them, is served.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::gauge;
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinError, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::routes::Routes;
use crate::metrics::CONNECTIONS;

/// Most connections at a time; more wait in the system's backlog. With [`MAX_HEAD`] at most
/// 256 MiB of buffers.
const MAX_CONNECTIONS: usize = 4096;

/// Connections from which on none is kept open for a second request.
const BUSY_CONNECTIONS: usize = MAX_CONNECTIONS / 4 * 3;

/// Largest head of a request, in bytes: a ciphertext of an 8192-bit key is 1,368 characters, and
/// proxies add headers of their own.
const MAX_HEAD: usize = 64 * 1024;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// Longest wait for a whole head, idle time before it included.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

/// Longest life of a connection: one that takes its answers too slowly must not stay for ever.
const MAX_LIFE: Duration = Duration::from_mins(5);

/// Longest wait for a connection to end in order: the slowest answer is one that waits for the
/// identity provider.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Wait after a failed `accept`: too many open files pass, but not at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(super) async fn serve(listener: TcpListener, routes: Arc<Routes>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    let open = gauge!(CONNECTIONS);
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next() => {
                open.decrement(1.0);
                report(ended);
            }
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                match accepted {
                    Ok((stream, peer)) => {
                        let connection = Connection {
                            routes: Arc::clone(&routes),
                            keep_alive: connections.len() < BUSY_CONNECTIONS,
                            shutdown: shutdown.clone(),
                        };
                        open.increment(1.0);
                        connections.spawn(connection.run(stream, peer));
                    }
                    Err(failure) => pause_after(&failure).await,
                }
            }
        }
    }
    drop(listener);
    let all_ended = async {
        while let Some(ended) = connections.join_next().await {
            open.decrement(1.0);
            report(ended);
        }
    };
    if timeout(DRAIN_LIMIT, all_ended).await.is_err() {
        warn!("token requests did not end in time and were cut off");
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(failure) = ended
        && failure.is_panic()
    {
        error!(error = %failure, "a connection's task panicked");
    }
}

/// A connection that broke before it was accepted is its client's matter; anything else is ours.
async fn pause_after(failure: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    let kind = failure.kind();
    if !matches!(
        kind,
        ConnectionAborted | ConnectionRefused | ConnectionReset
    ) {
        warn!(error = %failure, "cannot accept a connection");
        sleep(ACCEPT_PAUSE).await;
    }
}

struct Connection {
    routes: Arc<Routes>,
    keep_alive: bool,
    shutdown: CancellationToken,
}

impl Connection {
    async fn run(self, stream: TcpStream, peer: SocketAddr) {
        // A failure costs latency only.
        let _ = stream.set_nodelay(true);
        let source = peer.ip().to_canonical();
        let routes = self.routes;
        let service = service_fn(move |request| {
            let routes = Arc::clone(&routes);
            async move { Ok::<_, Infallible>(routes.answer(source, &request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .keep_alive(self.keep_alive)
            // A client may close its sending side after its one request.
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.shutdown.cancelled() => drain(connection).await,
            () = sleep(MAX_LIFE) => drain(connection).await,
        };
        if let Err(failure) = ended {
            debug!(error = %failure, "connection of the token endpoint broke");
        }
    }
}

/// Lets the request that is under way end.
async fn drain<S>(
    mut connection: std::pin::Pin<&mut http1::Connection<TokioIo<TcpStream>, S>>,
) -> hyper::Result<()>
where
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = super::answer::Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    connection.as_mut().graceful_shutdown();
    timeout(DRAIN_LIMIT, connection).await.unwrap_or(Ok(()))
}
