#![forbid(unsafe_code)]
//! Token watcher and authenticating proxy beside an agent.
//!
//! ```text
//! watch (file)  ─┐
//!                ├─ tokens ──▶ endpoint (GET /token)
//! fetch (no file)┘        └──▶ proxy ──▶ API server
//! ```
//!
//! In: a mounted token file that somebody else keeps fresh, or a token endpoint. Out: the token on
//! loopback, and a proxy to the API server that adds it. Both ports take requests only from
//! programs on this machine that are not a browser's page (see `guard.rs`).

mod endpoint;
mod fetch;
mod guard;
mod listen;
mod metrics;
mod proxy;
mod serve;
mod settings;
mod tokens;
mod watch;

use std::{sync::Arc, time::Duration};

use ambient_shared::{
    admin,
    bearer::BearerError,
    client::ClientError,
    clock::Clock,
    exchange, exit,
    resolve::Resolver,
    tasks,
    tasks::Tasks,
    telemetry::{MetricsPage, TelemetryError},
};
use tokio_util::sync::CancellationToken;

pub use listen::ListenError;
pub use settings::{InvalidUpstream, Settings, Source, Upstream};

/// Longest time from the wish to end to the end: what requests under way get
/// ([`serve::DRAIN`]), and closing their connections.
const LONGEST_END: Duration = Duration::from_secs(25);

/// Why the sidecar ended early.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The log settings cannot be used.
    #[error("cannot set up logs and metrics")]
    Telemetry(#[from] TelemetryError),
    /// No runtime, which the machine refuses only when it is out of something.
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    /// A port that is asked for, or the address file.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The CA certificates cannot be used.
    #[error("AMBIENT_CA_FILE cannot be used")]
    CaFile(#[source] ClientError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Client(ClientError),
    /// The session id does not fit the control plane's key.
    #[error("cannot encrypt the session id for the token endpoint")]
    Bearer(#[from] BearerError),
    /// A part failed while running.
    #[error(transparent)]
    Task(#[from] tasks::TaskFailure),
}

impl RunError {
    /// The exit code that tells this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Telemetry(_)
            | Self::Listen(_)
            | Self::CaFile(_)
            | Self::Client(_)
            | Self::Bearer(_) => exit::CONFIG,
            Self::Runtime(_) | Self::Task(_) => exit::SOFTWARE,
        }
    }
}

impl From<ClientError> for RunError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Certificates { .. } | ClientError::NoCertificate { .. } => {
                Self::CaFile(error)
            }
            _ => Self::Client(error),
        }
    }
}

/// Runs the sidecar until a signal or `shutdown`; then requests under way are finished, at most
/// for [`serve::DRAIN`].
///
/// # Errors
/// When a port cannot be had, TLS cannot be set up, or a task fails.
pub async fn run(
    settings: Settings,
    metrics: MetricsPage,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    metrics::describe();
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_fallible("signals", tasks::cancel_on_signal(shutdown.clone()));

    let clock = Clock::system();
    let resolver = Resolver::system();
    let (feed, tokens) = tokens::channel(clock.clone());
    let proxy = proxy::Proxy::new(&settings, &resolver, tokens.clone())?;
    let endpoint = endpoint::Endpoint::new(
        tokens.clone(),
        guard::Guard::new(settings.require_header),
        shutdown.clone(),
    );

    let ports = listen::bind(&settings).await?;

    // The token is kept fresh until the last request is answered.
    let served = CancellationToken::new();
    match settings.source {
        Source::File(path) => {
            let watcher = watch::Watcher::new(path, feed, clock);
            tasks.spawn("watch", watcher.run(served.clone()));
        }
        Source::Endpoint {
            url,
            public_key,
            session,
            key,
            key_file,
        } => {
            let roots = ambient_shared::client::trust_roots(settings.ca_file.as_deref())?;
            let client =
                ambient_shared::client::http_client_to(&url, &resolver, roots, exchange::TIMEOUT)?;
            let bearer = public_key.encrypt(&session)?;
            let exchange = exchange::Exchange::new(client, url, bearer, key, clock.clone());
            let fetcher = fetch::Fetcher::new(exchange, key_file, feed, clock, session.hash());
            tasks.spawn("fetch", fetcher.run(served.clone()));
        }
    }
    let until_served = Arc::new(served.clone().drop_guard());
    let server = serve::Server::new("endpoint", ports.endpoint, endpoint);
    tasks.spawn("endpoint", {
        let (shutdown, until_served) = (shutdown.clone(), Arc::clone(&until_served));
        async move {
            server.run(shutdown).await;
            drop(until_served);
        }
    });
    let server = serve::Server::new("proxy", ports.proxy, proxy);
    tasks.spawn("proxy", async move {
        server.run(shutdown).await;
        drop(until_served);
    });
    let routes = admin::routes(metrics, Arc::new(move || tokens.ready()));
    tasks.spawn_fallible("admin", admin::serve(ports.admin, routes, served));
    Ok(tasks.run_until_shutdown(LONGEST_END).await?)
}
