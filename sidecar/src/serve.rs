//! One loopback port: connections, their bounds, and their end.
//!
//! In: a listener and a [`Handler`]. It speaks HTTP/1.1 and HTTP/2 (without TLS, told apart by the
//! first bytes). After the wish to end, it goes on taking connections until no request is under
//! way: who is in the middle of its work may still need the port.

mod places;

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use ambient_shared::exit;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use metrics::{counter, gauge};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::metrics as names;
use places::{IDLE, Places};

/// Any error.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of an answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Longest time that requests under way get after the wish to end. Less than the 30 s after which
/// Kubernetes kills by default.
pub(crate) const DRAIN: Duration = Duration::from_secs(20);

/// How long connections get to say good-bye.
const CLOSE: Duration = Duration::from_secs(2);

/// Most requests at once on one HTTP/2 connection (RFC 9113, section 6.5.2, asks for at least 100).
const MOST_STREAMS: u32 = 100;

/// Most bytes of a request's head: a token of 64 KiB, which a client may send, and as much again.
const MAX_HEAD: usize = 128 * 1024;

/// Flow-control window of HTTP/2: bytes in memory that one connection can hold.
const WINDOW: u32 = 256 * 1024;

/// How often a silent HTTP/2 connection is pinged, and how long an answer may take.
const PING: Duration = Duration::from_secs(30);

/// Pause when the system has no file descriptor left for a connection.
const AFTER_ACCEPT_ERROR: Duration = Duration::from_millis(100);

/// Answers the requests of one port.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers one request, whatever it is.
    fn handle(
        &self,
        request: Request<Incoming>,
        connection: &Connection,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// A body of one piece.
pub(crate) fn full(content: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(content.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// What a handler may do with the connection its request came on.
#[derive(Clone)]
pub(crate) struct Connection {
    activity: Activity,
    places: Places,
    tunnel: Arc<Mutex<Option<Tunnel>>>,
}

type Tunnel = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Connection {
    /// Runs `tunnel` on this connection once the answer that changes its protocol is sent.
    pub(crate) fn then(&self, tunnel: impl Future<Output = ()> + Send + 'static) {
        let busy = self.activity.begin();
        let tunnel = Box::pin(async move {
            tunnel.await;
            drop(busy);
        });
        *self.tunnel.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }

    fn take_tunnel(&self) -> Option<Tunnel> {
        self.tunnel
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Counts requests under way: those of a connection, and those of the port.
#[derive(Clone)]
struct Activity {
    port_of: &'static str,
    connection: Arc<watch::Sender<usize>>,
    port: Arc<watch::Sender<usize>>,
}

/// One request under way, until it is dropped.
struct Busy(Activity);

impl Activity {
    fn begin(&self) -> Busy {
        gauge!(names::IN_FLIGHT, "port" => self.port_of).increment(1.0);
        self.connection.send_modify(|count| *count += 1);
        self.port.send_modify(|count| *count += 1);
        Busy(self.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        gauge!(names::IN_FLIGHT, "port" => self.0.port_of).decrement(1.0);
        self.0.connection.send_modify(|count| *count -= 1);
        self.0.port.send_modify(|count| *count -= 1);
    }
}

/// Returns once no request is under way.
async fn none_under_way(count: &watch::Sender<usize>) {
    let _ = count.subscribe().wait_for(|count| *count == 0).await;
}

/// One port.
pub(crate) struct Server<H> {
    port_of: &'static str,
    listener: TcpListener,
    handler: Arc<H>,
}

impl<H: Handler> Server<H> {
    /// Serves `handler` on `listener`; `port_of` is the port's name in logs and metrics.
    pub(crate) fn new(port_of: &'static str, listener: TcpListener, handler: H) -> Self {
        Self {
            port_of,
            listener,
            handler: Arc::new(handler),
        }
    }

    /// Serves until `shutdown`, and then on until no request is under way, at most [`DRAIN`].
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let under_way = Arc::new(watch::Sender::new(0));
        let places = Places::new();
        let close = CancellationToken::new();
        let mut connections = JoinSet::new();

        let drained = async {
            shutdown.cancelled().await;
            if timeout(DRAIN, none_under_way(&under_way)).await.is_err() {
                let requests = *under_way.borrow();
                warn!(
                    port_of = self.port_of,
                    requests, "requests did not end in time"
                );
            }
        };
        let mut drained = pin!(drained);
        loop {
            tokio::select! {
                (stream, place) = accept(&self.listener, &places) => {
                    let connection = Connection {
                        activity: Activity {
                            port_of: self.port_of,
                            connection: Arc::new(watch::Sender::new(0)),
                            port: Arc::clone(&under_way),
                        },
                        places: places.clone(),
                        tunnel: Arc::default(),
                    };
                    let handler = Arc::clone(&self.handler);
                    let close = close.clone();
                    connections.spawn(serve(stream, handler, connection, close, place));
                }
                Some(_) = connections.join_next() => {}
                () = &mut drained => break,
            }
        }
        drop(self.listener);
        close.cancel();
        let all_closed = async { while connections.join_next().await.is_some() {} };
        let _ = timeout(CLOSE, all_closed).await;
        connections.shutdown().await;
    }
}

async fn accept(listener: &TcpListener, places: &Places) -> (TcpStream, OwnedSemaphorePermit) {
    let place = places.take().await;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) if is_the_peers(&error) => {}
            Err(error) => {
                warn!(reason = %error, "cannot accept a connection");
                sleep(AFTER_ACCEPT_ERROR).await;
            }
        }
    }
}

fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
    )
}

async fn serve<H: Handler>(
    stream: TcpStream,
    handler: Arc<H>,
    connection: Connection,
    close: CancellationToken,
    _place: OwnedSemaphorePermit,
) {
    let port_of = connection.activity.port_of;
    let open = gauge!(names::CONNECTIONS, "port" => port_of);
    open.increment(1.0);
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| {
        let busy = connection.activity.begin();
        counter!(names::REQUESTS, "port" => port_of).increment(1);
        let handler = Arc::clone(&handler);
        let connection = connection.clone();
        async move {
            let is_http1 = request.version() < Version::HTTP_2;
            let mut answer = handler.handle(request, &connection).await;
            let changes_protocol = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
            if is_http1 && !changes_protocol && connection.places.is_crowded() {
                // So that the client does not send the next request while we close.
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(answer.map(|body| Counted { body, _busy: busy }))
        }
    });
    let served = {
        let builder = builder();
        let mut served =
            pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        tokio::select! {
            // First what the client has sent: on a busy machine it may have waited here for longer
            // than the connection may be idle.
            biased;
            ended = served.as_mut() => ended,
            () = close.cancelled() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
            () = connection.places.is_wanted_back(&connection.activity.connection) => {
                served.as_mut().graceful_shutdown();
                // A request may have begun in the last moment: it is finished.
                let finished = async {
                    sleep(CLOSE).await;
                    none_under_way(&connection.activity.connection).await;
                };
                tokio::select! {
                    ended = served.as_mut() => ended,
                    () = finished => Ok(()),
                }
            }
        }
    };
    if let Err(error) = served {
        debug!(port_of, reason = %exit::report(&*error), "connection broke");
    }
    if let Some(tunnel) = connection.take_tunnel() {
        tunnel.await;
    }
    open.decrement(1.0);
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MOST_STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    builder
}

/// A body during whose sending the request counts as under way.
struct Counted {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
