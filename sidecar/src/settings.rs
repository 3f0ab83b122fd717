//! The sidecar's settings: parsed once, checked before anything starts.

mod upstream;

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use ambient_shared::{
    bearer::{BearerError, PublicKey},
    exchange::{self, InvalidEndpoint},
    proof::SessionKey,
    session::{InvalidSessionId, SessionId},
    settings::{self, InvalidSettings, NoSettings, parse_flag},
    telemetry::{self, LogFormat},
};
use clap::{ArgAction, Parser};
use url::Url;

pub use upstream::{InvalidUpstream, Upstream};

/// Keeps an agent supplied with its API token: follows the mounted token file, serves the token on
/// loopback, and proxies to the API server with the token added.
///
/// Every setting is a flag or the environment variable beside it.
#[derive(Debug, Parser)]
#[command(name = "ambient-sidecar", version)]
struct Arguments {
    /// Mounted file with the token. When its folder does not exist at start and
    /// `AMBIENT_CP_TOKEN_URL` is set, the token is fetched from there.
    #[arg(
        long,
        env = "AMBIENT_BOT_TOKEN_FILE",
        default_value = "/var/run/secrets/ambient/bot-token"
    )]
    token_file: PathBuf,
    /// API server that the proxy reaches, such as <https://api.example:8000>.
    #[arg(
        long,
        env = "AMBIENT_UPSTREAM_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    upstream: String,
    /// Where the proxy sends gRPC (content type application/grpc). Default: the upstream.
    #[arg(
        long,
        env = "AMBIENT_UPSTREAM_GRPC_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    grpc_upstream: Option<String>,
    /// Where `GET /token` is served. Loopback only; port 0 takes a free one.
    #[arg(
        long,
        env = "AMBIENT_ENDPOINT_LISTEN",
        default_value = "127.0.0.1:0",
        value_parser = parse_loopback,
        value_name = "ADDR:PORT"
    )]
    endpoint_listen: SocketAddr,
    /// Where the proxy listens. Loopback only; port 0 takes a free one.
    #[arg(
        long,
        env = "AMBIENT_PROXY_LISTEN",
        default_value = "127.0.0.1:0",
        value_parser = parse_loopback,
        value_name = "ADDR:PORT"
    )]
    proxy_listen: SocketAddr,
    /// Where `/healthz`, `/readyz` and `/metrics` are served.
    #[arg(
        long,
        env = "AMBIENT_ADMIN_LISTEN",
        default_value = "127.0.0.1:0",
        value_name = "ADDR:PORT"
    )]
    admin_listen: SocketAddr,
    /// File to write the chosen addresses to, as JSON. When it is there already, port 0 takes the
    /// ports in it, so that they survive a restart.
    #[arg(long, env = "AMBIENT_SIDECAR_ADDRESSES", value_name = "PATH")]
    address_file: Option<PathBuf>,
    /// Refuse requests without the header `X-Ambient-Request: true`, which no browser sends by
    /// itself.
    #[arg(
        long,
        env = "AMBIENT_REQUIRE_HEADER",
        value_parser = parse_flag,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        value_name = "BOOL"
    )]
    require_header: bool,
    /// More CA certificates to trust, beside the system's: a PEM file or a folder of PEM files.
    #[arg(long, env = "AMBIENT_CA_FILE", value_name = "PATH")]
    ca_file: Option<PathBuf>,
    /// Level such as info, or module=debug,info.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// Form of log lines: JSON, text, or by whether stderr is a terminal.
    #[arg(long, env = "AMBIENT_LOG_FORMAT", value_enum, default_value = "auto")]
    log_format: LogFormat,
    /// Token endpoint, used only where no token file is mounted.
    #[arg(
        long = "cp-token-url",
        env = "AMBIENT_CP_TOKEN_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    token_url: Option<String>,
    /// The control plane's public key (PEM), for the token endpoint.
    #[arg(
        long = "cp-token-public-key",
        env = "AMBIENT_CP_TOKEN_PUBLIC_KEY",
        hide_env_values = true,
        value_name = "PEM"
    )]
    token_public_key: Option<String>,
    /// Session that the token endpoint is asked for.
    #[arg(long, env = "SESSION_ID", hide_env_values = true, value_name = "ID")]
    session_id: Option<String>,
    /// File with the session's key, for the token endpoint. Without it no proof is sent.
    #[arg(
        long,
        env = "AMBIENT_SESSION_KEY_FILE",
        default_value = "/var/run/secrets/ambient/session-key"
    )]
    session_key_file: PathBuf,
}

/// What the sidecar runs with. [`Settings::from_arguments`] documents each by `--help`.
#[derive(Debug)]
pub struct Settings {
    /// Where the token comes from.
    pub source: Source,
    /// API server, REST and everything else that is not gRPC.
    pub upstream: Upstream,
    /// API server, gRPC.
    pub grpc_upstream: Upstream,
    /// Address of the token endpoint; loopback.
    pub endpoint_listen: SocketAddr,
    /// Address of the proxy; loopback.
    pub proxy_listen: SocketAddr,
    /// Address of health and metrics.
    pub admin_listen: SocketAddr,
    /// Where the chosen addresses are written.
    pub address_file: Option<PathBuf>,
    /// Whether `X-Ambient-Request: true` is demanded.
    pub require_header: bool,
    /// More CA certificates.
    pub ca_file: Option<PathBuf>,
    /// Checked log level.
    pub log_level: String,
    /// Form of log lines.
    pub log_format: LogFormat,
}

/// Where the token comes from.
#[derive(Debug)]
pub enum Source {
    /// A mounted file, which somebody else keeps fresh. It may appear later.
    File(PathBuf),
    /// A token endpoint, as no file is mounted.
    Endpoint {
        /// Its URL.
        url: Url,
        /// The control plane's key.
        public_key: PublicKey,
        /// Whose token.
        session: SessionId,
        /// For the proof of possession.
        key: Option<SessionKey>,
        /// Where that key is; the control plane may replace it.
        key_file: PathBuf,
    },
}

/// What is wrong with one setting. Values are left out where they may hold a secret.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}: {1}")]
    Upstream(&'static str, InvalidUpstream),
    #[error("AMBIENT_CP_TOKEN_URL: {0}")]
    TokenUrl(InvalidEndpoint),
    #[error("AMBIENT_CP_TOKEN_PUBLIC_KEY: {0}")]
    PublicKey(BearerError),
    #[error("SESSION_ID: {0}")]
    Session(InvalidSessionId),
    #[error("{0} is missing; it is needed to fetch a token, as {1} does not exist")]
    Needed(&'static str, String),
    #[error("AMBIENT_SESSION_KEY_FILE: {0}")]
    SessionKey(String),
    #[error("AMBIENT_BOT_TOKEN_FILE: {0:?} names no file")]
    TokenFile(PathBuf),
    #[error("AMBIENT_CA_FILE: there is no {}", _0.display())]
    CaFile(PathBuf),
    #[error("LOG_LEVEL: {0}")]
    LogLevel(telemetry::TelemetryError),
    #[error("{0} and {1} are both {2}")]
    SameAddress(&'static str, &'static str, SocketAddr),
}

impl Settings {
    /// Reads the settings from arguments (the program's name first) and the environment.
    ///
    /// # Errors
    /// [`NoSettings`]: `--help`, or one line that names every fault.
    pub fn from_arguments(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, NoSettings> {
        let arguments: Arguments = settings::parse(arguments)?;
        let mut faults = Vec::new();
        let settings = check(arguments, &mut faults);
        match settings {
            Some(settings) if faults.is_empty() => Ok(settings),
            _ => {
                let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
                Err(NoSettings::Invalid(InvalidSettings(lines.join("; "))))
            }
        }
    }
}

fn check(given: Arguments, faults: &mut Vec<Fault>) -> Option<Settings> {
    let source = check_source(&given, faults);
    let mut upstream = |variable, text: &str| match Upstream::parse(text) {
        Ok(upstream) => Some(upstream),
        Err(fault) => {
            faults.push(Fault::Upstream(variable, fault));
            None
        }
    };
    let rest = upstream("AMBIENT_UPSTREAM_URL", &given.upstream);
    let grpc = match &given.grpc_upstream {
        Some(text) => upstream("AMBIENT_UPSTREAM_GRPC_URL", text),
        None => rest.clone(),
    };
    if let Some(path) = given.ca_file.as_ref().filter(|path| !path.exists()) {
        faults.push(Fault::CaFile(path.clone()));
    }
    if let Err(fault) = telemetry::parse_level(&given.log_level) {
        faults.push(Fault::LogLevel(fault));
    }
    let listeners = [
        ("AMBIENT_ENDPOINT_LISTEN", given.endpoint_listen),
        ("AMBIENT_PROXY_LISTEN", given.proxy_listen),
        ("AMBIENT_ADMIN_LISTEN", given.admin_listen),
    ];
    for (index, (one, address)) in listeners.iter().enumerate() {
        for (other, same) in &listeners[index + 1..] {
            if address == same && address.port() != 0 {
                faults.push(Fault::SameAddress(one, other, *address));
            }
        }
    }
    Some(Settings {
        source: source?,
        upstream: rest?,
        grpc_upstream: grpc?,
        endpoint_listen: given.endpoint_listen,
        proxy_listen: given.proxy_listen,
        admin_listen: given.admin_listen,
        address_file: given.address_file,
        require_header: given.require_header,
        ca_file: given.ca_file,
        log_level: given.log_level,
        log_format: given.log_format,
    })
}

fn check_source(given: &Arguments, faults: &mut Vec<Fault>) -> Option<Source> {
    let file = given.token_file.clone();
    if file.file_name().is_none() {
        faults.push(Fault::TokenFile(file));
        return None;
    }
    // Malformed values are faults even where they are not needed: they would be needed some day.
    let url = given.token_url.as_deref().map(exchange::parse_endpoint);
    let public_key = given.token_public_key.as_deref().map(PublicKey::from_pem);
    let session = given.session_id.as_deref().map(SessionId::parse);
    let before = faults.len();
    let url = sound(url, Fault::TokenUrl, faults);
    let public_key = sound(public_key, Fault::PublicKey, faults);
    let session = sound(session, Fault::Session, faults);
    if faults.len() > before {
        return None;
    }
    let folder = crate::watch::folder_of(&file);
    let Some(url) = url.filter(|_| !folder.exists()) else {
        return Some(Source::File(file));
    };
    let mut missing = |variable| {
        faults.push(Fault::Needed(variable, folder.display().to_string()));
    };
    if public_key.is_none() {
        missing("AMBIENT_CP_TOKEN_PUBLIC_KEY");
    }
    if session.is_none() {
        missing("SESSION_ID");
    }
    let key = match read_key(&given.session_key_file) {
        Ok(key) => key,
        Err(fault) => {
            faults.push(fault);
            return None;
        }
    };
    Some(Source::Endpoint {
        url,
        public_key: public_key?,
        session: session?,
        key,
        key_file: given.session_key_file.clone(),
    })
}

fn sound<T, E>(
    parsed: Option<Result<T, E>>,
    fault: impl FnOnce(E) -> Fault,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    match parsed? {
        Ok(value) => Some(value),
        Err(error) => {
            faults.push(fault(error));
            None
        }
    }
}

fn read_key(path: &Path) -> Result<Option<SessionKey>, Fault> {
    match std::fs::read_to_string(path) {
        Ok(text) => match SessionKey::from_text(&text) {
            Some(key) => Ok(Some(key)),
            None => Err(Fault::SessionKey(format!("{} is empty", path.display()))),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::SessionKey(format!("{}: {error}", path.display()))),
    }
}

fn parse_loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "not an address such as 127.0.0.1:8400".to_owned())?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err("not a loopback address: whoever reaches this port uses the token".to_owned())
    }
}

#[cfg(test)]
mod tests;
