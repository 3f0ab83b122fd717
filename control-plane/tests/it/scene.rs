//! A controller between an API server that behaves as existing ones do, and a backend that only
//! records. Both can be made to fail in the ways that real ones fail.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ambient_control_plane::{
    controller::{Controller, ControllerSettings},
    reconcile::desired::DesiredSettings,
    refresh::{Interval, RefreshSettings},
    sessions::{SessionCache, rest::RestClient},
};
use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, http_client_to, install_crypto_provider, trust_roots},
    clock::Clock,
    resolve::Resolver,
    session::SessionId,
    tasks::TaskFailure,
    token::Token,
};
use ambient_testing::{DEADLINE, faults::Relay};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub mod backend;
pub mod fake_api;
pub mod issuer;

pub use backend::{Call, Recording};
pub use fake_api::FakeApi;
pub use issuer::FakeIssuer;

/// What wakes who waits for something to have happened.
pub type Changes = Arc<Notify>;

/// Waits until it is so; looks again at each change, and now and then, as the cache tells nobody.
pub async fn until(changes: &Changes, what: &str, is_so: impl Fn() -> bool) {
    let waiting = async {
        loop {
            let changed = changes.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if is_so() {
                return;
            }
            let _ = timeout(Duration::from_millis(50), changed).await;
        }
    };
    assert!(timeout(DEADLINE, waiting).await.is_ok(), "not seen: {what}");
}

/// Settings of a scene.
pub struct Plan {
    pub refresh: Interval,
    pub token_life: Duration,
    pub resync: Duration,
    pub lag: Duration,
    /// Whether gRPC goes through a relay that can be broken.
    pub relay: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            refresh: Interval::Off,
            token_life: Duration::from_secs(3600),
            resync: Duration::from_secs(300),
            lag: Duration::from_secs(1),
            relay: false,
        }
    }
}

/// A controller at work.
pub struct Scene {
    pub api: FakeApi,
    pub backend: Arc<Recording>,
    pub issuer: Arc<FakeIssuer>,
    pub cache: SessionCache,
    pub changes: Changes,
    pub shutdown: CancellationToken,
    pub relay: Option<Relay>,
    running: JoinSet<Result<(), TaskFailure>>,
}

impl Scene {
    /// Starts a controller after `prepare` has set what it finds.
    pub async fn start(plan: Plan, prepare: impl FnOnce(&FakeApi, &Recording)) -> Self {
        let changes = Changes::default();
        let api = FakeApi::start(Arc::clone(&changes)).await;
        let issuer = Arc::new(FakeIssuer::new(plan.token_life));
        let relay = if plan.relay {
            Some(Relay::start(api.grpc_address).await)
        } else {
            None
        };
        let grpc = relay.as_ref().map_or(api.grpc_address, Relay::address);
        let (controller, _) = controller(
            &plan,
            &format!("http://{}", api.rest_address),
            &grpc.to_string(),
            "service-token",
            &issuer,
        );
        let backend = Arc::new(Recording::new(
            controller.observer(),
            plan.lag,
            Arc::clone(&changes),
        ));
        prepare(&api, &backend);
        let cache = controller.cache();
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(controller.run(Arc::clone(&backend) as _, shutdown.clone()));
        Self {
            api,
            backend,
            issuer,
            cache,
            changes,
            shutdown,
            relay,
            running,
        }
    }

    /// Waits until it is so.
    pub async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        until(&self.changes, what, || is_so(self)).await;
    }

    /// Waits until the API server has the session in this phase.
    pub async fn until_phase(&self, id: &str, phase: &str) {
        let what = format!("{id} in phase {phase}");
        self.until(&what, |scene| scene.api.phase(id).as_deref() == Some(phase))
            .await;
    }

    /// Waits until a session that is created now has been started: whatever was due before it has
    /// been taken up by then.
    pub async fn settle(&self, id: &str) {
        self.api.create(id, |_| {});
        self.until_phase(id, "Running").await;
    }

    /// Ends the controller.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running.join_next()).await;
        let ended = ended.expect("the controller ends").expect("it ran");
        ended.expect("no panic").expect("no task failed");
    }
}

/// A controller of the API server at these addresses. The sender keeps its token.
pub fn controller(
    plan: &Plan,
    rest: &str,
    grpc: &str,
    token: &str,
    issuer: &Arc<FakeIssuer>,
) -> (Controller, Api) {
    install_crypto_provider();
    let resolver = Resolver::system();
    let address = GrpcAddress {
        address: grpc.to_owned(),
        tls: false,
        ca: None,
    };
    let channel = grpc_channel(&resolver, &address).unwrap();
    let (_, token) = watch::channel(Some(Token::new(token, None).unwrap()));
    let api = Api::new(channel, token.clone());
    let roots = trust_roots(None).unwrap();
    let rest = rest.parse().unwrap();
    let http = http_client_to(&rest, &resolver, roots, Duration::from_secs(30)).unwrap();
    let rest = RestClient::new(http, &rest, token);
    let settings = ControllerSettings {
        desired: DesiredSettings {
            default_agent_command: Some(vec!["agent".to_owned()]),
            messages: true,
            ..DesiredSettings::default()
        },
        refresh: RefreshSettings {
            interval: plan.refresh,
            ..RefreshSettings::default()
        },
        resync: plan.resync,
        ..ControllerSettings::default()
    };
    let controller = Controller::new(
        api.clone(),
        rest,
        Arc::clone(issuer) as _,
        crate::endpoint::scene::keyring(ROOT),
        settings,
        Clock::system(),
    );
    (controller, api)
}

/// The root of session keys.
pub const ROOT: [u8; 32] = [7; 32];

/// A session id for tests.
pub fn id(text: &str) -> SessionId {
    SessionId::parse(text).unwrap()
}

/// How often each session appears.
pub fn count(ids: impl IntoIterator<Item = SessionId>) -> HashMap<SessionId, usize> {
    let mut counts = HashMap::new();
    for id in ids {
        *counts.entry(id).or_default() += 1;
    }
    counts
}
