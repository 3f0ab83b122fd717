#![forbid(unsafe_code)]
//! Session API on an embedded database: REST and gRPC (contract sections 4 and 5).
//!
//! In: [`Settings`]. Out: a [`Server`] that has its ports and its database, and runs until it is
//! told to shut down. The binary and the control plane's local mode both start it this way.

mod auth;
mod error;
mod events;
mod grpc;
mod metrics;
mod projects;
mod rest;
mod search;
mod sessions;
mod settings;
mod store;
mod time;

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use ambient_shared::{
    admin::{self, Readiness},
    client::ClientError,
    clock::Clock,
    tasks::{TaskFailure, Tasks},
};
use axum::Router;
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    auth::Auth,
    events::{Ends, Events},
    store::{Store, Writer},
};
pub use crate::{
    settings::{Arguments, Database, InvalidJwksSource, JwksSource, Settings},
    store::OpenError,
};

/// How long calls may go on after a shutdown was asked for.
const GRACE: Duration = Duration::from_secs(5);

/// How long all tasks may take to end: calls, then what they handed to the writer.
const DRAIN: Duration = Duration::from_secs(15);

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings are wrong: one line for each fault.
    #[error("{}", .0.join("\n"))]
    Settings(Vec<String>),
    /// No database.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// A port cannot be had.
    #[error("cannot listen on {address} for {port_of}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What it was for: `rest`, `grpc` or `admin`.
        port_of: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The HTTP client that fetches keys cannot be made.
    #[error("cannot set up the client that fetches keys")]
    Client(#[from] ClientError),
}

/// What every call needs.
#[derive(Clone)]
struct App {
    store: Store,
    auth: Arc<Auth>,
    events: Events,
    ends: Ends,
}

/// A server that listens but does not answer yet.
pub struct Server {
    rest: Listener,
    grpc: Listener,
    admin: Option<Listener>,
    admin_routes: Option<Router>,
    store: Store,
    writer: Writer,
    auth: Auth,
    events: Events,
    clock: Clock,
}

struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Checks the settings, opens the database and takes the ports.
    ///
    /// # Errors
    /// [`StartError`] when any of that fails; nothing is left running.
    pub async fn bind(settings: Settings, clock: Clock) -> Result<Self, StartError> {
        let faults = settings.faults();
        if !faults.is_empty() {
            return Err(StartError::Settings(faults));
        }
        metrics::begin();
        let auth = Auth::new(&settings, clock.clone())?;
        let events = Events::new();
        let (store, writer) =
            Store::open(&settings.database, clock.clone(), events.clone()).await?;
        let rest = Listener::bind(settings.rest_listen, "rest").await?;
        let grpc = Listener::bind(settings.grpc_listen, "grpc").await?;
        let admin = match settings.admin_listen {
            Some(address) => Some(Listener::bind(address, "admin").await?),
            None => None,
        };
        let listeners = [
            (Some(&rest), "rest"),
            (Some(&grpc), "grpc"),
            (admin.as_ref(), "admin"),
        ];
        for (listener, port_of) in listeners {
            if let Some(listener) = listener {
                info!(address = %listener.address, port_of, "listening");
            }
        }
        Ok(Self {
            rest,
            grpc,
            admin,
            admin_routes: None,
            store,
            writer,
            auth,
            events,
            clock,
        })
    }

    /// Serves these routes too, what [`admin::routes`] makes: on the admin port, or beside REST when
    /// the settings name none. Without them there are `/healthz` and `/readyz`.
    #[must_use]
    pub fn with_admin(mut self, routes: Router) -> Self {
        self.admin_routes = Some(routes);
        self
    }

    /// Whether the server can answer, for the admin routes.
    pub fn readiness(&self) -> Readiness {
        let store = self.store.clone();
        Arc::new(move || {
            if store.is_open() {
                Ok(())
            } else {
                Err("the database is closed".to_owned())
            }
        })
    }

    /// Where REST is served.
    pub fn rest_address(&self) -> SocketAddr {
        self.rest.address
    }

    /// Where gRPC is served.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc.address
    }

    /// Serves until `shutdown`: then streams are ended, calls finished, and what was handed to
    /// the database is committed.
    ///
    /// # Errors
    /// When a part of the server failed.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskFailure> {
        let health = admin::health(self.readiness());
        let Self {
            rest,
            grpc,
            admin,
            admin_routes,
            store,
            writer,
            auth,
            events,
            clock,
        } = self;
        let auth = Arc::new(auth);
        let app = App {
            store,
            auth: Arc::clone(&auth),
            events,
            ends: Ends {
                clock,
                shutdown: shutdown.clone(),
            },
        };
        let admin_routes = admin_routes.unwrap_or_else(|| health.clone());
        let (beside_rest, admin) = match admin {
            Some(port) => (health, Some((port.socket, admin_routes))),
            None => (admin_routes, None),
        };
        let routes = rest::routes(app.clone(), beside_rest);
        // The writer goes last: when both faces are gone.
        let faces_gone = CancellationToken::new();
        let face = Arc::new(faces_gone.clone().drop_guard());
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("writer", writer.run(faces_gone));
        tasks.spawn("keys", auth.run(shutdown.clone()));
        let serving = rest::serve(rest.socket, routes, shutdown.clone());
        let (held, stop) = (Arc::clone(&face), shutdown.clone());
        tasks.spawn_fallible("rest", async move {
            let _held = held;
            with_grace(serving, stop).await
        });
        if let Some((socket, routes)) = admin {
            tasks.spawn_fallible("admin", admin::serve(socket, routes, shutdown.clone()));
        }
        let serving = grpc::serve(grpc.socket, app, shutdown.clone());
        let stop = shutdown;
        tasks.spawn_fallible("grpc", async move {
            let _held = face;
            with_grace(serving, stop).await
        });
        tasks.run_until_shutdown(DRAIN).await
    }
}

impl Listener {
    async fn bind(address: SocketAddr, port_of: &'static str) -> Result<Self, StartError> {
        let failed = |source| StartError::Listen {
            address,
            port_of,
            source,
        };
        let socket = TcpListener::bind(address).await.map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        Ok(Self { socket, address })
    }
}

/// Lets a face finish its calls after a shutdown, but not for ever: a client that does not read
/// must not keep the server.
async fn with_grace<E>(
    serving: impl Future<Output = Result<(), E>>,
    shutdown: CancellationToken,
) -> Result<(), E> {
    let over = async {
        shutdown.cancelled().await;
        sleep(GRACE).await;
    };
    tokio::select! {
        result = serving => result,
        () = over => Ok(()),
    }
}
