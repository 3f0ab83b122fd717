//! An HTTP proxy between a program and its server that a test can break, one call at a time.
//!
//! In: HTTP/1.1 or HTTP/2 without TLS, so that REST, gRPC and the Kubernetes API all pass. Out: the
//! server's answers, streams as they come; unless a [`Fault`] says otherwise, or a [`Cut`] has
//! stopped the world. What is broken below HTTP is for [`faults`](crate::faults).

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http::{Method, StatusCode};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

mod cut;
mod fault;
mod forward;
mod upstream;

pub use cut::{Cut, Side};
pub use fault::{Answer, Fault, Injected};
pub use upstream::Upstream;

use fault::Rule;
use forward::Tap;

/// A call that came through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// The path; of gRPC `/package.Service/Method`.
    pub path: String,
    /// The query, without its `?`; empty when there is none.
    pub query: String,
    /// How it was answered, whether that arrived or not; none when it was not, or not yet.
    pub answered: Option<StatusCode>,
}

/// Whether a call is meant.
pub type Which = Box<dyn Fn(&Call) -> bool + Send + Sync>;

/// A running proxy; ends, with all its connections, when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _acceptor: JoinSet<()>,
}

/// What connections and the test share.
struct Shared {
    upstream: upstream::Client,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    rules: Vec<Arc<Rule>>,
    cut: Option<(Cut, Which)>,
    /// Answers whose bodies are on their way.
    streams: Vec<(Call, watch::Sender<Tap>)>,
}

impl Proxy {
    /// Starts a proxy to this server.
    ///
    /// # Panics
    /// When it cannot listen, or the server's certificate authority cannot be read.
    pub async fn start(upstream: &Upstream) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has one");
        let shared = Arc::new(Shared {
            upstream: upstream::Client::new(upstream),
            state: Mutex::default(),
        });
        let mut acceptor = JoinSet::new();
        acceptor.spawn(accept(listener, Arc::clone(&shared)));
        Self {
            address,
            shared,
            _acceptor: acceptor,
        }
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// All calls so far, in the order in which they came.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.lock().calls.clone()
    }

    /// Breaks the next `times` of these calls, until the result is dropped. Of several faults that a
    /// call fits, the oldest that is not used up counts.
    ///
    /// [`Fault::Silent`] also befalls the answers that are on their way.
    pub fn inject(
        &self,
        times: usize,
        which: impl Fn(&Call) -> bool + Send + Sync + 'static,
        fault: Fault,
    ) -> Injected {
        let rule = Arc::new(Rule::new(times, Box::new(which), fault));
        let mut state = self.shared.lock();
        if matches!(rule.fault, Fault::Silent) {
            state.tap(&rule.which, &Tap::Silent);
        }
        state.rules.push(Arc::clone(&rule));
        Injected::new(rule, &self.shared)
    }

    /// Ends the answers to these calls that are on their way, in order, after these last bytes. Gives
    /// how many there were.
    pub fn end_streams(&self, which: impl Fn(&Call) -> bool, last: impl Into<Bytes>) -> usize {
        self.shared.lock().tap(&which, &Tap::End(last.into()))
    }

    /// How many answers to these calls are on their way.
    pub fn streams(&self, which: impl Fn(&Call) -> bool) -> usize {
        let mut state = self.shared.lock();
        state.streams.retain(|(_, tap)| !tap.is_closed());
        state.streams.iter().filter(|(call, _)| which(call)).count()
    }

    /// Lets the world stop at one of these calls; see [`Cut`].
    pub fn cut(&self, cut: &Cut, which: impl Fn(&Call) -> bool + Send + Sync + 'static) {
        self.shared.lock().cut = Some((cut.clone(), Box::new(which)));
    }

    /// Ends [`Proxy::cut`]. Calls that it has stopped stay without an answer.
    pub fn mend(&self) {
        self.shared.lock().cut = None;
    }
}

impl State {
    /// Tells those answers that are on their way what to do.
    fn tap(&mut self, which: impl Fn(&Call) -> bool, order: &Tap) -> usize {
        self.streams.retain(|(_, tap)| !tap.is_closed());
        let mut told = 0;
        for (_, tap) in self.streams.iter().filter(|(call, _)| which(call)) {
            tap.send_replace(order.clone());
            told += 1;
        }
        told
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            connection = listener.accept() => {
                let Ok((client, _)) = connection else { continue };
                let _ = client.set_nodelay(true);
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let answer = service_fn(|request| forward::answer(Arc::clone(&shared), request));
                    let server = auto::Builder::new(TokioExecutor::new());
                    // Its end is the client's business.
                    let _ = server.serve_connection(TokioIo::new(client), answer).await;
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
