//! One connection: its handshake, its requests, and the moment at which it must end.
//!
//! One timer serves all limits and is set when it must be, not with each request.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::{
    ConnectionLimits, DRAIN_LIMIT, LAST_HEAD, MAX_HEAD, MAX_HEADERS,
    seats::{Doing, Seat},
};
use crate::endpoint::routes::Routes;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// In order, by either side.
    Done,
    /// The client broke it off.
    Broken,
    /// What came was no HTTP/1.1, or too much of it.
    Malformed,
    /// The client and we did not agree on TLS.
    Handshake,
    /// The head was not complete in time.
    HeadLate,
    /// Nothing came after an answer.
    Idle,
    /// It was open for too long.
    Life,
    /// It waited for a head when others needed its place.
    MadeRoom,
    /// The program ends.
    Shutdown,
    /// There was no descriptor for it.
    NoDescriptor,
}

impl End {
    /// For metrics.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Broken => "broken",
            Self::Malformed => "malformed",
            Self::Handshake => "handshake",
            Self::HeadLate => "head_late",
            Self::Idle => "idle",
            Self::Life => "life",
            Self::MadeRoom => "made_room",
            Self::Shutdown => "shutdown",
            Self::NoDescriptor => "no_descriptor",
        }
    }
}

/// A connection that was accepted.
pub(super) struct Connection {
    pub(super) routes: Arc<Routes>,
    pub(super) source: IpAddr,
    pub(super) seat: Arc<Seat>,
    pub(super) limits: ConnectionLimits,
    /// Beyond all places: only health is answered.
    pub(super) is_crowded: bool,
    pub(super) tls: Option<Arc<ServerConfig>>,
}

impl Connection {
    /// Serves it to its end.
    pub(super) async fn run(mut self, stream: TcpStream) -> End {
        // A failure costs latency only.
        let _ = stream.set_nodelay(true);
        let mut watch = Watch::new(Arc::clone(&self.seat), self.limits);
        let Some(tls) = self.tls.take() else {
            return self.serve(stream, watch).await;
        };
        let mut handshake = pin!(TlsAcceptor::from(tls).accept(stream));
        let shaken = poll_fn(|cx| match handshake.as_mut().poll(cx) {
            Poll::Ready(shaken) => Poll::Ready(shaken.map_err(|error| {
                debug!(%error, "no TLS with a client of the token endpoint");
                End::Handshake
            })),
            Poll::Pending => watch.poll(cx).map(|notice| Err(notice.end())),
        });
        match shaken.await {
            Ok(stream) => self.serve(stream, watch).await,
            Err(end) => end,
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin, mut watch: Watch) -> End {
        let stream = Heard {
            stream,
            seat: Arc::clone(&self.seat),
        };
        let keep_alive = !self.is_crowded;
        let connection = Arc::new(self);
        let service = service_fn(|request| {
            let connection = Arc::clone(&connection);
            async move {
                connection.seat.asked();
                let routes = &connection.routes;
                let answer = routes.answer(connection.source, &request, connection.is_crowded);
                let answer = answer.await;
                connection.seat.answered();
                Ok::<_, Infallible>(answer)
            }
        });
        let served = http1::Builder::new()
            // Ours, see `Watch`.
            .header_read_timeout(None)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .keep_alive(keep_alive)
            // A client may close its sending side after its one request.
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service);
        let mut served = pin!(served);
        poll_fn(|cx| {
            loop {
                if let Poll::Ready(ended) = served.as_mut().poll(cx) {
                    return Poll::Ready(watch.cause().unwrap_or_else(|| end_of(ended)));
                }
                match ready!(watch.poll(cx)) {
                    Notice::Ends(end) => return Poll::Ready(end),
                    // Lets the request that is under way end.
                    Notice::Drains(_) => served.as_mut().graceful_shutdown(),
                }
            }
        })
        .await
    }
}

fn end_of(ended: hyper::Result<()>) -> End {
    let Err(error) = ended else {
        return End::Done;
    };
    debug!(%error, "connection of the token endpoint broke");
    if error.is_parse() {
        End::Malformed
    } else {
        End::Broken
    }
}

/// What a connection is told.
enum Notice {
    /// At once.
    Ends(End),
    /// After the request that is under way.
    Drains(End),
}

impl Notice {
    fn end(self) -> End {
        match self {
            Self::Ends(end) | Self::Drains(end) => end,
        }
    }
}

/// Looks after a connection's limits and its place.
struct Watch {
    seat: Arc<Seat>,
    limits: ConnectionLimits,
    timer: Pin<Box<Sleep>>,
    /// When it ends whatever it does.
    ends_at: Instant,
    /// Why it takes no more requests, and until when a head that has begun may come.
    draining: Option<(End, Instant)>,
}

impl Watch {
    fn new(seat: Arc<Seat>, limits: ConnectionLimits) -> Self {
        Self {
            timer: Box::pin(sleep_until(seat.began() + limits.head)),
            ends_at: seat.began() + limits.life,
            seat,
            limits,
            draining: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Notice> {
        self.seat.wake_with(cx.waker());
        if self.draining.is_none() && self.seat.drains() {
            return Poll::Ready(self.drains(End::Shutdown));
        }
        loop {
            let Some((at, end)) = self.next_end() else {
                return Poll::Ready(Notice::Ends(End::MadeRoom));
            };
            if at < self.timer.deadline() {
                self.timer.as_mut().reset(at);
            }
            ready!(self.timer.as_mut().poll(cx));
            if at > Instant::now() {
                // It did something since the timer was set.
                self.timer.as_mut().reset(at);
            } else if end == End::Life && self.draining.is_none() {
                return Poll::Ready(self.drains(end));
            } else {
                return Poll::Ready(Notice::Ends(end));
            }
        }
    }

    /// When and why it ends if it does nothing more; none when it has lost its place.
    fn next_end(&self) -> Option<(Instant, End)> {
        let last = (self.ends_at, self.cause().unwrap_or(End::Life));
        let (doing, since) = self.seat.doing();
        let limit = match doing {
            Doing::Head => (since + self.limits.head, End::HeadLate),
            Doing::Idle => (since + self.limits.idle, End::Idle),
            Doing::Answer => return Some(last),
            Doing::Left => return None,
        };
        let drained = self.draining.map_or(last, |(end, at)| (at, end));
        [limit, drained, last].into_iter().min_by_key(|(at, _)| *at)
    }

    fn cause(&self) -> Option<End> {
        self.draining.map(|(end, _)| end)
    }

    fn drains(&mut self, end: End) -> Notice {
        let now = Instant::now();
        self.draining = Some((end, now + LAST_HEAD));
        self.ends_at = now + DRAIN_LIMIT;
        Notice::Drains(end)
    }
}

/// A stream that tells the connection's place when something comes.
struct Heard<S> {
    stream: S,
    seat: Arc<Seat>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.seat.heard();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
