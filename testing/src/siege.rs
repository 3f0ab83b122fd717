//! Clients that send slowly: each opens a connection, begins a request and never ends it, and comes
//! back when it is sent away.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    runtime::Runtime,
    time::{sleep, timeout},
};

use crate::DEADLINE;

/// Time between two bytes of a head.
const BYTE_EVERY: Duration = Duration::from_secs(1);

/// Time until one that was sent away is back.
const BACK_AFTER: Duration = Duration::from_secs(2);

/// Slow senders on a thread of their own; they go when it is dropped.
#[derive(Debug)]
pub struct Siege {
    runtime: Option<Runtime>,
    count: Arc<Count>,
}

#[derive(Debug, Default)]
struct Count {
    opened: AtomicUsize,
    open: AtomicUsize,
}

impl Siege {
    /// So many, to this address and from this one.
    ///
    /// # Panics
    /// When there are no threads left.
    pub fn lay(to: SocketAddr, from: IpAddr, senders: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a thread");
        let count = Arc::<Count>::default();
        for _ in 0..senders {
            let count = Arc::clone(&count);
            runtime.spawn(async move {
                loop {
                    if let Ok(stream) = connect(to, from).await {
                        count.opened.fetch_add(1, Ordering::Relaxed);
                        count.open.fetch_add(1, Ordering::Relaxed);
                        send_slowly(stream).await;
                        count.open.fetch_sub(1, Ordering::Relaxed);
                    }
                    sleep(BACK_AFTER).await;
                }
            });
        }
        Self {
            runtime: Some(runtime),
            count,
        }
    }

    /// How many connections were opened.
    pub fn opened(&self) -> usize {
        self.count.opened.load(Ordering::Relaxed)
    }

    /// How many are open, as far as their clients know.
    pub fn open(&self) -> usize {
        self.count.open.load(Ordering::Relaxed)
    }

    /// Waits until so many have been opened.
    ///
    /// # Panics
    /// At the deadline.
    pub async fn until_opened(&self, count: usize) {
        let all = async {
            while self.opened() < count {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = timeout(DEADLINE, all).await.is_ok();
        assert!(in_time, "only {} of {count} were opened", self.opened());
    }
}

impl Drop for Siege {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Connects from a given address of this machine.
pub(crate) async fn connect(to: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.bind(SocketAddr::new(from, 0))?;
    socket.connect(to).await
}

/// Until the server closes it.
async fn send_slowly(mut stream: TcpStream) {
    let mut sent = stream.write_all(b"GET /token HTTP/1.1\r\nX-Filler: ").await;
    let mut answer = [0; 64];
    while sent.is_ok() {
        let read = timeout(BYTE_EVERY, stream.read(&mut answer)).await;
        if matches!(read, Ok(Ok(0) | Err(_))) {
            return;
        }
        sent = stream.write_all(b"x").await;
    }
}
