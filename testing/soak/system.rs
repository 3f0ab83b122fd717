//! Everything that runs: cluster, node, identity provider, API server, replicas, and the links
//! between them.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ambient_testing::{
    cluster::{CONTROL_PLANE, Cluster, ClusterOptions, Direct},
    faults::Relay,
    idp::{CLIENT_ID, CLIENT_SECRET, Idp},
    installation::Installation,
    kube_proxy::KubeProxy,
    kwok::{Kwok, RUN_AT_ONCE},
    operator::Operator,
    programs::{Program, Running},
    proxy::{Proxy, Upstream},
};
use url::Url;

use crate::plan::Link;

/// Life of sessions' tokens. Too short for use on Kubernetes, as the control plane says; here it
/// makes each token be replaced twice as often as a fault lasts.
pub const TOKEN_LIFE: Duration = Duration::from_secs(120);

/// How long the Lease lasts.
pub const LEASE: Duration = Duration::from_secs(15);

/// Life of the control plane's own token.
const OWN_LIFE: Duration = Duration::from_secs(90);

/// Controllers that make and keep up objects which nobody here needs.
const IDLE_CONTROLLERS: &str = "--controllers=-endpoints-controller,-endpointslice-controller,-endpointslice-mirroring-controller";

/// Process ids of the replicas, while they run.
pub type Pids = Arc<Mutex<Vec<Option<u32>>>>;

/// The whole system.
pub struct System {
    pub installation: Installation,
    pub idp: Idp,
    pub replicas: Vec<Replica>,
    pids: Pids,
    _kwok: Kwok,
}

/// A control plane and its connections: each through a relay, and a proxy behind it.
pub struct Replica {
    pub running: Option<Running>,
    pub kubernetes_proxy: KubeProxy,
    pub rest_proxy: Proxy,
    pub grpc_proxy: Proxy,
    kubernetes: Relay,
    rest: Relay,
    grpc: Relay,
    kubeconfig: PathBuf,
}

impl Replica {
    /// One of its connections.
    pub fn link(&self, link: Link) -> &Relay {
        match link {
            Link::Kubernetes => &self.kubernetes,
            Link::Rest => &self.rest,
            Link::Grpc => &self.grpc,
        }
    }
}

impl System {
    /// Starts all of it.
    pub async fn start(replicas: usize) -> Self {
        let cluster = Cluster::start(ClusterOptions {
            controller_manager: vec![IDLE_CONTROLLERS.to_owned()],
            ..ClusterOptions::default()
        });
        let kwok = Kwok::start(&cluster, RUN_AT_ONCE);
        let idp = Idp::start().await;
        idp.set_life(OWN_LIFE);
        let variables = [
            ("AMBIENT_JWKS", idp.jwks_url()),
            ("GRPC_SERVICE_ACCOUNT", CLIENT_ID.to_owned()),
        ];
        let installation = Installation::start(cluster, replicas, &variables).await;
        let mut system = Self {
            installation,
            idp,
            replicas: Vec::new(),
            pids: Arc::new(Mutex::new(vec![None; replicas])),
            _kwok: kwok,
        };
        for number in 0..replicas {
            let replica = system.replica(number).await;
            system.replicas.push(replica);
            system.start_replica(number);
        }
        system
    }

    async fn replica(&self, number: usize) -> Replica {
        let cluster = &self.installation.cluster;
        let kubernetes_proxy = KubeProxy::start(cluster).await;
        let kubernetes = Relay::start(kubernetes_proxy.address()).await;
        let kubeconfig = kubernetes_proxy.kubeconfig(cluster, CONTROL_PLANE);
        let kubeconfig = fs::read_to_string(kubeconfig).expect("a file");
        let here = kubernetes_proxy.address().to_string();
        let there = kubernetes.address().to_string();
        let path = cluster
            .folder()
            .join(format!("kubeconfig-replica-{number}"));
        fs::write(&path, kubeconfig.replace(&here, &there)).expect("disk is there");
        let rest_proxy = Proxy::start(&Upstream::Http(self.installation.rest())).await;
        let grpc_proxy = Proxy::start(&Upstream::Grpc(self.installation.grpc())).await;
        Replica {
            running: None,
            kubernetes,
            rest: Relay::start(rest_proxy.address()).await,
            grpc: Relay::start(grpc_proxy.address()).await,
            kubernetes_proxy,
            rest_proxy,
            grpc_proxy,
            kubeconfig: path,
        }
    }

    /// Starts a replica that does not run.
    pub fn start_replica(&mut self, number: usize) {
        let running = self.program(number).start();
        let mut pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        pids[number] = Some(running.pid());
        self.replicas[number].running = Some(running);
    }

    /// A replica that is about to end, and is none any more.
    pub fn take_replica(&mut self, number: usize) -> Option<Running> {
        let mut pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        pids[number] = None;
        self.replicas[number].running.take()
    }

    fn program(&self, number: usize) -> Program {
        let replica = &self.replicas[number];
        self.installation
            .control_plane(number)
            .env("KUBECONFIG", &replica.kubeconfig)
            .env(
                "AMBIENT_API_SERVER_URL",
                format!("http://{}", replica.rest.address()),
            )
            .env(
                "AMBIENT_GRPC_SERVER_ADDR",
                replica.grpc.address().to_string(),
            )
            .env("OIDC_TOKEN_URL", self.idp.token_url())
            .env("OIDC_CLIENT_ID", CLIENT_ID)
            .env("OIDC_CLIENT_SECRET", CLIENT_SECRET)
            .env("CP_TOKEN_TTL", format!("{}s", TOKEN_LIFE.as_secs()))
            .env("CP_LEASE_DURATION", format!("{}s", LEASE.as_secs()))
    }

    /// The replicas' process ids.
    pub fn pids(&self) -> Pids {
        Arc::clone(&self.pids)
    }

    /// The REST API.
    pub fn operator(&self) -> Operator {
        self.installation.operator().clone()
    }

    /// The Kubernetes API.
    pub fn direct(&self) -> Direct {
        self.installation.cluster.direct()
    }

    /// Where each replica serves its metrics.
    pub fn admins(&self) -> Vec<SocketAddr> {
        let all = 0..self.replicas.len();
        all.map(|it| self.installation.admin(it)).collect()
    }

    /// Where tokens are to be had, from any replica.
    pub fn token_urls(&self) -> Vec<Url> {
        let all = 0..self.replicas.len();
        all.map(|it| self.installation.token_url(it).parse().expect("a URL"))
            .collect()
    }
}
