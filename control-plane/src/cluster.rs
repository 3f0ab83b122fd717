//! Connections to the Kubernetes API.
//!
//! In: a kubeconfig, or the service account of our own pod. Out: [`Clients`] whose every call goes
//! through [`manners`]: bounded in number and time, patient with a busy server, counted. Names are
//! resolved as in every other client of ours, not by the C library.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use ambient_shared::{client, resolve::Resolver};
use http::{Uri, uri::Scheme};
use hyper_util::{
    client::legacy::{
        Client as HttpClient,
        connect::{Connect, proxy::Tunnel},
    },
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Config,
    client::ConfigExt as _,
    config::{AuthInfo, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::sync::Semaphore;
use tower::{BoxError, ServiceBuilder, util::BoxCloneSyncService};

use self::{
    manners::{Manners, Transport},
    token::TokenFile,
};

mod fence;
mod manners;
mod token;

pub use fence::Fence;

/// Set in every pod: where the API server of its cluster is.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";

/// How the cluster is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterSettings {
    /// `KUBECONFIG`: a file, or several with colons between. None: the service account of our own
    /// pod; outside a cluster `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// `PROJECT_KUBE_TOKEN_FILE`: another token for the projects' namespaces.
    pub project_token_file: Option<PathBuf>,
}

/// Clients of the Kubernetes API, one for each kind of work. Each has a share of calls of its own,
/// so that none waits behind another: a refresh of all Secrets delays no start, and the reverse.
///
/// All but `own` are for the projects' namespaces, which may have a token of their own, and write
/// only while the fence is open.
#[derive(Clone)]
pub struct Clients {
    /// For our own namespace.
    pub own: kube::Client,
    /// Makes, furnishes and removes namespaces.
    pub projects: kube::Client,
    /// Starts sessions.
    pub starting: kube::Client,
    /// Stops sessions, and removes what they leave.
    pub ending: kube::Client,
    /// Replaces tokens.
    pub refresh: kube::Client,
    /// Puts right what others changed, and sends Events.
    pub upkeep: kube::Client,
    /// Lists and watches.
    pub watching: kube::Client,
}

/// How many calls of each kind may be under way: as many as its workers make at once by default, so
/// that who waits for a place waits for calls of its own kind only.
mod shares {
    /// Beside our own few: while many namespaces are made, Secrets are read that are copied there.
    pub(super) const OWN: usize = 16;
    /// Workers of projects, and starts in namespaces that are not ready.
    pub(super) const PROJECTS: usize = 24;
    pub(super) const STARTING: usize = 16;
    pub(super) const ENDING: usize = 8;
    pub(super) const REFRESH: usize = 16;
    pub(super) const UPKEEP: usize = 8;
    /// Lists alone: watches that are open have no place.
    pub(super) const WATCHING: usize = 16;

    /// All together.
    pub(super) const SUM: usize = OWN + PROJECTS + STARTING + ENDING + REFRESH + UPKEEP + WATCHING;
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Neither in a pod nor with a kubeconfig.
    #[error("no Kubernetes cluster: this is no pod of one; set KUBECONFIG")]
    NoCluster(#[source] KubeconfigError),
    /// A kubeconfig that cannot be used.
    #[error("cannot use the kubeconfig {}", path.display())]
    Kubeconfig {
        /// As set.
        path: PathBuf,
        /// What is wrong with it.
        source: KubeconfigError,
    },
    /// The service account of our own pod cannot be used.
    #[error("cannot use the pod's service account; is it mounted?")]
    ServiceAccount(#[source] InClusterError),
    /// A token file cannot be used.
    #[error("cannot read a token from {}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A proxy of a kind that we do not speak.
    #[error("cannot reach Kubernetes through the proxy {url}; only http://HOST:PORT is possible")]
    Proxy {
        /// Without user and password.
        url: String,
    },
    /// Certificates or credentials cannot be used.
    #[error("cannot set up the client of the Kubernetes API at {url}")]
    Client {
        /// The API server.
        url: String,
        /// What is wrong.
        source: kube::Error,
    },
    /// The work was cut off, as the program ends.
    #[error("setting up the client of the Kubernetes API was cut off")]
    CutOff,
}

/// Makes the clients. Asks nothing of the API server; runs the kubeconfig's credential plugin, if
/// it has one. While `fence` is closed, only [`Clients::own`] writes.
///
/// # Errors
/// When settings, certificates or credentials cannot be used.
pub async fn connect(settings: &ClusterSettings, fence: Fence) -> Result<Clients, ClusterError> {
    client::install_crypto_provider();
    let config = read(settings.kubeconfig.as_deref()).await?;
    let projects = match &settings.project_token_file {
        None => None,
        Some(file) => {
            let mut config = config.clone();
            // Nothing else: of a certificate and a token, API servers take the certificate.
            config.auth_info = AuthInfo {
                token_file: Some(file.display().to_string()),
                ..AuthInfo::default()
            };
            Some(Connection::open(config).await?)
        }
    };
    let own = Connection::open(config).await?;
    let projects = projects.as_ref().unwrap_or(&own);
    let share = |calls| projects.client(calls, fence.clone());
    Ok(Clients {
        own: own.client(shares::OWN, Fence::open()),
        projects: share(shares::PROJECTS),
        starting: share(shares::STARTING),
        ending: share(shares::ENDING),
        refresh: share(shares::REFRESH),
        upkeep: share(shares::UPKEEP),
        watching: share(shares::WATCHING),
    })
}

async fn read(kubeconfig: Option<&Path>) -> Result<Config, ClusterError> {
    let Some(path) = kubeconfig else {
        if std::env::var_os(IN_CLUSTER).is_some() {
            return Config::incluster().map_err(ClusterError::ServiceAccount);
        }
        return Config::from_kubeconfig(&KubeConfigOptions::default())
            .await
            .map_err(ClusterError::NoCluster);
    };
    let broken = |source| ClusterError::Kubeconfig {
        path: path.to_owned(),
        source,
    };
    let merged = std::env::split_paths(path)
        .filter(|path| !path.as_os_str().is_empty())
        .try_fold(Kubeconfig::default(), |merged, path| {
            merged.merge(Kubeconfig::read_from(path)?)
        })
        .map_err(broken)?;
    Config::from_custom_kubeconfig(merged, &KubeConfigOptions::default())
        .await
        .map_err(broken)
}

/// What clients of the same credentials have in common.
struct Connection {
    transport: Transport,
    token: Option<TokenFile>,
    namespace: String,
}

impl Connection {
    async fn open(mut config: Config) -> Result<Self, ClusterError> {
        let token = match token_file(&mut config.auth_info) {
            None => None,
            Some(path) => Some(
                TokenFile::open(&path)
                    .await
                    .map_err(|source| ClusterError::TokenFile { path, source })?,
            ),
        };
        let namespace = config.default_namespace.clone();
        // A credential plugin is run here, and waited for.
        let transport = tokio::task::spawn_blocking(move || transport(&config)).await;
        Ok(Self {
            transport: transport.map_err(|_| ClusterError::CutOff)??,
            token,
            namespace,
        })
    }

    /// A client with so many places for its calls.
    fn client(&self, calls: usize, fence: Fence) -> kube::Client {
        let calls = Arc::new(Semaphore::new(calls));
        let manners = Manners::new(self.transport.clone(), self.token.clone(), calls, fence);
        kube::Client::new(manners, self.namespace.clone())
    }
}

/// The token file, when that is what authenticates: taken out, as we read it ourselves. kube would
/// read it once a minute, and stumble over a line break at its end.
fn token_file(auth: &mut AuthInfo) -> Option<PathBuf> {
    let first = auth.auth_provider.is_none()
        && auth.token.is_none()
        && (auth.username.is_none() || auth.password.is_none());
    first.then(|| auth.token_file.take().map(PathBuf::from))?
}

/// HTTP/1.1, as kube has it: a watch has a connection to itself, so that many watches do not meet
/// the limit of streams of one HTTP/2 connection.
fn transport(config: &Config) -> Result<Transport, ClusterError> {
    let broken = |source| ClusterError::Client {
        url: config.cluster_url.to_string(),
        source,
    };
    let plain = client::tcp_connector(&Resolver::system());
    match &config.proxy_url {
        None => {
            let tls = config.rustls_https_connector_with_connector(plain);
            layered(config, tls.map_err(broken)?)
        }
        Some(proxy) if is_plain_proxy(proxy) => {
            let tunnel = Tunnel::new(proxy.clone(), plain);
            let tls = config.rustls_https_connector_with_connector(tunnel);
            layered(config, tls.map_err(broken)?)
        }
        Some(proxy) => {
            let scheme = proxy.scheme_str().unwrap_or("http");
            let host = proxy.host().unwrap_or_default();
            return Err(ClusterError::Proxy {
                url: format!("{scheme}://{host}"),
            });
        }
    }
    .map_err(broken)
}

/// Not one with a password: it would be sent in the clear.
fn is_plain_proxy(proxy: &Uri) -> bool {
    proxy.scheme() == Some(&Scheme::HTTP)
        && !proxy
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'))
}

/// What kube puts around a client: the server's address, credentials, impersonation.
fn layered<C>(config: &Config, connector: C) -> Result<Transport, kube::Error>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    let client = HttpClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_max_idle_per_host(shares::SUM)
        .build(connector);
    Ok(BoxCloneSyncService::new(
        ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(client),
    ))
}

#[cfg(test)]
mod tests;
