//! Ports that stay a test's own, also while nobody listens there.
//!
//! Every test on the machine takes free ports, for its listeners and its connections. The port of a
//! program that is down for a moment would be free too, and the program could not come back.

use std::{io, net::SocketAddr};

use tokio::net::TcpSocket;

/// A port of 127.0.0.1 that nobody gets by asking for a free one, until this is dropped. Who asks
/// for this very port can listen on it.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    /// Bound, never listening.
    _socket: TcpSocket,
}

impl Port {
    /// One that was free.
    ///
    /// # Panics
    /// When there is none.
    pub fn free() -> Self {
        Self::bound(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port")
    }

    /// This one, for the time that its program is down; none when somebody listens on it already.
    pub fn keep(address: SocketAddr) -> Option<Self> {
        Self::bound(address).ok()
    }

    fn bound(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        // Lets a listener share the port, as listeners of tokio and std ask for this too.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(Self {
            address: socket.local_addr()?,
            _socket: socket,
        })
    }

    /// Where to listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn who_asks_for_the_port_gets_it_again_and_again() {
        let port = Port::free();
        for _ in 0..2 {
            assert!(TcpStream::connect(port.address()).await.is_err());
            let listener = TcpListener::bind(port.address()).await.unwrap();
            TcpStream::connect(port.address()).await.unwrap();
            assert!(Port::keep(port.address()).is_none());
            drop(listener);
        }
    }
}
