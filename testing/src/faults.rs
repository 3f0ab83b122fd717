//! A TCP relay between a program and its server that a test can break in the ways networks break.
//!
//! Its address stays the same whatever it is told; new connections go to the server that is set at
//! that moment, so that a server may come back on another port.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::DEADLINE;

/// Pause before a port is tried again.
const AGAIN: Duration = Duration::from_millis(5);

/// What happens to bytes and to new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All is well.
    #[default]
    Pass,
    /// New connections are refused, as by a machine where nothing listens. Open ones go on.
    Refuse,
    /// Connections stay open and can be made, but nothing arrives any more, as behind a dead
    /// router.
    HalfOpen,
    /// Each piece of data arrives this much later, both ways.
    Slow(Duration),
}

/// A running relay; ends, with all its connections, when dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    control: watch::Sender<Control>,
    listens: watch::Receiver<bool>,
    accepted: Arc<AtomicUsize>,
    _acceptor: JoinSet<()>,
    // Bound but never listening: keeps the port ours while new connections are refused.
    _reserved: TcpSocket,
}

#[derive(Debug, Clone, Copy)]
struct Control {
    server: SocketAddr,
    mode: Mode,
    /// How often [`Relay::cut`] was called.
    cuts: usize,
    /// How often [`Relay::reset`] was called.
    resets: usize,
}

impl Relay {
    /// Starts a relay to this server.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start(server: SocketAddr) -> Self {
        let any = "127.0.0.1:0".parse().expect("an address");
        let reserved = bound(any).expect("a free port");
        let address = reserved.local_addr().expect("a bound socket has one");
        let (control, controlled) = watch::channel(Control {
            server,
            mode: Mode::Pass,
            cuts: 0,
            resets: 0,
        });
        let (says_listens, mut listens) = watch::channel(false);
        let accepted = Arc::new(AtomicUsize::new(0));
        let mut acceptor = JoinSet::new();
        acceptor.spawn(accept(
            address,
            controlled,
            says_listens,
            Arc::clone(&accepted),
        ));
        listens
            .wait_for(|listens| *listens)
            .await
            .expect("relay can listen");
        Self {
            address,
            control,
            listens,
            accepted,
            _acceptor: acceptor,
            _reserved: reserved,
        }
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections were accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Acquire)
    }

    /// Where new connections go from now on.
    pub fn set_server(&self, server: SocketAddr) {
        self.control.send_modify(|control| control.server = server);
    }

    /// Changes what happens; in force for new connections when it returns.
    ///
    /// # Panics
    /// When the relay cannot listen again.
    pub async fn set(&self, mode: Mode) {
        self.control.send_modify(|control| control.mode = mode);
        let mut listens = self.listens.clone();
        let wanted = mode != Mode::Refuse;
        timeout(DEADLINE, listens.wait_for(|listens| *listens == wanted))
            .await
            .expect("relay changes its mode in time")
            .expect("relay is alive");
        // A program that is just being started by another test holds a copy of the listener, for
        // the moment until it is executed.
        while !wanted && TcpStream::connect(self.address).await.is_ok() {
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Ends all open connections in order (FIN).
    pub fn cut(&self) {
        self.control.send_modify(|control| control.cuts += 1);
    }

    /// Ends all open connections at once (RST), as a machine does that was switched off and on.
    pub fn reset(&self) {
        self.control.send_modify(|control| control.resets += 1);
    }
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    // Lets the listener share the port with the reservation.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn accept(
    address: SocketAddr,
    mut control: watch::Receiver<Control>,
    listens: watch::Sender<bool>,
    accepted: Arc<AtomicUsize>,
) {
    let mut connections = JoinSet::new();
    loop {
        let refuse = |control: &Control| control.mode == Mode::Refuse;
        if control.wait_for(|control| !refuse(control)).await.is_err() {
            return;
        }
        let Ok(listener) = bound(address).and_then(|socket| socket.listen(128)) else {
            // As said in `set`: the last listener is still there.
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        let _ = listens.send(true);
        serve(&listener, &mut control, &mut connections, &accepted, refuse).await;
        drop(listener);
        let _ = listens.send(false);
    }
}

/// Accepts connections until they are to be refused.
async fn serve(
    listener: &TcpListener,
    control: &mut watch::Receiver<Control>,
    connections: &mut JoinSet<()>,
    accepted: &AtomicUsize,
    refuse: impl Fn(&Control) -> bool,
) {
    let mut changes = control.clone();
    loop {
        tokio::select! {
            biased;
            _ = changes.wait_for(&refuse) => return,
            Some(_) = connections.join_next() => {}
            connection = listener.accept() => {
                let Ok((client, _)) = connection else { continue };
                accepted.fetch_add(1, Ordering::AcqRel);
                connections.spawn(relay(client, control.clone()));
            }
        }
    }
}

/// One connection, until both sides have ended it, one has broken it, or the test does.
async fn relay(mut client: TcpStream, mut control: watch::Receiver<Control>) {
    let begin = *control.borrow_and_update();
    let Ok(mut server) = TcpStream::connect(begin.server).await else {
        // The nearest to a refusal that is left once a connection was accepted.
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));

    let pumps = control.clone();
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let carried = async {
        tokio::try_join!(
            pump(from_client, to_server, pumps.clone()),
            pump(from_server, to_client, pumps.clone()),
        )
    };
    let reset = tokio::select! {
        carried = carried => carried.is_err(),
        ended = control.wait_for(|now| now.cuts > begin.cuts || now.resets > begin.resets) => {
            ended.is_ok_and(|now| now.resets > begin.resets)
        }
    };
    if reset {
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    } else {
        // Before the close, which would be a reset if there were bytes nobody has read.
        let _ = tokio::join!(client.shutdown(), server.shutdown());
    }
}

/// Carries bytes one way, until the end of the stream, which it passes on.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut control: watch::Receiver<Control>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        let flows = |control: &Control| control.mode != Mode::HalfOpen;
        let mode = control.wait_for(flows).await.map(|control| control.mode);
        if let Ok(Mode::Slow(late)) = mode {
            tokio::time::sleep(late).await;
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
    async fn echo() -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut connection, _)) = listener.accept().await {
                connections.spawn(async move {
                    let (mut from, mut to) = connection.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        (address, tasks)
    }

    async fn ping(connection: &mut TcpStream) -> io::Result<()> {
        connection.write_all(b"ping").await?;
        connection.read_exact(&mut [0; 4]).await?;
        Ok(())
    }

    #[tokio::test]
    async fn refuses_and_accepts_again_at_the_same_address() {
        let (server, _tasks) = echo().await;
        let relay = Relay::start(server).await;
        let mut open = TcpStream::connect(relay.address()).await.unwrap();
        ping(&mut open).await.unwrap();

        for _ in 0..3 {
            relay.set(Mode::Refuse).await;
            let refused = TcpStream::connect(relay.address()).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            ping(&mut open).await.unwrap();
            relay.set(Mode::Pass).await;
            let mut new = TcpStream::connect(relay.address()).await.unwrap();
            ping(&mut new).await.unwrap();
        }
        assert_eq!(relay.accepted(), 4);
    }

    #[tokio::test]
    async fn cut_is_an_end_and_reset_is_an_error() {
        let (server, _tasks) = echo().await;
        let relay = Relay::start(server).await;
        let mut connection = TcpStream::connect(relay.address()).await.unwrap();
        ping(&mut connection).await.unwrap();
        relay.cut();
        assert_eq!(connection.read(&mut [0; 1]).await.unwrap(), 0);

        let mut connection = TcpStream::connect(relay.address()).await.unwrap();
        ping(&mut connection).await.unwrap();
        relay.reset();
        let error = connection.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn half_open_holds_everything_back_until_it_passes_again() {
        let (server, _tasks) = echo().await;
        let relay = Relay::start(server).await;
        let mut connection = TcpStream::connect(relay.address()).await.unwrap();
        ping(&mut connection).await.unwrap();

        relay.set(Mode::HalfOpen).await;
        let silence = timeout(Duration::from_millis(200), ping(&mut connection)).await;
        assert!(silence.is_err());
        relay.set(Mode::Pass).await;
        connection.read_exact(&mut [0; 4]).await.unwrap();
    }

    #[tokio::test]
    async fn slow_is_late_both_ways() {
        let (server, _tasks) = echo().await;
        let relay = Relay::start(server).await;
        relay.set(Mode::Slow(Duration::from_millis(50))).await;
        let mut connection = TcpStream::connect(relay.address()).await.unwrap();
        let started = tokio::time::Instant::now();
        ping(&mut connection).await.unwrap();
        assert!(started.elapsed() >= Duration::from_millis(100));
    }
}
