//! What runs with a Kubernetes cluster: token endpoint, controllers of sessions and projects,
//! refresh.
//!
//! settings → cluster → keys → issuer → endpoint, controller → backend. The admin port is there
//! first, so that a start which waits for something can be looked into; the token endpoint answers
//! once the keys are there. Every replica follows sessions and their runs; the controllers begin
//! once it is known what runs and this replica leads.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use ambient_shared::{
    admin,
    api::Api,
    client::{GrpcAddress, grpc_channel, http_client_to, trust_roots},
    clock::Clock,
    exit,
    resolve::Resolver,
    retry::{Backoff, Policy},
    tasks::{Tasks, cancel_on_signal},
    telemetry::MetricsPage,
    token::Token,
};
use secrecy::ExposeSecret as _;
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    backend::{
        Backend,
        kubernetes::{KubernetesBackend, KubernetesTasks, projects::Projects},
    },
    cluster::{self, Clients, Fence},
    controller::{Controller, ControllerSettings},
    endpoint::{
        ConnectionLimits, Endpoint, EndpointSettings, Parts, StandingOf, late, lookup::Lookup,
    },
    issuer::{
        Issuer,
        fixed::FixedIssuer,
        minted::{AUDIENCE, ISSUER, MintedIssuer},
        oidc::OidcIssuer,
    },
    keypair::{
        KeypairStore as _, Keyring, Keys, reload::Reload, rotation::Rotation,
        secret::SecretKeypairStore,
    },
    leader::{Elector, Leadership},
    projects::ProjectController,
    reconcile::desired::{DesiredSettings, Place, PodLimits},
    refresh::RefreshSettings,
    sessions::rest::RestClient,
    settings::{IssuerSettings, ServeSettings},
};

mod error;
mod notices;
mod readiness;
mod session_tokens;
mod term;

pub use error::ServeError;
use notices::Notices;
use readiness::{Known, Start};
use term::Leads;

/// How long what runs may take to end when the program is asked to: below the 30 s that Kubernetes
/// gives, and above what the controller takes.
const DRAIN: Duration = Duration::from_secs(25);

/// Longest request to the API server's REST.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// Time between two complete looks at the API server's sessions and projects while the watches are
/// healthy.
const RESYNC: Duration = Duration::from_mins(5);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// [`ServeError`] says why it cannot start, or what broke.
pub async fn run(settings: ServeSettings, metrics: MetricsPage) -> Result<(), ServeError> {
    // First of all: whoever starts us may stop us before we are up.
    let shutdown = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_fallible("signals", cancel_on_signal(shutdown.clone()));
    let start: Arc<Start> = Arc::default();
    let admin = bind_admin(&settings).await?;
    let routes = admin::routes(metrics, Arc::clone(&start).readiness());
    tasks.spawn_fallible("admin", admin::serve(admin, routes, shutdown.clone()));
    let serving = Box::pin(serve(settings, &start, shutdown));
    tasks.around(DRAIN, serving).await
}

/// All but signals and the admin port.
async fn serve(
    settings: ServeSettings,
    start: &Arc<Start>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let leadership = Leadership::default();
    let fence = {
        let leadership = leadership.clone();
        Fence::new(move || leadership.is_held())
    };
    let clients = cluster::connect(&settings.cluster, fence.clone()).await?;
    let notices = Notices::of(
        clients.own.clone(),
        &settings.kubernetes.namespace,
        &settings.replica,
        settings.pod_uid.as_deref(),
    );
    let ready = Arc::clone(start).readiness();
    let parts = Box::pin(run_parts(
        settings, clients, fence, leadership, start, shutdown,
    ));
    match notices {
        Some(notices) => notices.during(ready, parts).await,
        None => parts.await,
    }
}

/// Loads the keys, then runs all parts.
async fn run_parts(
    settings: ServeSettings,
    clients: Clients,
    fence: Fence,
    leadership: Leadership,
    start: &Start,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let store = SecretKeypairStore {
        client: clients.own.clone(),
        namespace: settings.kubernetes.namespace.clone(),
    };
    let minted_life = settings.issuer.minted_life();
    let Some(keys) = load_keys(&store, minted_life, start, &shutdown).await? else {
        return Ok(());
    };
    let elector = Elector::new(
        clients.own.clone(),
        &settings.kubernetes.namespace,
        &settings.replica,
        settings.lease,
        leadership.clone(),
        Clock::system(),
    );
    let keys = Keyring::new(keys);
    let plane = ControlPlane::bind(settings, clients, fence, elector, store, keys).await?;
    // Set once, here.
    let _ = start.known.set(Known {
        sessions: plane.leads.controller.cache(),
        backend: plane.leads.backend.clone(),
        leadership,
    });
    plane.run(shutdown).await
}

async fn bind_admin(settings: &ServeSettings) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Admin {
        address: settings.admin_listen,
        source,
    };
    let listener = TcpListener::bind(settings.admin_listen)
        .await
        .map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    info!(%address, port_of = "admin", "listening");
    Ok(listener)
}

/// The keys, tried again until `shutdown` (then none): the Kubernetes API may just be restarting.
async fn load_keys(
    store: &SecretKeypairStore,
    minted_life: Option<Duration>,
    start: &Start,
    shutdown: &CancellationToken,
) -> Result<Option<Keys>, ServeError> {
    let mut backoff = Backoff::new(Policy::default());
    let load = async || {
        // Before any is signed. Who cannot note it signs all the same: what for is rare.
        if let Some(life) = minted_life
            && let Err(error) = store.note_token_life(life).await
        {
            warn!(reason = %exit::report(&error), "cannot note how long tokens of the signing key live");
        }
        store.load_or_create().await
    };
    loop {
        let Some(loaded) = shutdown.run_until_cancelled(load()).await else {
            return Ok(None);
        };
        match loaded {
            Ok(keys) => return Ok(Some(keys)),
            Err(error) if error.exit_code() == exit::CONFIG => return Err(error.into()),
            Err(error) => {
                let reason = exit::report(&error);
                warn!(%reason, "cannot load the keys; trying again");
                start.no_keys(reason);
            }
        }
        let pause = sleep(backoff.next_wait());
        if shutdown.run_until_cancelled(pause).await.is_none() {
            return Ok(None);
        }
    }
}

/// All parts, bound to their addresses.
struct ControlPlane {
    endpoint: Endpoint,
    leads: Arc<Leads>,
    elector: Elector,
    reload: Reload,
    watches: KubernetesTasks,
    tokens: Tokens,
    /// Asked whether it limits minted tokens; none when none are minted.
    questioned: Option<(reqwest::Client, url::Url)>,
}

impl ControlPlane {
    async fn bind(
        settings: ServeSettings,
        clients: Clients,
        fence: Fence,
        elector: Elector,
        store: SecretKeypairStore,
        keys: Keyring,
    ) -> Result<Self, ServeError> {
        let clock = Clock::system();
        let tokens = Tokens::new(&settings, &keys, &clock)?;
        let standing: Arc<OnceLock<StandingOf>> = Arc::default();
        let endpoint = Endpoint::bind(
            EndpointSettings {
                listen: settings.token_listen,
                allow_unproven: settings.allow_unproven,
                rate_limits: settings.rate_limits,
                connections: ConnectionLimits::default(),
                tls: settings.token_tls.clone(),
            },
            Parts {
                keys: keys.clone(),
                issuer: Arc::clone(&tokens.issuer),
                standing: late(Arc::clone(&standing)),
                clock: clock.clone(),
            },
        )
        .await?;

        let resolver = Resolver::system();
        let channel = grpc_channel(
            &resolver,
            &GrpcAddress {
                address: settings.grpc_address.clone(),
                tls: settings.grpc_tls,
                ca: None,
            },
        )?;
        let http = http_client_to(
            &settings.api_url,
            &resolver,
            trust_roots(None)?,
            REQUEST_LIMIT,
        )?;
        let api = Api::new(channel, tokens.own.clone());
        let rest = RestClient::new(http.clone(), &settings.api_url, tokens.own.clone());
        let controller = Controller::new(
            api.clone(),
            rest,
            Arc::clone(&tokens.issuer),
            keys.clone(),
            ControllerSettings {
                desired: desired(&settings),
                authority: settings.token_ca,
                refresh: RefreshSettings {
                    interval: settings.refresh,
                    ..RefreshSettings::default()
                },
                resync: RESYNC,
                fence,
                ..ControllerSettings::default()
            },
            clock.clone(),
        );
        let kubernetes = Arc::new(settings.kubernetes);
        let projects = Arc::new(Projects::new(clients.clone(), Arc::clone(&kubernetes)));
        let sessions = controller.cache();
        let (backend, watches) = KubernetesBackend::new(
            &clients,
            kubernetes,
            Arc::clone(&projects),
            Arc::new(move |id| sessions.get(id)?.object.project_id.clone()),
            controller.observer(),
            clock.clone(),
        );
        let backend = Arc::new(backend);
        let runs: Arc<dyn Backend> = backend.clone();
        let lookup = Lookup::new(controller.cache(), api.clone(), Arc::clone(&runs));
        // Set once, here; an error is impossible.
        let _ = standing.set(lookup.into_standing_of());
        let minted_life = settings.issuer.minted_life();
        Ok(Self {
            endpoint,
            leads: Arc::new(Leads {
                controller,
                projects: ProjectController::new(api, projects, RESYNC, clock.clone()),
                backend,
                rotation: Rotation {
                    // Of who leads no more, no step is taken.
                    store: SecretKeypairStore {
                        client: clients.upkeep.clone(),
                        namespace: store.namespace.clone(),
                    },
                    keyring: keys.clone(),
                    backend: runs,
                    token_life: minted_life,
                    clock: clock.clone(),
                    waits: settings.rotation,
                },
            }),
            reload: Reload::new(store, keys, clock, &settings.replica),
            elector,
            watches,
            tokens,
            questioned: minted_life.map(|_| (http, settings.api_url)),
        })
    }

    /// Runs until `shutdown`: what leads ends first, since it still needs the others.
    async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let servers = CancellationToken::new();
        // When a server fails, the controllers end too.
        let stops = servers.child_token();
        let mut tasks = Tasks::new(servers.clone());
        tasks.spawn_fallible("token endpoint", self.endpoint.run(servers.clone()));
        if let Some(oidc) = self.tokens.oidc {
            let servers = servers.clone();
            tasks.spawn("oidc", async move { oidc.run(servers).await });
        }
        if let Some((http, url)) = self.questioned {
            let asked = session_tokens::confirm(http, url, stops.clone());
            tasks.spawn_fallible("question to the API server", asked);
        }
        tasks.spawn("keys", self.reload.run(servers.clone()));
        tasks.spawn_fallible("Kubernetes backend", self.watches.run(servers.clone()));
        tasks.spawn_fallible("sessions as known", {
            let (leads, stops) = (Arc::clone(&self.leads), servers.clone());
            async move { leads.follow(stops).await }
        });
        tasks.spawn_fallible("leadership", {
            let (leads, stops, servers) = (self.leads, stops.clone(), servers.clone());
            let (elector, own_token) = (self.elector, self.tokens.fixed);
            async move {
                let ended = leads.contend(elector, stops).await;
                drop(own_token);
                servers.cancel();
                ended
            }
        });
        tasks.spawn("shutdown", async move {
            tokio::select! {
                () = shutdown.cancelled() => stops.cancel(),
                () = stops.cancelled() => {}
            }
        });
        Ok(tasks.run_until_shutdown(DRAIN).await?)
    }
}

/// Where tokens come from.
struct Tokens {
    /// Sessions' tokens.
    issuer: Arc<dyn Issuer>,
    /// Our own token for the API server.
    own: watch::Receiver<Option<Token>>,
    /// What must run when our own token comes from an identity provider.
    oidc: Option<Arc<OidcIssuer>>,
    /// Keeps a fixed token readable.
    fixed: Option<watch::Sender<Option<Token>>>,
}

impl Tokens {
    fn new(settings: &ServeSettings, keys: &Keyring, clock: &Clock) -> Result<Self, ServeError> {
        let (mut oidc, mut sender) = (None, None);
        let own = match &settings.own {
            IssuerSettings::Oidc {
                url,
                client_id,
                client_secret,
            } => {
                let provider = OidcIssuer::connect(url, client_id, client_secret, clock)?;
                let token = provider.subscribe();
                oidc = Some(Arc::new(provider));
                token
            }
            IssuerSettings::Static { token } => {
                let token = Token::new(token.expose_secret(), None)?;
                let (fixed, own) = watch::channel(Some(token));
                sender = Some(fixed);
                own
            }
            // The settings give one of the two above.
            IssuerSettings::Minted { .. } => watch::channel(None).1,
        };
        let issuer: Arc<dyn Issuer> = match (&settings.issuer, &oidc) {
            (IssuerSettings::Oidc { .. }, Some(oidc)) => oidc.clone(),
            (IssuerSettings::Static { token }, _) => Arc::new(FixedIssuer::new(token)?),
            (IssuerSettings::Minted { life }, _) => Arc::new(minted(keys, *life, clock)),
            (
                IssuerSettings::Oidc {
                    url,
                    client_id,
                    client_secret,
                },
                None,
            ) => {
                let provider = OidcIssuer::connect(url, client_id, client_secret, clock)?;
                let provider = Arc::new(provider);
                oidc = Some(Arc::clone(&provider));
                provider
            }
        };
        Ok(Self {
            issuer,
            own,
            oidc,
            fixed: sender,
        })
    }
}

fn minted(keys: &Keyring, life: Duration, clock: &Clock) -> MintedIssuer {
    MintedIssuer::new(
        keys.clone(),
        ISSUER.to_owned(),
        AUDIENCE.to_owned(),
        life,
        clock.clone(),
    )
}

/// What sessions' environments have in common.
fn desired(settings: &ServeSettings) -> DesiredSettings {
    DesiredSettings {
        token_url: settings.token_url.to_string(),
        token_ca: None,
        api_rest_url: settings.kubernetes.upstream.clone(),
        api_grpc_url: settings.grpc_address.clone(),
        grpc_tls: settings.grpc_tls,
        grpc_ca_file: None,
        messages: true,
        default_agent_command: settings.agent_command.clone(),
        default_agent_io: None,
        runner_log_level: settings.runner_log_level.clone(),
        passed_on: settings.passed_on.clone(),
        place: Place::Pods(PodLimits {
            default_image: settings.kubernetes.images.agent.clone(),
            allowed_images: settings.agent_image_allow.clone(),
            max_resources: settings.max_resources.clone(),
        }),
    }
}
