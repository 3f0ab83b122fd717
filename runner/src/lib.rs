//! Container entrypoint: keeps the API token fresh, supervises the agent, carries its messages.
//!
//! settings → token → refresher =watch=> handover, bridge. The agent is the container's one
//! purpose: the runner starts it as soon as there is a token, and ends with its exit code.
#![deny(unsafe_code)]

mod agent;
mod bridge;
mod failure;
pub mod install;
mod metrics;
pub mod settings;
mod token;

use std::{
    future::Future,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::{
    admin::{self, Readiness},
    api::Api,
    client,
    clock::Clock,
    exchange::{self, Exchange},
    resolve::Resolver,
    settings::InvalidSettings,
    tasks::{TaskFailure, Tasks},
    telemetry,
};
use rustls::RootCertStore;
use secrecy::ExposeSecret as _;
use tokio::{net::TcpListener, sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use crate::{agent::lives::Finished, failure::Failure};
use crate::{
    agent::{
        AgentEnvironment, AgentIo,
        addresses::SidecarAddresses,
        hook::Hook,
        lives::{Lives, signal_code},
        mask::Masker,
        reaper::{self, Reaper},
        signals::{self, Signals},
        supervisor::{Order, Supervisor},
        sys,
    },
    failure::Cause,
    settings::{OnRefresh, Settings},
    token::{
        Sources,
        handover::{Handover, Then},
        read_session_key,
        refresher::{Refresher, TokenHandle},
    },
};

/// Longest time that the runner's own tasks take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Hardens the process; before threads, and before any secret is read from a file.
pub fn prepare_process() {
    sys::prepare_process();
}

/// Runs one agent to its end. To be called on the process's first thread, with a runtime that
/// runs there: the agent ends when the thread does that started it.
///
/// # Errors
/// [`Failure`] when there is no agent to end with.
pub async fn run(settings: Settings) -> Result<Finished, Failure> {
    Ok(run_to_end(settings).await?)
}

async fn run_to_end(settings: Settings) -> Result<Finished, Cause> {
    let mut signals = Signals::catch().map_err(Cause::Signals)?;
    let children = reaper::children().map_err(Cause::Signals)?;
    let metrics_page = telemetry::init_metrics("ambient-runner")?;
    metrics::describe();
    let clock = Clock::system();
    let reaper = Reaper::default();
    let shutdown = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    let reaping = reaper.clone().run(children);
    tasks.spawn("reaper", until(shutdown.clone(), reaping));

    // Before a token is asked for: a setting that is wrong costs nobody anything.
    if let Some((session, folder)) = settings.spool() {
        bridge::check_spool(folder, session).map_err(Cause::of_bridge)?;
    }
    let masker = Masker::new(clock.clone());
    let sources = sources(&settings, &masker, &clock).await?;
    let (refresher, tokens) = Refresher::new(
        sources,
        settings.session.clone(),
        masker.clone(),
        clock.clone(),
    );
    let agent_runs = Arc::new(AtomicBool::new(false));
    let readiness = readiness(&tokens, &agent_runs, &clock);
    let listener = listen(&settings).await?;
    let routes = admin::routes(metrics_page, readiness);
    tasks.spawn_fallible("admin", admin::serve(listener, routes, shutdown.clone()));

    let api = connect(&settings, &tokens)?;
    let lives = Lives {
        settings,
        clock,
        masker,
        reaper,
        tokens,
        api,
        agent_runs,
        runner_start: Arc::new(OnceLock::new()),
    };
    let environment = tokio::select! {
        prepared = prepare(&lives, &refresher) => prepared?,
        number = signals.next_end() => return Ok(ended_early(number)),
    };
    tasks.spawn("refresher", refresher.run(shutdown.clone()));
    let (mut handover, orders) = handover(&lives, &environment);
    let handed = handover.first().await;
    handed.map_err(|error| Cause::fault("AMBIENT_TOKEN_FILE", &error))?;
    tasks.spawn("handover", handover.run(shutdown.clone()));

    let supervisor = Supervisor {
        signals,
        orders,
        reaper: lives.reaper.clone(),
        grace: lives.settings.grace,
        times_out_at: lives.settings.timeout.map(|life| Instant::now() + life),
    };
    // A task that breaks cancels `shutdown`, which ends the agent: without a fresh token, or
    // without anybody who collects what ends, it would only seem to run.
    let (finished, background) = tokio::join!(
        lives.run(supervisor, environment, &shutdown),
        tasks.run_until_shutdown(DRAIN_LIMIT),
    );
    let finished = finished?;
    match background {
        // That the agent had ended is all that ended them: a connection to the admin port that
        // stays open must not change its exit code. It is in the log.
        Ok(()) | Err(TaskFailure::Stuck(_)) => Ok(finished),
        Err(failure) => Err(Cause::Task(failure)),
    }
}

/// Gets the first token, and meanwhile the sidecar's addresses; gives the agent's environment.
async fn prepare(lives: &Lives, refresher: &Refresher) -> Result<AgentEnvironment, Cause> {
    let settings = &lives.settings;
    let token = async { Ok(refresher.first(settings.token_timeout).await?) };
    let sidecar = async {
        match settings.sidecar_addresses.clone() {
            Some(path) => Ok::<_, Cause>(Some(SidecarAddresses::wait(path).await?)),
            None => Ok(None),
        }
    };
    let ((), addresses) = tokio::try_join!(token, sidecar)?;

    let mut environment = AgentEnvironment::new(settings::environment(), &settings.hold_back);
    environment.set("AMBIENT_TOKEN_FILE", &settings.token_file);
    if let Some(addresses) = addresses {
        addresses.add_to(&mut environment);
    }
    if let Some(prompt) = lives.prompt().filter(|_| settings.io == AgentIo::None) {
        environment.set("INITIAL_PROMPT", prompt);
    }
    Ok(environment)
}

fn handover(lives: &Lives, environment: &AgentEnvironment) -> (Handover, mpsc::Receiver<Order>) {
    // One order that waits stands for all that follow it.
    let (orders, received) = mpsc::channel(1);
    let settings = &lives.settings;
    let then = match &settings.on_refresh {
        OnRefresh::None => Then::Nothing,
        OnRefresh::Signal(signal) => Then::Order(orders, Order::Signal(*signal as i32)),
        OnRefresh::Restart => Then::Order(orders, Order::Restart),
        OnRefresh::Command(program) => Then::Run(Arc::new(Hook::new(
            program.clone(),
            environment.clone(),
            lives.reaper.clone(),
        ))),
    };
    let latest = lives.tokens.latest();
    (
        Handover::new(settings.token_file.clone(), latest, then),
        received,
    )
}

/// Where tokens come from. Everything that the runner must not let out is told to the masker.
async fn sources(settings: &Settings, masker: &Masker, clock: &Clock) -> Result<Sources, Cause> {
    for secret in &settings.other_secrets {
        masker.add_secret(secret.expose_secret());
    }
    if let Some(token) = &settings.bot_token {
        masker.add_secret(token.expose());
    }
    let mut endpoint = None;
    if let (Some((url, public_key)), Some(session)) = (&settings.endpoint, &settings.session) {
        let key = read_session_key(&settings.session_key_file).await;
        let key = key.map_err(|error| Cause::fault("AMBIENT_SESSION_KEY_FILE", &error))?;
        if let Some(key) = &key {
            masker.add_secret(key.expose());
        } else {
            debug!("no session key: token requests carry no proof");
        }
        // Once a process, so that the server's cache knows it.
        let bearer = public_key
            .encrypt(session)
            .map_err(|error| Cause::fault("SESSION_ID", &error))?;
        masker.add_secret(bearer.as_str());
        // Reading the system's certificates takes longer than the exchange.
        let mut roots = RootCertStore::empty();
        if url.scheme() == "https" {
            roots = client::trust_roots(settings.ca.as_deref())
                .map_err(|error| Cause::of_client(&error))?;
            roots.add_parsable_certificates(settings.token_ca.iter().cloned());
        }
        let timeout = exchange::TIMEOUT;
        let http = client::http_client_to(url, &Resolver::system(), roots, timeout)
            .map_err(|error| Cause::of_client(&error))?;
        endpoint = Some(Exchange::new(http, url.clone(), bearer, key, clock.clone()));
    }
    Ok(Sources {
        endpoint,
        key_file: settings.session_key_file.clone(),
        file: settings.bot_token_file.clone(),
        fixed: settings.bot_token.clone(),
    })
}

/// The API server, when messages are on. It is connected to when first needed.
fn connect(settings: &Settings, tokens: &TokenHandle) -> Result<Option<Api>, Cause> {
    let Some(grpc) = &settings.grpc else {
        return Ok(None);
    };
    if settings.io == AgentIo::None {
        warn!("messages are on, but AMBIENT_AGENT_IO=none has no way to carry them");
    }
    let channel = client::grpc_channel(&Resolver::system(), grpc)
        .map_err(|error| Cause::of_client(&error))?;
    Ok(Some(Api::new(channel, tokens.latest())))
}

async fn listen(settings: &Settings) -> Result<TcpListener, Cause> {
    let listener = TcpListener::bind(settings.admin_listen).await;
    let bound = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = bound.map_err(|error| {
        let asked = settings.admin_listen;
        let line = format!("AMBIENT_ADMIN_LISTEN: cannot listen on {asked}: {error}");
        Cause::Settings(InvalidSettings(line))
    })?;
    info!(%address, port_of = "admin", "listening");
    Ok(listener)
}

fn readiness(tokens: &TokenHandle, agent_runs: &Arc<AtomicBool>, clock: &Clock) -> Readiness {
    let (latest, agent_runs, clock) = (tokens.latest(), agent_runs.clone(), clock.clone());
    Arc::new(move || match &*latest.borrow() {
        None => Err("no token yet".to_owned()),
        Some(token) if token.is_expired(clock.now()) => Err("token has expired".to_owned()),
        Some(_) if !agent_runs.load(Ordering::Relaxed) => Err("agent does not run".to_owned()),
        Some(_) => Ok(()),
    })
}

/// The runner was asked to end before there was an agent.
fn ended_early(number: i32) -> Finished {
    let name = signals::name(number);
    warn!(signal = name, "ended before the agent was started");
    Finished {
        exit_code: signal_code(number),
        last_words: Some(format!("ended by {name} before the agent was started")),
    }
}

async fn until(shutdown: CancellationToken, work: impl Future<Output = ()>) {
    shutdown.run_until_cancelled(work).await;
}
