//! Local mode: everything on one machine, sessions as processes (docs/local.md).
//!
//! In: checked settings. Out: an API server, a token endpoint and the controller in this process,
//! and a detached shim for each session. Nothing but the data folder outlives this process, apart
//! from the sessions, which the next start on that folder adopts.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use ambient_api_server::{Database, JwksSource, Server};
use ambient_shared::{
    admin,
    api::Api,
    client::{GrpcAddress, grpc_channel, http_client_to, trust_roots},
    clock::Clock,
    resolve::Resolver,
    rest::BASE,
    tasks::{Tasks, cancel_on_signal},
    telemetry::MetricsPage,
    token::Token,
};
use secrecy::SecretString;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    backend::{
        Backend,
        process::{ProcessBackend, ProcessSettings, Programs},
    },
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
        KeypairStore as _, Keyring,
        files::{FOLDER, FileKeypairStore, JWKS},
    },
    reconcile::desired::{DesiredSettings, Place},
    refresh::RefreshSettings,
    settings::{IssuerSettings, LocalSettings, Mode},
};
use addresses::reachable;
use folder::{Addresses, DataDir};

mod addresses;
mod conversation;
pub mod demo;
mod ending;
mod error;
pub mod folder;
mod follow;
mod greeting;
pub mod run;
pub mod shim;

pub use error::LocalError;

/// How long what runs may take to end when the program is asked to.
const DRAIN: Duration = Duration::from_secs(10);

/// Longest request of our own to our own API server.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// Runs local mode, and gives the exit code.
///
/// # Errors
/// [`LocalError`] says why it cannot start, or what broke.
pub async fn run(settings: LocalSettings, metrics: MetricsPage) -> Result<u8, LocalError> {
    match settings.mode.clone() {
        Mode::Serve => serve(&settings, metrics).await,
        Mode::Run { command, io, turns } => run::run(&settings, metrics, command, io, turns).await,
        Mode::Demo => demo::run(&settings, metrics).await,
    }
}

/// Stays up until a signal; sessions go on.
async fn serve(settings: &LocalSettings, metrics: MetricsPage) -> Result<u8, LocalError> {
    // First of all: whoever starts us may stop us before we are up.
    let shutdown = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn_fallible("signals", cancel_on_signal(shutdown.clone()));
    let serving = async {
        let local = Local::bind(settings, metrics).await?;
        local.say_how_to_talk();
        local.run(shutdown).await
    };
    tasks.around(DRAIN, Box::pin(serving)).await?.close()?;
    Ok(0)
}

/// All parts of local mode, bound to their addresses.
pub(crate) struct Local {
    data: DataDir,
    server: Server,
    endpoint: Endpoint,
    controller: Controller,
    oidc: Option<Arc<OidcIssuer>>,
    /// Where sessions run.
    pub(crate) backend: Arc<ProcessBackend>,
    /// The API as the operator sees it.
    pub(crate) operator: Operator,
    addresses: Addresses,
    /// Keeps the clients' tokens readable.
    _tokens: [watch::Sender<Option<Token>>; 2],
}

/// The API as the operator sees it.
#[derive(Clone)]
pub(crate) struct Operator {
    /// gRPC.
    pub(crate) api: Api,
    /// REST.
    pub(crate) http: reqwest::Client,
    /// REST base URL with its path.
    pub(crate) rest: String,
    /// The operator's token.
    pub(crate) token: Token,
}

impl Local {
    pub(crate) async fn bind(
        settings: &LocalSettings,
        metrics: MetricsPage,
    ) -> Result<Self, LocalError> {
        let clock = Clock::system();
        let programs = Programs::find()?;
        let data = DataDir::open(settings.data_dir.as_deref())?;
        let store = FileKeypairStore {
            folder: data.path().to_owned(),
        };
        let keys = Keyring::new(store.load_or_create().await?);
        let operator_token = data.operator_token()?;
        let (issuer, oidc) = issuer(settings, &keys, &clock)?;

        let asked = addresses::asked(settings, &data).await?;
        let service_token = match &settings.issuer {
            // Sessions get this token, so the API server must know it; it makes them, and us,
            // service callers.
            IssuerSettings::Static { token } => {
                Token::new(secrecy::ExposeSecret::expose_secret(token), None)?
            }
            IssuerSettings::Minted { .. } | IssuerSettings::Oidc { .. } => data.service_token()?,
        };
        let server = Server::bind(
            api_settings(settings, &data, &asked, &operator_token, &service_token),
            clock.clone(),
        )
        .await?;
        // Beside REST, with the metrics of everything in this process.
        let admin = admin::routes(metrics, server.readiness());
        let server = server.with_admin(admin);

        // The controller must be told where the endpoint is, and the endpoint asks the
        // controller's cache: it learns of that once both are there.
        let standing: Arc<OnceLock<StandingOf>> = Arc::default();
        let endpoint = Endpoint::bind(
            EndpointSettings {
                listen: asked.token,
                allow_unproven: settings.allow_unproven,
                rate_limits: settings.rate_limits,
                connections: ConnectionLimits::default(),
                tls: None,
            },
            Parts {
                keys: keys.clone(),
                issuer: Arc::clone(&issuer),
                standing: late(Arc::clone(&standing)),
                clock: clock.clone(),
            },
        )
        .await?;
        let addresses = Addresses {
            rest: server.rest_address(),
            grpc: server.grpc_address(),
            token: endpoint.address(),
        };
        data.keep_addresses(&addresses)?;

        let rest_url = format!("http://{}", reachable(addresses.rest));
        let grpc = reachable(addresses.grpc).to_string();
        let resolver = Resolver::system();
        let channel = grpc_channel(
            &resolver,
            &GrpcAddress {
                address: grpc.clone(),
                tls: false,
                ca: None,
            },
        )?;
        let base: Url = rest_url.parse().map_err(LocalError::Url)?;
        let http = http_client_to(&base, &resolver, trust_roots(None)?, REQUEST_LIMIT)?;
        let (service_sender, service) = watch::channel(Some(service_token));
        let (operator_sender, operator) = watch::channel(Some(operator_token.clone()));
        let api = Api::new(channel.clone(), service.clone());
        let controller = Controller::new(
            api.clone(),
            crate::sessions::rest::RestClient::new(http.clone(), &base, service),
            Arc::clone(&issuer),
            keys,
            ControllerSettings {
                desired: desired(settings, &data, &addresses, &rest_url)?,
                refresh: RefreshSettings {
                    interval: settings.refresh,
                    ..RefreshSettings::default()
                },
                ..ControllerSettings::default()
            },
            clock.clone(),
        );
        let backend = ProcessBackend::open(
            ProcessSettings {
                sessions: data.sessions(),
                programs,
                environment: settings.passed_on.clone(),
                upstream: rest_url.clone(),
                grpc_upstream: format!("http://{grpc}"),
                tied: settings.mode != Mode::Serve,
            },
            controller.observer(),
            clock,
        )
        .await?;
        let backend = Arc::new(backend);
        let runs: Arc<dyn Backend> = backend.clone();
        let lookup = Lookup::new(controller.cache(), api, runs);
        // Set once, here; an error is impossible.
        let _ = standing.set(lookup.into_standing_of());
        Ok(Self {
            operator: Operator {
                api: Api::new(channel, operator),
                http,
                rest: format!("{rest_url}{BASE}"),
                token: operator_token,
            },
            data,
            server,
            endpoint,
            controller,
            oidc,
            backend,
            addresses,
            _tokens: [service_sender, operator_sender],
        })
    }

    /// Runs until `shutdown`, the controller first, since it still needs the others; gives the
    /// data folder back.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> Result<DataDir, LocalError> {
        let servers = CancellationToken::new();
        // When a server fails, the controller ends too.
        let controller_stops = servers.child_token();
        let mut tasks = Tasks::new(servers.clone());
        tasks.spawn_fallible("api-server", self.server.run(servers.clone()));
        tasks.spawn_fallible("token-endpoint", self.endpoint.run(servers.clone()));
        if let Some(oidc) = self.oidc {
            let servers = servers.clone();
            tasks.spawn("oidc", async move { oidc.run(servers).await });
        }
        let backend: Arc<dyn Backend> = self.backend;
        tasks.spawn_fallible("controller", {
            let (stops, servers) = (controller_stops.clone(), servers.clone());
            async move {
                let ended = self.controller.run(backend, stops).await;
                servers.cancel();
                ended
            }
        });
        tasks.spawn("shutdown", async move {
            tokio::select! {
                () = shutdown.cancelled() => controller_stops.cancel(),
                () = controller_stops.cancelled() => {}
            }
        });
        tasks.run_until_shutdown(DRAIN).await?;
        Ok(self.data)
    }

    pub(crate) fn data(&self) -> &DataDir {
        &self.data
    }
}

type Issuers = (Arc<dyn Issuer>, Option<Arc<OidcIssuer>>);

fn issuer(settings: &LocalSettings, keys: &Keyring, clock: &Clock) -> Result<Issuers, LocalError> {
    Ok(match &settings.issuer {
        IssuerSettings::Minted { life } => {
            let minted = MintedIssuer::new(
                keys.clone(),
                ISSUER.to_owned(),
                AUDIENCE.to_owned(),
                *life,
                clock.clone(),
            );
            (Arc::new(minted), None)
        }
        IssuerSettings::Static { token } => (Arc::new(FixedIssuer::new(token)?), None),
        IssuerSettings::Oidc {
            url,
            client_id,
            client_secret,
        } => {
            let oidc = OidcIssuer::connect(url, client_id, client_secret, clock)?;
            let oidc = Arc::new(oidc);
            (Arc::clone(&oidc) as Arc<dyn Issuer>, Some(oidc))
        }
    })
}

fn api_settings(
    settings: &LocalSettings,
    data: &DataDir,
    asked: &Addresses,
    operator: &Token,
    service: &Token,
) -> ambient_api_server::Settings {
    let secret = |token: &Token| Some(SecretString::from(token.expose().to_owned()));
    ambient_api_server::Settings {
        rest_listen: asked.rest,
        grpc_listen: asked.grpc,
        admin_listen: None,
        database: Database::File(data.database()),
        jwks: settings.jwks.clone(),
        session_jwks: vec![JwksSource::File(data.path().join(FOLDER).join(JWKS))],
        session_issuer: vec![ISSUER.to_owned()],
        session_audience: vec![AUDIENCE.to_owned()],
        issuer: settings.jwt_issuers.clone(),
        audience: settings.jwt_audiences.clone(),
        api_token: secret(service),
        operator_token: secret(operator),
        service_account: settings.service_account.clone(),
        admins: settings.admins.clone(),
    }
}

fn desired(
    settings: &LocalSettings,
    data: &DataDir,
    addresses: &Addresses,
    rest_url: &str,
) -> Result<DesiredSettings, LocalError> {
    let agent = match &settings.agent_command {
        Some(command) => command.clone(),
        None => data.demo_agent()?,
    };
    Ok(DesiredSettings {
        token_url: format!("http://{}/token", reachable(addresses.token)),
        token_ca: None,
        api_rest_url: rest_url.to_owned(),
        api_grpc_url: reachable(addresses.grpc).to_string(),
        grpc_tls: false,
        grpc_ca_file: None,
        messages: true,
        default_agent_command: Some(agent),
        default_agent_io: None,
        runner_log_level: settings.runner_log_level.clone(),
        // The backend passes on what sessions get from our environment.
        passed_on: std::collections::BTreeMap::new(),
        place: Place::Processes,
    })
}
