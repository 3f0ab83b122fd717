//! The clock of the control plane is off by an hour; that of the runner, of the API server and of
//! the identity provider is right. The program reads the machine's clock, so here are its parts,
//! put together as it does.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use ambient_control_plane::{
    backend::kubernetes::{KubernetesBackend, projects::Projects, settings as kubernetes},
    cluster::{ClusterSettings, Fence, connect},
    controller::{Controller, ControllerSettings},
    endpoint::{ConnectionLimits, Endpoint, EndpointSettings, Parts, lookup::Lookup},
    issuer::oidc::OidcIssuer,
    keypair::{KeypairStore as _, Keyring, secret::SecretKeypairStore},
    reconcile::desired::{DesiredSettings, Place, PodLimits},
    sessions::rest::RestClient,
};
use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, http_client_to, trust_roots},
    clock::Clock,
    resolve::Resolver,
};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
    idp::{CLIENT_ID, CLIENT_SECRET},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    fresh::{LOOK, pushed, running, stay_fresh},
    identity_provider::Trusting,
};

const HOUR: Duration = Duration::from_secs(3600);

const LIFE: Duration = Duration::from_secs(4);

/// A control plane at work.
struct Plane {
    endpoint: SocketAddr,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Plane {
    async fn start(it: &Trusting, clock: &Clock) -> Self {
        let settings = Arc::new(kubernetes::KubernetesSettings {
            namespace: it.site.name.clone(),
            platform: kubernetes::Platform::Standard,
            images: kubernetes::Images {
                agent: Some("agent:1".to_owned()),
                runner: Some("runner:1".to_owned()),
                sidecar: Some("sidecar:1".to_owned()),
                ..kubernetes::Images::default()
            },
            overlay: None,
            upstream: format!("http://{}", it.site.api.rest),
            grpc_upstream: it.site.api.grpc.to_string(),
            model_access: kubernetes::ModelAccess::default(),
            companions: kubernetes::Companions::default(),
            pods: kubernetes::PodSettings::default(),
        });
        let access = ClusterSettings {
            kubeconfig: Some(Cluster::shared().kubeconfig(CONTROL_PLANE)),
            project_token_file: None,
        };
        let clients = connect(&access, Fence::open()).await.unwrap();
        let store = SecretKeypairStore {
            client: clients.own.clone(),
            namespace: it.site.name.clone(),
        };
        let keys = Keyring::new(store.load_or_create().await.unwrap());
        let url = it.idp.token_url().parse().unwrap();
        let secret = CLIENT_SECRET.to_owned().into();
        let issuer = OidcIssuer::connect(&url, CLIENT_ID, &secret, clock).unwrap();
        let issuer = Arc::new(issuer);
        let resolver = Resolver::system();
        let grpc = GrpcAddress {
            address: it.site.grpc.address().to_string(),
            tls: false,
            ca: None,
        };
        let own = issuer.subscribe();
        let api = Api::new(grpc_channel(&resolver, &grpc).unwrap(), own.clone());
        let rest = format!("http://{}", it.site.api.rest).parse().unwrap();
        let roots = trust_roots(None).unwrap();
        let http = http_client_to(&rest, &resolver, roots, Duration::from_secs(30)).unwrap();
        let limits = PodLimits {
            default_image: Some("agent:1".to_owned()),
            allowed_images: Vec::new(),
            max_resources: BTreeMap::new(),
        };
        let controller = Controller::new(
            api.clone(),
            RestClient::new(http, &rest, own),
            issuer.clone(),
            keys.clone(),
            ControllerSettings {
                desired: DesiredSettings {
                    default_agent_command: Some(vec!["agent".to_owned()]),
                    place: Place::Pods(limits),
                    ..DesiredSettings::default()
                },
                ..ControllerSettings::default()
            },
            clock.clone(),
        );
        let projects = Projects::new(clients.clone(), Arc::clone(&settings));
        let sessions = controller.cache();
        let (backend, watches) = KubernetesBackend::new(
            &clients,
            settings,
            Arc::new(projects),
            Arc::new(move |id| sessions.get(id)?.object.project_id.clone()),
            controller.observer(),
            clock.clone(),
        );
        let backend = Arc::new(backend);
        let lookup = Lookup::new(controller.cache(), api, backend.clone());
        let endpoint = EndpointSettings {
            listen: "127.0.0.1:0".parse().unwrap(),
            allow_unproven: false,
            rate_limits: false,
            connections: ConnectionLimits::default(),
            tls: None,
        };
        let parts = Parts {
            keys,
            issuer: issuer.clone(),
            standing: lookup.into_standing_of(),
            clock: clock.clone(),
        };
        let endpoint = Endpoint::bind(endpoint, parts).await.unwrap();
        let address = endpoint.address();

        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let stop = || shutdown.clone();
        let (oidc, ended) = (issuer, stop());
        running.spawn(async move { oidc.run(ended).await });
        let served = endpoint.run(stop());
        running.spawn(async move { served.await.unwrap() });
        let watched = watches.run(stop());
        running.spawn(async move { watched.await.unwrap() });
        assert!(backend.synced(DEADLINE).await, "not synced");
        let ended = stop();
        running.spawn(async move { controller.run(backend, ended).await.unwrap() });
        Self {
            endpoint: address,
            shutdown,
            running,
        }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = async {
            while self
                .running
                .join_next()
                .await
                .transpose()
                .unwrap()
                .is_some()
            {}
        };
        timeout(DEADLINE, ended).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tokens_stay_fresh_with_a_clock_that_is_an_hour_off() {
    let it = Trusting::new("fault-clock", LIFE).await;
    let right = Clock::system();
    for ahead in [true, false] {
        let now = right.now();
        let clock = Clock::manual(if ahead { now + HOUR } else { now - HOUR });
        let plane = Plane::start(&it, &clock).await;
        let session = running(&it.site).await;

        stay_fresh(&session, plane.endpoint, LIFE).await;
        let pulled = session.exchange(plane.endpoint).await.fetch().await;
        let left = pulled.unwrap().life_left(right.now()).unwrap();
        assert!(left <= LIFE, "the runner would renew it after {left:?}");

        // Somebody sets the clock.
        clock.set(right.now());
        let (before, deadline) = (pushed(&session).await, Instant::now() + 2 * LIFE);
        while pushed(&session).await.same_secret(&before) {
            assert!(Instant::now() < deadline, "no new token");
            sleep(LOOK).await;
        }
        stay_fresh(&session, plane.endpoint, Duration::ZERO).await;
        session.until_phase("Running").await;
        session.delete().await;
        session.finishes().await;
        session.is_gone().await;
        plane.stop().await;
    }
}
