//! Ports that stay ours from before a program listens there until after it ended.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpSocket;

/// A port that only a program of ours can listen at: one that sets `SO_REUSEPORT` and runs as the
/// same user. The system gives a port that is held so to nobody who asks for any free one, and
/// while no program listens at it, it refuses connections.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    /// Bound, and never listening, so that no connection comes here.
    _socket: TcpSocket,
}

impl Port {
    pub(super) fn hold(address: Ipv4Addr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket can be made");
        socket.set_reuseport(true).expect("ports can be shared");
        socket
            .bind(SocketAddr::from((address, 0)))
            .unwrap_or_else(|error| panic!("cannot bind {address}: {error}"));
        let number = socket.local_addr().expect("a bound socket").port();
        Self {
            number,
            _socket: socket,
        }
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }
}
