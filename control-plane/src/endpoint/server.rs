//! Connections of the token endpoint, and their limits.
//!
//! HTTP/1.1 only: a request is one small head. A connection that sends nothing, or a head slowly,
//! is closed in time; and when all places are taken, or the process has no descriptor left, at
//! once for whoever comes next. So those who do not ask never keep out those who do, health checks
//! among them.

use std::{fs::File, io, net::IpAddr, sync::Arc, time::Duration};

use ambient_shared::harden;
use futures_util::FutureExt as _;
use metrics::{Gauge, counter, gauge};
use rustix::io::Errno;
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use self::{
    connection::{Connection, End},
    seats::{Seat, Seats},
};
use super::{answer, limits::network, routes::Routes};
use crate::metrics::{ACCEPT_FAILURES, CONNECTIONS, CONNECTIONS_CLOSED};

mod connection;
mod seats;

/// Most connections at a time, however many descriptors there are. With [`MAX_HEAD`] at most
/// 64 MiB of buffers.
const MAX_PLACES: usize = 4096;

/// Places beyond those, for who comes while everybody in one is being answered: one request each,
/// which is told that it is too much, or is about our health and answered as ever.
const CROWD: usize = 64;

/// Largest head of a request, in bytes: a ciphertext of an 8192-bit key is 1,368 characters, and
/// proxies add headers of their own.
const MAX_HEAD: usize = 16 * 1024;

/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// Longest wait for a connection to end in order: the slowest answer is one that waits for the
/// identity provider.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait, then, for the rest of a head.
const LAST_HEAD: Duration = Duration::from_secs(1);

/// Longest wait after a failed `accept`: too few descriptors pass, but not at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Time between two lines that say so.
const COMPLAINT_EVERY: Duration = Duration::from_secs(10);

/// Connections that the system keeps until they are accepted, as far as it allows
/// (`net.core.somaxconn`): room for a burst, as a client whose first packet is dropped waits a
/// second before the next.
const BACKLOG: u32 = 4096;

/// Limits of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most connections at a time.
    pub places: usize,
    /// Longest wait for a whole head, from the connection on or from its first byte after an
    /// earlier answer. A handshake is part of it.
    pub head: Duration,
    /// Longest wait for the first byte after an answer. Longer than proxies keep connections, 60 s
    /// as a rule, so that it is they who close.
    pub idle: Duration,
    /// Longest life of a connection: one that takes its answers too slowly must not stay for ever.
    pub life: Duration,
}

impl Default for ConnectionLimits {
    /// At most half of the descriptors that this process may have: the rest of it needs some too.
    fn default() -> Self {
        let half = usize::try_from(harden::open_files() / 2).unwrap_or(usize::MAX);
        Self {
            places: half.clamp(1, MAX_PLACES),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            life: Duration::from_mins(5),
        }
    }
}

/// Binds an address as `TcpListener::bind` does, with room for more who wait.
pub(super) fn listen(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts connections and gives them places.
pub(super) struct Server {
    listener: TcpListener,
    tls: Option<watch::Receiver<Arc<ServerConfig>>>,
    routes: Arc<Routes>,
    limits: ConnectionLimits,
    seats: Seats,
    crowd: Seats,
    connections: JoinSet<End>,
    open: Gauge,
    /// Given up to take, and end, a connection for which there is no descriptor.
    spare: Option<File>,
    complained: Option<Instant>,
}

impl Server {
    pub(super) fn new(
        listener: TcpListener,
        tls: Option<watch::Receiver<Arc<ServerConfig>>>,
        routes: Routes,
        limits: ConnectionLimits,
    ) -> Self {
        Self {
            listener,
            tls,
            routes: Arc::new(routes),
            limits,
            seats: Seats::new(limits.places),
            crowd: Seats::new(CROWD),
            connections: JoinSet::new(),
            open: gauge!(CONNECTIONS),
            spare: spare(),
            complained: None,
        }
    }

    /// Serves until `shutdown`, then lets requests that have begun end.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        // Those who have lost their places end in a moment.
        let most = self.limits.places + 2 * CROWD;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = self.connections.join_next_with_id() => self.ended(&ended),
                accepted = self.listener.accept(), if self.connections.len() < most => {
                    match accepted {
                        Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical()),
                        Err(failure) => self.cannot_accept(&failure).await,
                    }
                }
            }
        }
        self.drain().await;
    }

    fn admit(&mut self, stream: TcpStream, source: IpAddr) {
        let network = network(source);
        let is_crowded = !self.seats.have_room_for(network);
        if is_crowded {
            // There is: nobody there is busy for long.
            self.crowd.have_room_for(network);
        }
        let seat = Arc::new(Seat::new(network, Instant::now()));
        let connection = Connection {
            routes: Arc::clone(&self.routes),
            source,
            seat: Arc::clone(&seat),
            limits: self.limits,
            is_crowded,
            tls: self.tls.as_ref().map(|tls| Arc::clone(&tls.borrow())),
        };
        self.open.increment(1.0);
        let task = self.connections.spawn(connection.run(stream));
        let seats = if is_crowded {
            &mut self.crowd
        } else {
            &mut self.seats
        };
        seats.take(task.id(), seat);
    }

    fn ended(&mut self, ended: &Result<(Id, End), JoinError>) {
        self.open.decrement(1.0);
        let (task, cause) = match ended {
            Ok((task, end)) => (*task, end.label()),
            Err(failure) => {
                error!(error = %failure, "a connection's task panicked");
                (failure.id(), "panic")
            }
        };
        self.seats.free(task);
        self.crowd.free(task);
        counter!(CONNECTIONS_CLOSED, "cause" => cause).increment(1);
    }

    /// A connection that broke before it was accepted is its client's matter; anything else is
    /// ours.
    async fn cannot_accept(&mut self, failure: &io::Error) {
        use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
        let kind = failure.kind();
        if matches!(
            kind,
            ConnectionAborted | ConnectionRefused | ConnectionReset
        ) {
            return;
        }
        let of_descriptors = matches!(
            Errno::from_io_error(failure),
            Some(Errno::MFILE | Errno::NFILE)
        );
        let cause = if of_descriptors {
            "descriptors"
        } else {
            "other"
        };
        counter!(ACCEPT_FAILURES, "cause" => cause).increment(1);
        self.complain(failure);
        let left = if of_descriptors {
            self.seats.make_room(None) + self.crowd.make_room(None)
        } else {
            0
        };
        if left > 0 {
            // The place is free when its task has ended.
            let ended = timeout(ACCEPT_PAUSE, self.connections.join_next_with_id());
            if let Ok(Some(ended)) = ended.await {
                self.ended(&ended);
            }
        } else if !(of_descriptors && self.turn_away()) {
            sleep(ACCEPT_PAUSE).await;
        }
    }

    /// Once in a while: it may last for long.
    fn complain(&mut self, failure: &io::Error) {
        let now = Instant::now();
        let is_news = self
            .complained
            .is_none_or(|last| now - last >= COMPLAINT_EVERY);
        if is_news {
            self.complained = Some(now);
            let open = self.connections.len();
            warn!(error = %failure, open, "cannot accept a connection");
        }
    }

    /// Takes a connection for which there is no descriptor, and ends it with a word: a client that
    /// only waits would learn nothing. Whether there was one.
    fn turn_away(&mut self) -> bool {
        if self.spare.take().is_none() {
            self.spare = spare();
            return false;
        }
        let accepted = self.listener.accept().now_or_never();
        let turned_away = if let Some(Ok((stream, _))) = accepted {
            if self.tls.is_none() {
                let _ = stream.try_write(answer::OVERLOADED);
            }
            let cause = End::NoDescriptor.label();
            counter!(CONNECTIONS_CLOSED, "cause" => cause).increment(1);
            true
        } else {
            false
        };
        self.spare = spare();
        turned_away
    }

    async fn drain(mut self) {
        drop(self.listener);
        self.seats.drain();
        self.crowd.drain();
        let all_ended = async {
            while let Some(ended) = self.connections.join_next().await {
                self.open.decrement(1.0);
                let cause = ended.map_or("panic", End::label);
                counter!(CONNECTIONS_CLOSED, "cause" => cause).increment(1);
            }
        };
        if timeout(DRAIN_LIMIT, all_ended).await.is_err() {
            warn!("token requests did not end in time and were cut off");
        }
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}
