//! Container entrypoint: keeps the API token fresh, supervises the agent, carries its messages.
//!
//! settings → token → refresher =watch=> handover, bridge. The agent is the container's one
//! purpose: the runner starts it as soon as there is a token, and ends with its exit code.
#![deny(unsafe_code)]

mod agent;
mod bridge;
pub mod install;
mod metrics;
pub mod settings;
mod token;

use std::{
    convert::Infallible,
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ::metrics::{counter, gauge};
use ambient_shared::{
    admin::{self, Readiness},
    api::Api,
    bearer::BearerError,
    client::{self, ClientError},
    clock::Clock,
    exchange::Exchange,
    exit,
    resolve::Resolver,
    settings::InvalidSettings,
    tasks::{TaskFailure, Tasks},
    telemetry::{self, TelemetryError},
};
use rustls::RootCertStore;
use secrecy::ExposeSecret as _;
use tokio::{net::TcpListener, sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    agent::{
        Agent, AgentEnvironment, AgentIo, RunningAgent, StartError,
        addresses::{NoSidecar, SidecarAddresses},
        hook::Hook,
        mask::Masker,
        passthrough::{Input, copy_masked},
        reaper::{self, Reaper},
        signals::{self, Signals},
        supervisor::{Order, Outcome, Supervisor, Why},
        sys::{self, Ended},
    },
    bridge::{Bridge, BridgeError, BridgeSettings, format},
    settings::{OnRefresh, Settings},
    token::{
        ReadError, Sources,
        handover::{Handover, HandoverError, Then},
        read_session_key,
        refresher::{NoToken, Refresher, TokenHandle},
    },
};

/// Longest time from the agent's end to that of its output: 60 s are what Kubernetes gives a pod
/// (contract section 3), and the agent's own grace period comes first.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// Longest time that the runner's own tasks take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Why the runner ends, other than with its agent.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Something that settings name cannot be used.
    #[error(transparent)]
    Settings(#[from] InvalidSettings),
    /// No token.
    #[error(transparent)]
    Token(NoToken),
    /// The sidecar is missing.
    #[error(transparent)]
    Sidecar(NoSidecar),
    /// The agent cannot be started.
    #[error(transparent)]
    Start(StartError),
    /// Messages cannot be carried.
    #[error("the agent's messages cannot be carried")]
    Bridge(#[source] BridgeFailure),
    /// Telemetry cannot be set up.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// A task of the runner broke.
    #[error("a part of the runner failed")]
    Task(#[from] TaskFailure),
}

/// How the bridge failed.
#[derive(Debug, thiserror::Error)]
pub enum BridgeFailure {
    /// Before the agent said anything.
    #[error(transparent)]
    Start(BridgeError),
    /// Later.
    #[error(transparent)]
    Run(TaskFailure),
}

impl Failure {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_) => exit::CONFIG,
            Self::Token(_) | Self::Sidecar(_) | Self::Bridge(_) => exit::UNAVAILABLE,
            Self::Start(error) => error.exit_code(),
            Self::Telemetry(_) | Self::Signals(_) | Self::Task(_) => exit::SOFTWARE,
        }
    }
}

/// How a run ended with its agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The process's exit code.
    pub exit_code: u8,
    /// What the termination log should say; nothing when all went well.
    pub last_words: Option<String>,
}

/// What everything else hangs on; made before the token is there.
struct Runner {
    settings: Settings,
    clock: Clock,
    masker: Masker,
    reaper: Reaper,
    tokens: TokenHandle,
    api: Option<Api>,
    agent_runs: Arc<AtomicBool>,
}

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
    let mut signals = Signals::catch().map_err(Failure::Signals)?;
    let children = reaper::children().map_err(Failure::Signals)?;
    let metrics_page = telemetry::init_metrics()?;
    metrics::describe();
    let clock = Clock::system();
    let reaper = Reaper::default();
    let shutdown = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    let reaping = reaper.clone().run(children);
    tasks.spawn("reaper", until(shutdown.clone(), reaping));

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
    let runner = Runner {
        settings,
        clock,
        masker,
        reaper,
        tokens,
        api,
        agent_runs,
    };
    let prepared = tokio::select! {
        prepared = runner.wait_for_token(&refresher) => prepared?,
        number = signals.next_end() => return Ok(ended_early(number)),
    };
    tasks.spawn("refresher", refresher.run(shutdown.clone()));
    let (mut handover, orders) = runner.handover(&prepared);
    handover.first().await.map_err(|error| {
        Failure::Settings(InvalidSettings(exit::report(&error as &HandoverError)))
    })?;
    tasks.spawn("handover", handover.run(shutdown.clone()));

    let supervisor = Supervisor {
        signals,
        orders,
        reaper: runner.reaper.clone(),
        grace: runner.settings.grace,
        times_out_at: runner.settings.timeout.map(|life| Instant::now() + life),
    };
    // A task that breaks cancels `shutdown`, which ends the agent: without a fresh token, or
    // without anybody who collects what ends, it would only seem to run.
    let (finished, background) = tokio::join!(
        runner.run_agents(supervisor, prepared, &shutdown),
        tasks.run_until_shutdown(DRAIN_LIMIT),
    );
    let finished = finished?;
    background?;
    Ok(finished)
}

impl Runner {
    /// The first token, and meanwhile the sidecar's addresses: the agent's environment.
    async fn wait_for_token(&self, refresher: &Refresher) -> Result<AgentEnvironment, Failure> {
        let settings = &self.settings;
        let sidecar = async {
            match settings.sidecar_addresses.clone() {
                Some(path) => SidecarAddresses::wait(path).await.map(Some),
                None => Ok(None),
            }
        };
        let token = async {
            let first = refresher.first(settings.token_timeout).await;
            first.map_err(Failure::Token)
        };
        let sidecar = async { sidecar.await.map_err(Failure::Sidecar) };
        let ((), addresses) = tokio::try_join!(token, sidecar)?;

        let mut environment = AgentEnvironment::new(settings::environment(), &settings.hold_back);
        environment.set("AMBIENT_TOKEN_FILE", &settings.token_file);
        if let Some(addresses) = addresses {
            addresses.add_to(&mut environment);
        }
        if let Some(prompt) = self.prompt().filter(|_| settings.io == AgentIo::None) {
            environment.set("INITIAL_PROMPT", prompt);
        }
        Ok(environment)
    }

    /// The prompt, when it is to be handed over by the runner itself.
    fn prompt(&self) -> Option<&String> {
        let prompt = self.settings.initial_prompt.as_ref();
        prompt.filter(|_| !self.settings.is_resume)
    }

    fn handover(&self, environment: &AgentEnvironment) -> (Handover, mpsc::Receiver<Order>) {
        // One order that waits stands for all that follow it.
        let (orders, received) = mpsc::channel(1);
        let then = match &self.settings.on_refresh {
            OnRefresh::None => Then::Nothing,
            OnRefresh::Signal(signal) => Then::Order(orders, Order::Signal(*signal as i32)),
            OnRefresh::Restart => Then::Order(orders, Order::Restart),
            OnRefresh::Command(program) => Then::Run(Hook::new(
                program.clone(),
                environment.clone(),
                self.reaper.clone(),
            )),
        };
        let handover = Handover::new(self.settings.token_file.clone(), self.tokens.latest(), then);
        (handover, received)
    }

    /// Starts the agent, again after each end that was for a restart. Cancels `shutdown` at the
    /// end.
    async fn run_agents(
        &self,
        mut supervisor: Supervisor,
        environment: AgentEnvironment,
        shutdown: &CancellationToken,
    ) -> Result<Finished, Failure> {
        let _end_all = shutdown.clone().drop_guard();
        let agent = Agent {
            command: self.settings.command.clone(),
            environment,
            io: self.settings.io,
            foreground: self.settings.io == AgentIo::None && sys::has_terminal(),
        };
        let mut input = None;
        let mut is_restart = false;
        loop {
            let bridge = self.bridge(is_restart)?;
            let mut running = agent.start(&self.reaper).map_err(Failure::Start)?;
            info!(pid = running.pid, restart = is_restart, "agent started");
            counter!(metrics::AGENT_STARTS).increment(1);
            #[expect(
                clippy::cast_precision_loss,
                reason = "exact until the year 285 million"
            )]
            gauge!(metrics::AGENT_START).set(self.clock.unix_seconds() as f64);
            self.agent_runs.store(true, Ordering::Relaxed);

            let first = self.first_input(bridge.is_some() || is_restart);
            let (outcome, carried) = self
                .run_one(
                    &mut supervisor,
                    &mut running,
                    bridge,
                    &mut input,
                    first,
                    shutdown,
                )
                .await;
            self.agent_runs.store(false, Ordering::Relaxed);
            if agent.foreground {
                sys::take_terminal();
            }
            if outcome.why == Some(Why::Restart) && carried.is_ok() && !shutdown.is_cancelled() {
                is_restart = true;
                continue;
            }
            return self.finish(outcome, carried);
        }
    }

    /// One agent with its stdio, until both have ended.
    async fn run_one(
        &self,
        supervisor: &mut Supervisor,
        running: &mut RunningAgent,
        bridge: Option<Bridge>,
        input: &mut Option<Input>,
        first: Option<String>,
        shutdown: &CancellationToken,
    ) -> (Outcome, Result<(), TaskFailure>) {
        // Cancelled by the agent's end, by a failure of its stdio, or by that of a task.
        let over = shutdown.child_token();
        let mut stdio = Tasks::new(over.clone());
        let mut typed = None;
        if let Some((pipes, stderr)) = running.pipes.take() {
            let masker = self.masker.clone();
            stdio.spawn(
                "stderr",
                log_end("stderr", copy_masked(stderr, tokio::io::stderr(), masker)),
            );
            if let Some(bridge) = bridge {
                stdio.spawn_fallible("bridge", bridge.run(pipes, over.clone()));
            } else {
                let masker = self.masker.clone();
                let copy = copy_masked(pipes.stdout, tokio::io::stdout(), masker);
                stdio.spawn("stdout", log_end("stdout", copy));
                typed = Some((input.get_or_insert_with(Input::stdin), pipes.stdin));
            }
        }
        let typing = async {
            if let Some((input, stdin)) = typed {
                log_end("stdin", input.feed(first, stdin)).await;
            }
            // The agent's end is what is waited for.
            std::future::pending::<Infallible>().await
        };
        let watching = async {
            let outcome = tokio::select! {
                outcome = supervisor.watch(running, &over) => outcome,
                never = typing => match never {},
            };
            over.cancel();
            outcome
        };
        tokio::join!(watching, stdio.run_until_shutdown(FLUSH_LIMIT))
    }

    /// A bridge for the next agent, when messages are on and there are pipes. One that follows a
    /// restart goes on where the last one ended, as if the session were resumed.
    fn bridge(&self, is_restart: bool) -> Result<Option<Bridge>, Failure> {
        let settings = &self.settings;
        let (Some(api), Some(session)) = (&self.api, &settings.session) else {
            return Ok(None);
        };
        if settings.io == AgentIo::None {
            return Ok(None);
        }
        let bridge_settings = BridgeSettings {
            session: session.clone(),
            io: settings.io,
            turns: settings.turns,
            spool_dir: settings.spool_dir.clone(),
            initial_prompt: settings.initial_prompt.clone(),
            preamble: settings.preamble.clone(),
            is_resume: settings.is_resume || is_restart,
        };
        Bridge::new(
            bridge_settings,
            api.clone(),
            self.tokens.clone(),
            self.masker.clone(),
            self.clock.clone(),
        )
        .map(Some)
        .map_err(|error| Failure::Bridge(BridgeFailure::Start(error)))
    }

    /// What the agent's stdin gets before anything else, when nobody else hands the prompt over.
    fn first_input(&self, handed_over: bool) -> Option<String> {
        let io = self.settings.io;
        self.prompt()
            .filter(|_| !handed_over && io != AgentIo::None)
            .map(|prompt| format::to_agent(io, prompt))
    }

    /// The exit code: the agent's own, unless it was ended for another reason.
    fn finish(
        &self,
        outcome: Outcome,
        carried: Result<(), TaskFailure>,
    ) -> Result<Finished, Failure> {
        let (own, how) = match outcome.ended {
            Ended::Exited(code) => (code, format!("agent ended with exit code {code}")),
            Ended::Signalled(number) => (
                signal_code(number),
                format!("agent was ended by {}", signals::name(number)),
            ),
        };
        if let Err(failure) = carried
            && (own == 0 || outcome.why == Some(Why::Stopped))
        {
            return Err(Failure::Bridge(BridgeFailure::Run(failure)));
        }
        let (exit_code, last_words) = match (outcome.why, self.settings.timeout) {
            (Some(Why::TimedOut), Some(timeout)) => {
                let after = humantime::format_duration(timeout);
                (
                    exit::TIMED_OUT,
                    Some(format!("agent was ended after its TIMEOUT of {after}")),
                )
            }
            _ => (own, (own != 0).then_some(how)),
        };
        Ok(Finished {
            exit_code,
            last_words,
        })
    }
}

/// Where tokens come from. Everything that the runner must not let out is told to the masker.
async fn sources(settings: &Settings, masker: &Masker, clock: &Clock) -> Result<Sources, Failure> {
    for secret in &settings.other_secrets {
        masker.add_secret(secret.expose_secret());
    }
    if let Some(token) = &settings.bot_token {
        masker.add_secret(token.expose());
    }
    let mut endpoint = None;
    if let (Some((url, public_key)), Some(session)) = (&settings.endpoint, &settings.session) {
        let key = read_session_key(&settings.session_key_file).await;
        let key = key.map_err(|error: ReadError| fault("AMBIENT_SESSION_KEY_FILE", &error))?;
        match &key {
            Some(key) => masker.add_secret(key.expose()),
            None => debug!("no session key: token requests carry no proof"),
        }
        // Once a process, so that the server's cache knows it.
        let bearer = public_key
            .encrypt(session)
            .map_err(|error: BearerError| fault("SESSION_ID", &error))?;
        masker.add_secret(bearer.as_str());
        // Reading the system's certificates takes longer than the exchange.
        let roots = if url.scheme() == "https" {
            client::trust_roots(settings.ca.as_deref()).map_err(|error| of_client(&error))?
        } else {
            RootCertStore::empty()
        };
        let timeout = ambient_shared::exchange::TIMEOUT;
        let http = client::http_client(&Resolver::system(), roots, timeout)
            .map_err(|error| of_client(&error))?;
        endpoint = Some(Exchange::new(http, url.clone(), bearer, key, clock.clone()));
    }
    Ok(Sources {
        endpoint,
        file: settings.bot_token_file.clone(),
        fixed: settings.bot_token.clone(),
    })
}

/// The API server, when messages are on. It is connected to when first needed.
fn connect(settings: &Settings, tokens: &TokenHandle) -> Result<Option<Api>, Failure> {
    let Some(grpc) = &settings.grpc else {
        return Ok(None);
    };
    if settings.io == AgentIo::None {
        warn!("messages are on, but AMBIENT_AGENT_IO=none has no way to carry them");
    }
    let channel =
        client::grpc_channel(&Resolver::system(), grpc).map_err(|error| of_client(&error))?;
    Ok(Some(Api::new(channel, tokens.latest())))
}

async fn listen(settings: &Settings) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(settings.admin_listen).await;
    let bound = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = bound.map_err(|error| {
        let asked = settings.admin_listen;
        let line = format!("AMBIENT_ADMIN_LISTEN: cannot listen on {asked}: {error}");
        Failure::Settings(InvalidSettings(line))
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

/// A file or address that a setting names is at fault, so the setting is.
fn fault(variable: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    let line = format!("{variable}: {}", exit::report(error));
    Failure::Settings(InvalidSettings(line))
}

fn of_client(error: &ClientError) -> Failure {
    match error {
        ClientError::Certificates { .. } => fault("AMBIENT_GRPC_CA_CERT_FILE", error),
        ClientError::Address { .. } => fault("AMBIENT_GRPC_URL", error),
        ClientError::Http(_) | ClientError::Tls(_) => fault("TLS", error),
    }
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

fn signal_code(number: i32) -> u8 {
    exit::SIGNAL_BASE.saturating_add(u8::try_from(number).unwrap_or(u8::MAX))
}

async fn until(shutdown: CancellationToken, work: impl Future<Output = ()>) {
    shutdown.run_until_cancelled(work).await;
}

/// Copies end with whoever is at the other end: that is no failure of the runner.
async fn log_end(of: &'static str, copy: impl Future<Output = io::Result<()>>) {
    match copy.await {
        Ok(()) => debug!(of, "at its end"),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => debug!(of, "closed"),
        Err(error) => error!(of, %error, "agent's stdio broke"),
    }
}
