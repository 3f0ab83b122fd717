//! All settings, from flags and environment, checked before anything starts.
//!
//! This is the only file that reads the environment. Each flag has a variable (contract section
//! 3); secrets have no flag, as arguments are public. A variable that is set but empty counts as
//! not set.

use std::{
    ffi::{OsStr, OsString},
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ambient_shared::{
    bearer::PublicKey,
    client::{self, GrpcAddress},
    exchange, exit,
    session::SessionId,
    settings::{InvalidSettings, NoSettings, parse_duration, parse_flag, secret},
    telemetry::{self, LogFormat},
    token::Token,
};
use clap::{Parser, Subcommand};
use nix::sys::signal::Signal;
use rustls::pki_types::CertificateDer;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::agent::AgentIo;

/// Service CA of the cluster, used when `AMBIENT_GRPC_CA_CERT_FILE` is missing (contract
/// section 3).
const SERVICE_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/service-ca.crt";

/// Longest time that a setting may ask for, a year: far beyond any session's life, and a clock can
/// still count to it.
const LONGEST_S: u64 = 365 * 24 * 60 * 60;

/// What the program is asked to do.
#[derive(Debug)]
pub enum Action {
    /// Copy the binary into this folder.
    Install(PathBuf),
    /// Start and supervise an agent.
    Run(Box<Settings>),
}

/// Checked settings of a run.
#[derive(Debug)]
pub struct Settings {
    /// The session; needed by the token endpoint and for messages.
    pub(crate) session: Option<SessionId>,
    /// The token endpoint; none: the mounted file and `BOT_TOKEN` are all there is.
    pub(crate) endpoint: Option<(Url, PublicKey)>,
    /// More CA certificates to trust for that.
    pub(crate) token_ca: Vec<CertificateDer<'static>>,
    /// The mounted file with the token that the control plane pushes.
    pub(crate) bot_token_file: PathBuf,
    /// The mounted file with the session's key.
    pub(crate) session_key_file: PathBuf,
    /// `BOT_TOKEN`.
    pub(crate) bot_token: Option<Token>,
    /// Keys in the environment which the agent may know and nobody else should read.
    pub(crate) other_secrets: Vec<SecretString>,
    /// Where the agent finds its token.
    pub(crate) token_file: PathBuf,
    /// Longest wait for the first token.
    pub(crate) token_timeout: Duration,
    /// What happens when the agent's token has changed.
    pub(crate) on_refresh: OnRefresh,
    /// The API server, when messages are on.
    pub(crate) grpc: Option<GrpcAddress>,
    /// More CA certificates to trust.
    pub(crate) ca: Option<PathBuf>,
    /// Messages that are not acknowledged yet.
    pub(crate) spool_dir: PathBuf,
    /// What the agent's stdio is for.
    pub(crate) io: AgentIo,
    /// Close the agent's stdin after this many results; 0: never.
    pub(crate) turns: u32,
    /// The prompt, handed over once.
    pub(crate) initial_prompt: Option<String>,
    /// What goes before the first user message.
    pub(crate) preamble: Option<String>,
    /// Whether the session ran before, and so has its prompt.
    pub(crate) is_resume: bool,
    /// From SIGTERM to SIGKILL.
    pub(crate) grace: Duration,
    /// Longest life of the agent.
    pub(crate) timeout: Option<Duration>,
    /// Names of variables that the agent does not get.
    pub(crate) hold_back: Vec<String>,
    /// Where the sidecar writes its addresses.
    pub(crate) sidecar_addresses: Option<PathBuf>,
    /// Made when the agent has been started, for who waits for that.
    pub(crate) started_file: Option<PathBuf>,
    /// Admin port.
    pub(crate) admin_listen: SocketAddr,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines there are.
    pub log_level: String,
    /// The agent: program and arguments; never empty.
    pub(crate) command: Vec<OsString>,
}

impl Settings {
    /// Whether any connection will be encrypted.
    pub fn uses_tls(&self) -> bool {
        let endpoint = self.endpoint.as_ref();
        let grpc = self.grpc.as_ref();
        endpoint.is_some_and(|(url, _)| url.scheme() == "https")
            || grpc.is_some_and(|grpc| grpc.tls || grpc.address.starts_with("https:"))
    }

    /// The session and where its messages wait, when messages are on and the agent can have them.
    pub(crate) fn spool(&self) -> Option<(&SessionId, &Path)> {
        self.grpc.as_ref()?;
        let session = self.session.as_ref()?;
        (self.io != AgentIo::None).then_some((session, self.spool_dir.as_path()))
    }
}

/// What happens when the agent's token has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OnRefresh {
    /// Nothing: the agent reads its token file when it needs it.
    None,
    /// The agent gets this signal.
    Signal(Signal),
    /// This program is run, with the agent's environment.
    Command(PathBuf),
    /// The agent is ended and started again.
    Restart,
}

impl FromStr for OnRefresh {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "restart" => Ok(Self::Restart),
            Some(("command", path)) if Path::new(path).is_absolute() => {
                Ok(Self::Command(path.into()))
            }
            Some(("command", _)) => Err("the command must be an absolute path".to_owned()),
            Some(("signal", name)) => parse_signal(name).map(Self::Signal),
            _ => Err("neither none, signal:NAME, command:PATH nor restart".to_owned()),
        }
    }
}

fn parse_signal(name: &str) -> Result<Signal, String> {
    let name = name.to_ascii_uppercase();
    let full = if name.starts_with("SIG") {
        name
    } else {
        format!("SIG{name}")
    };
    match full.parse() {
        Ok(Signal::SIGKILL | Signal::SIGSTOP) => {
            Err(format!("{full} cannot be handled by an agent"))
        }
        Ok(signal) => Ok(signal),
        Err(_) => Err(format!("{full} is not a signal such as HUP or USR1")),
    }
}

/// Container entrypoint of an agent session: keeps a fresh API token in a file, starts and
/// supervises the agent, and carries its messages.
///
/// The agent's exit code is passed through; 128+n when signal n ended it, 126 or 127 when it
/// cannot be started, 124 when its TIMEOUT ended it. 78: bad settings; 69: no token, or messages
/// cannot be carried; 70: a fault of the machine.
#[derive(Parser)]
#[command(
    name = "ambient-runner",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// Session id.
    #[arg(long, env = "SESSION_ID", hide_env_values = true)]
    session_id: Option<String>,

    /// URL of the control plane's token endpoint.
    #[arg(long, env = "AMBIENT_CP_TOKEN_URL", hide_env_values = true)]
    token_url: Option<String>,

    /// Public key of the control plane, PEM.
    #[arg(long, env = "AMBIENT_CP_TOKEN_PUBLIC_KEY", hide_env_values = true)]
    public_key: Option<String>,

    /// More CA certificates to trust for the token endpoint, PEM.
    #[arg(long, env = "AMBIENT_CP_TOKEN_CA", hide_env_values = true)]
    token_ca: Option<String>,

    /// Mounted file with the token that the control plane pushes.
    #[arg(
        long,
        env = "AMBIENT_BOT_TOKEN_FILE",
        default_value = "/var/run/secrets/ambient/bot-token"
    )]
    bot_token_file: PathBuf,

    /// Mounted file with the session's key; without it no proof is sent.
    #[arg(
        long,
        env = "AMBIENT_SESSION_KEY_FILE",
        default_value = "/var/run/secrets/ambient/session-key"
    )]
    session_key_file: PathBuf,

    /// File that the agent reads its token from; the runner replaces it, best on a tmpfs.
    #[arg(long, env = "AMBIENT_TOKEN_FILE", default_value = "/run/ambient/token")]
    token_file: PathBuf,

    /// Longest wait for the first token, such as 90s or 2m.
    #[arg(long, env = "AMBIENT_TOKEN_TIMEOUT", default_value = "2m", value_parser = parse_limit)]
    token_timeout: Duration,

    /// When the agent's token changed: none, signal:NAME, command:PATH or restart.
    #[arg(long, env = "AMBIENT_ON_REFRESH", default_value = "none", value_parser = OnRefresh::from_str)]
    on_refresh: OnRefresh,

    /// API server's gRPC address, host:port.
    #[arg(long, env = "AMBIENT_GRPC_URL")]
    grpc_url: Option<String>,

    /// Carry the agent's messages.
    #[arg(long, env = "AMBIENT_GRPC_ENABLED", default_value = "false", default_missing_value = "true",
        num_args = 0..=1, require_equals = true, value_parser = parse_flag)]
    grpc_enabled: bool,

    /// Use TLS to the API server.
    #[arg(long, env = "AMBIENT_GRPC_USE_TLS", default_value = "false", default_missing_value = "true",
        num_args = 0..=1, require_equals = true, value_parser = parse_flag)]
    grpc_use_tls: bool,

    /// More CA certificates: a PEM file or a folder of them; may be missing.
    #[arg(long, env = "AMBIENT_GRPC_CA_CERT_FILE")]
    grpc_ca_cert_file: Option<PathBuf>,

    /// Folder for messages that are not acknowledged yet; survives a restart of the runner.
    #[arg(long, env = "AMBIENT_SPOOL_DIR", default_value = "/tmp/ambient-spool")]
    spool_dir: PathBuf,

    /// What the agent's stdio is for.
    #[arg(long, env = "AMBIENT_AGENT_IO", value_enum, default_value = "none")]
    agent_io: AgentIo,

    /// stream-json: close the agent's stdin after this many results; 0: never.
    #[arg(long, env = "AMBIENT_AGENT_TURNS", default_value = "0")]
    agent_turns: u32,

    /// The agent's first prompt.
    #[arg(
        long,
        env = "INITIAL_PROMPT",
        hide_env_values = true,
        allow_hyphen_values = true
    )]
    initial_prompt: Option<String>,

    /// What goes before the first user message.
    #[arg(
        long,
        env = "AMBIENT_PREAMBLE",
        hide_env_values = true,
        allow_hyphen_values = true
    )]
    preamble: Option<String>,

    /// The session ran before: no prompt is handed over.
    #[arg(long, env = "IS_RESUME", default_value = "false", default_missing_value = "true",
        num_args = 0..=1, require_equals = true, value_parser = parse_flag)]
    is_resume: bool,

    /// From SIGTERM to SIGKILL of the agent and all it started.
    #[arg(long, env = "AMBIENT_GRACE_PERIOD", default_value = "10s", value_parser = parse_limit)]
    grace_period: Duration,

    /// Longest life of the agent in seconds; 0: no limit.
    #[arg(long, env = "TIMEOUT", default_value = "0", value_parser = clap::value_parser!(u64).range(..=LONGEST_S))]
    timeout: u64,

    /// Variables that the agent does not get, with commas between.
    #[arg(long, env = "AMBIENT_HOLD_BACK", value_delimiter = ',')]
    hold_back: Vec<String>,

    /// File in which the sidecar writes its addresses; waited for, at most 30 s.
    #[arg(long, env = "AMBIENT_SIDECAR_ADDRESSES")]
    sidecar_addresses: Option<PathBuf>,

    /// File that is made when the agent has been started.
    #[arg(long, env = "AMBIENT_STARTED_FILE")]
    started_file: Option<PathBuf>,

    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "AMBIENT_ADMIN_LISTEN", default_value = "127.0.0.1:0")]
    admin_listen: SocketAddr,

    /// File for the last error.
    #[arg(long, env = "AMBIENT_TERMINATION_LOG", default_value = exit::TERMINATION_LOG)]
    termination_log: PathBuf,

    /// How log lines look; auto: text on a terminal, else JSON.
    #[arg(long, env = "AMBIENT_LOG_FORMAT", value_enum, default_value = "auto")]
    log_format: LogFormat,

    /// Log level, such as info, or module=debug,info.
    #[arg(long, env = "LOG_LEVEL", default_value = "info", value_parser = parse_level)]
    log_level: String,

    /// The agent.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Subcommand)]
enum Verb {
    /// Copy this program to DIR/ambient-runner, for images without it.
    Install {
        /// A folder that exists.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

fn parse_limit(text: &str) -> Result<Duration, String> {
    let limit = parse_duration(text)?;
    if limit > Duration::from_secs(LONGEST_S) {
        return Err("longer than a year".to_owned());
    }
    Ok(limit)
}

fn parse_level(level: &str) -> Result<String, String> {
    telemetry::parse_level(level)
        .map(|_| level.to_owned())
        .map_err(|error| error.to_string())
}

/// Parses and checks the program's settings.
///
/// # Errors
/// [`NoSettings`]: help was asked for, or what is wrong, on one line.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Action, NoSettings> {
    let parsed: Arguments = ambient_shared::settings::parse(arguments)?;
    if let Some(Verb::Install { folder }) = parsed.verb {
        return Ok(Action::Install(folder));
    }
    let secrets = Secrets {
        bot_token: secret("BOT_TOKEN"),
        api_key: secret("ANTHROPIC_API_KEY"),
    };
    check(parsed, secrets)
        .map(|settings| Action::Run(Box::new(settings)))
        .map_err(NoSettings::Invalid)
}

/// Where the last error goes beside stderr, also when the settings are at fault.
pub fn termination_log() -> PathBuf {
    let arguments: Vec<OsString> = std::env::args_os().take_while(|a| a != "--").collect();
    let flag = arguments.iter().enumerate().find_map(|(at, argument)| {
        let text = argument.to_str()?;
        match text.strip_prefix("--termination-log")? {
            "" => arguments.get(at + 1).cloned(),
            value => value.strip_prefix('=').map(Into::into),
        }
    });
    flag.or_else(|| std::env::var_os("AMBIENT_TERMINATION_LOG"))
        .filter(|path| !path.is_empty())
        .map_or_else(|| exit::TERMINATION_LOG.into(), PathBuf::from)
}

/// The runner's own environment, which is the agent's but for what is held back.
pub(crate) fn environment() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os()
}

struct Secrets {
    bot_token: Option<SecretString>,
    api_key: Option<SecretString>,
}

fn check(from: Arguments, secrets: Secrets) -> Result<Settings, InvalidSettings> {
    let mut faults = Faults::default();
    let session = from.session_id.as_deref().and_then(|id| {
        let parsed = SessionId::parse(id);
        faults.keep("SESSION_ID", parsed)
    });
    let endpoint = check_endpoint(&from, session.as_ref(), &mut faults);
    let grpc = check_grpc(&from, &mut faults);
    if grpc.is_some() && from.session_id.is_none() {
        faults.add("SESSION_ID", "missing; AMBIENT_GRPC_ENABLED needs it");
    }
    let bot_token = secrets
        .bot_token
        .and_then(|text| faults.keep("BOT_TOKEN", Token::new(text.expose_secret(), None)));

    let token_ca = from.token_ca.as_deref();
    let token_ca = token_ca
        .and_then(|pem| faults.keep("AMBIENT_CP_TOKEN_CA", client::parse_certificates(pem)));

    let mounted = from
        .bot_token_file
        .parent()
        .is_some_and(|folder| folder.as_os_str().is_empty() || folder.is_dir());
    if from.token_url.is_none() && bot_token.is_none() && !mounted && faults.none() {
        faults.add(
            "AMBIENT_CP_TOKEN_URL",
            "missing, and so are BOT_TOKEN and the folder of AMBIENT_BOT_TOKEN_FILE; one of them must give a token",
        );
    }
    if from.token_file == from.bot_token_file {
        faults.add("AMBIENT_TOKEN_FILE", "the same as AMBIENT_BOT_TOKEN_FILE");
    }
    if from.token_file.file_name().is_none() {
        faults.add("AMBIENT_TOKEN_FILE", "not the path of a file");
    }
    if from.token_timeout.is_zero() {
        faults.add("AMBIENT_TOKEN_TIMEOUT", "must be more than 0");
    }
    if from.agent_turns > 0 && from.agent_io != AgentIo::StreamJson {
        faults.add(
            "AMBIENT_AGENT_TURNS",
            "only AMBIENT_AGENT_IO=stream-json has turns",
        );
    }
    if from
        .command
        .first()
        .is_none_or(|program| program.is_empty())
    {
        faults.add("COMMAND", "the agent's program is empty");
    }
    let hold_back: Vec<String> = from
        .hold_back
        .iter()
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    if let Some(name) = hold_back.iter().find(|name| name.contains(['=', ' '])) {
        faults.add(
            "AMBIENT_HOLD_BACK",
            format!("{name:?} is not the name of a variable"),
        );
    }
    faults.end()?;

    let ca = from
        .grpc_ca_cert_file
        .filter(|path| path.exists())
        .or_else(|| Some(PathBuf::from(SERVICE_CA)).filter(|path| path.exists()));
    Ok(Settings {
        session,
        endpoint,
        token_ca: token_ca.unwrap_or_default(),
        bot_token_file: from.bot_token_file,
        session_key_file: from.session_key_file,
        bot_token,
        other_secrets: secrets.api_key.into_iter().collect(),
        token_file: from.token_file,
        token_timeout: from.token_timeout,
        on_refresh: from.on_refresh,
        grpc: grpc.map(|grpc| GrpcAddress {
            ca: ca.clone(),
            ..grpc
        }),
        ca,
        spool_dir: from.spool_dir,
        io: from.agent_io,
        turns: from.agent_turns,
        initial_prompt: from.initial_prompt,
        preamble: from.preamble,
        is_resume: from.is_resume,
        grace: from.grace_period,
        timeout: (from.timeout > 0).then(|| Duration::from_secs(from.timeout)),
        hold_back,
        sidecar_addresses: from.sidecar_addresses,
        started_file: from.started_file,
        admin_listen: from.admin_listen,
        log_format: from.log_format,
        log_level: from.log_level,
        command: from.command,
    })
}

/// A public key without a URL is no fault: existing control planes always set the key.
fn check_endpoint(
    from: &Arguments,
    session: Option<&SessionId>,
    faults: &mut Faults,
) -> Option<(Url, PublicKey)> {
    let url = from.token_url.as_deref()?;
    let url = faults.keep("AMBIENT_CP_TOKEN_URL", exchange::parse_endpoint(url));
    let key = if let Some(pem) = from.public_key.as_deref() {
        faults.keep("AMBIENT_CP_TOKEN_PUBLIC_KEY", PublicKey::from_pem(pem))
    } else {
        faults.add(
            "AMBIENT_CP_TOKEN_PUBLIC_KEY",
            "missing; AMBIENT_CP_TOKEN_URL needs it",
        );
        None
    };
    if from.session_id.is_none() {
        faults.add("SESSION_ID", "missing; AMBIENT_CP_TOKEN_URL needs it");
    }
    if let (Some(key), Some(session)) = (&key, session) {
        // A small key cannot hold a long id: say so now, not at the first request.
        faults.keep("SESSION_ID", key.encrypt(session));
    }
    url.zip(key)
}

fn check_grpc(from: &Arguments, faults: &mut Faults) -> Option<GrpcAddress> {
    if !from.grpc_enabled {
        return None;
    }
    let Some(address) = from.grpc_url.clone() else {
        faults.add("AMBIENT_GRPC_URL", "missing; AMBIENT_GRPC_ENABLED needs it");
        return None;
    };
    Some(GrpcAddress {
        address,
        tls: from.grpc_use_tls,
        ca: None,
    })
}

/// Everything that is wrong, so that one start shows all of it.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, variable: &str, fault: impl AsRef<str>) {
        self.0.push(format!("{variable}: {}", fault.as_ref()));
    }

    fn keep<T, E: std::error::Error + 'static>(
        &mut self,
        variable: &str,
        parsed: Result<T, E>,
    ) -> Option<T> {
        parsed
            .map_err(|error| self.add(variable, exit::report(&error)))
            .ok()
    }

    fn none(&self) -> bool {
        self.0.is_empty()
    }

    fn end(self) -> Result<(), InvalidSettings> {
        if self.none() {
            Ok(())
        } else {
            Err(InvalidSettings(self.0.join("; ")))
        }
    }
}

/// Whether the agent must not get a variable: it is about the runner's own credentials.
pub(crate) fn is_own_credential(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b"AMBIENT_CP_TOKEN_")
        || [
            &b"BOT_TOKEN"[..],
            b"AMBIENT_BOT_TOKEN_FILE",
            b"AMBIENT_SESSION_KEY_FILE",
        ]
        .contains(&name)
}
