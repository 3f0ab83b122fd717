//! Settings of the API server, from flags and environment, checked before anything starts.
//!
//! Secrets come from the environment alone: arguments are public.

use std::{convert::Infallible, ffi::OsString, fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use ambient_shared::{
    settings::{InvalidSettings, NoSettings, parse, secret},
    telemetry::{LogFormat, parse_level},
    token::Token,
};
use clap::{Args, Parser};
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::auth::keys::check_file;

/// Session API on an embedded database.
#[derive(Debug, Parser)]
#[command(name = "ambient-api-server", version)]
pub struct Arguments {
    /// What the server itself needs.
    #[command(flatten)]
    pub server: Settings,
    /// Log level: error, warn, info, debug, trace, or a list such as `info,tower=debug`.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Log lines for people (text), for machines (json), or by whether stderr is a terminal.
    #[arg(long, env = "AMBIENT_LOG_FORMAT", default_value = "auto")]
    pub log_format: LogFormat,
}

/// What the API server needs to run.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Where REST is served, beside `/healthz` and `/readyz`; `/metrics` too, unless it has a port of
    /// its own. Port 0: any free one, which is logged.
    #[arg(long, env = "AMBIENT_REST_LISTEN", default_value = "127.0.0.1:8000")]
    pub rest_listen: SocketAddr,
    /// Where gRPC is served. Port 0: any free one, which is logged.
    #[arg(long, env = "AMBIENT_GRPC_LISTEN", default_value = "127.0.0.1:8001")]
    pub grpc_listen: SocketAddr,
    /// Where `/metrics` is served, and `/healthz` and `/readyz` too: anybody who reaches it may read
    /// them, as on the REST port without this. Port 0: any free one, which is logged.
    #[arg(long, env = "AMBIENT_ADMIN_LISTEN")]
    pub admin_listen: Option<SocketAddr>,
    /// Path of the database file, made when it is not there; or `:memory:`.
    #[arg(long, env = "AMBIENT_DATABASE")]
    pub database: Database,
    /// Keys that sign users' tokens: JWKS URLs or file paths, with commas between.
    #[arg(long, env = "AMBIENT_JWKS", value_delimiter = ',')]
    pub jwks: Vec<JwksSource>,
    /// Keys that sign session tokens, likewise. When given, a session's token is accepted from
    /// these alone, and from these nothing but session tokens; else `jwks` signs both.
    #[arg(long, env = "AMBIENT_SESSION_JWKS", value_delimiter = ',')]
    pub session_jwks: Vec<JwksSource>,
    /// Accepted values of a token's `iss`, with commas between. None: not checked.
    #[arg(long, env = "AMBIENT_JWT_ISSUER", value_delimiter = ',')]
    pub issuer: Vec<String>,
    /// Accepted values of a token's `aud`, with commas between. None: not checked.
    #[arg(long, env = "AMBIENT_JWT_AUDIENCE", value_delimiter = ',')]
    pub audience: Vec<String>,
    /// Accepted values of `iss` in tokens that a key of `session_jwks` signed, with commas between;
    /// users' tokens are not compared with these, nor these tokens with `issuer`. None: `issuer` is
    /// for both.
    #[arg(long, env = "AMBIENT_SESSION_JWT_ISSUER", value_delimiter = ',')]
    pub session_issuer: Vec<String>,
    /// Accepted values of `aud` in tokens that a key of `session_jwks` signed, likewise. None:
    /// `audience` is for both.
    #[arg(long, env = "AMBIENT_SESSION_JWT_AUDIENCE", value_delimiter = ',')]
    pub session_audience: Vec<String>,
    /// From `AMBIENT_API_TOKEN`: who sends it is a service caller.
    #[arg(skip)]
    pub api_token: Option<SecretString>,
    /// From `AMBIENT_OPERATOR_TOKEN`: who sends it is the administrator `operator`.
    #[arg(skip)]
    pub operator_token: Option<SecretString>,
    /// User name whose verified token makes a service caller; `service-account-NAME` does too.
    #[arg(long, env = "GRPC_SERVICE_ACCOUNT")]
    pub service_account: Option<String>,
    /// User names of administrators, with commas between.
    #[arg(long, env = "AMBIENT_ADMINS", value_delimiter = ',')]
    pub admins: Vec<String>,
}

impl Default for Settings {
    /// Any free loopback ports, a database in memory, and nobody who may sign in yet.
    fn default() -> Self {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            rest_listen: any_port,
            grpc_listen: any_port,
            admin_listen: None,
            database: Database::Memory,
            jwks: Vec::new(),
            session_jwks: Vec::new(),
            issuer: Vec::new(),
            audience: Vec::new(),
            session_issuer: Vec::new(),
            session_audience: Vec::new(),
            api_token: None,
            operator_token: None,
            service_account: None,
            admins: Vec::new(),
        }
    }
}

/// Where sessions and messages are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// Nowhere: gone when the server ends.
    Memory,
    /// A file, with its write-ahead log and lock beside it.
    File(PathBuf),
}

impl FromStr for Database {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.trim() {
            ":memory:" => Self::Memory,
            path => Self::File(path.into()),
        })
    }
}

/// Where a JWKS (RFC 7517) is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksSource {
    /// An http or https URL.
    Url(Url),
    /// A file.
    File(PathBuf),
}

/// Why a text names no JWKS.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJwksSource {
    /// Two commas in a row, or a comma at an end.
    #[error("an entry is empty; give URLs or file paths with commas between")]
    Empty,
    /// Neither a file nor a URL that we can fetch.
    #[error("{0:?} is neither a file path nor an http or https URL with a host")]
    Url(String),
    /// A URL with a user name or password in it, which is not repeated here.
    #[error("a URL must not hold a user name or password")]
    Credentials,
}

impl FromStr for JwksSource {
    type Err = InvalidJwksSource;

    fn from_str(text: &str) -> Result<Self, InvalidJwksSource> {
        let text = text.trim();
        if text.is_empty() {
            return Err(InvalidJwksSource::Empty);
        }
        if !text.contains("://") {
            return Ok(Self::File(text.into()));
        }
        let broken = || InvalidJwksSource::Url(text.to_owned());
        let url = Url::parse(text).map_err(|_| broken())?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(InvalidJwksSource::Credentials);
        }
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(broken());
        }
        Ok(Self::Url(url))
    }
}

impl fmt::Display for JwksSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Arguments {
    /// Reads arguments and environment.
    ///
    /// # Errors
    /// [`NoSettings`] when help was asked for or something is wrong with a setting.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, NoSettings> {
        let mut read: Self = parse(arguments)?;
        read.server.api_token = secret("AMBIENT_API_TOKEN");
        read.server.operator_token = secret("AMBIENT_OPERATOR_TOKEN");
        let mut faults = read.server.faults();
        if let Err(error) = parse_level(&read.log_level) {
            faults.push(format!("LOG_LEVEL: {error}"));
        }
        match InvalidSettings(faults.join("\n")) {
            InvalidSettings(none) if none.is_empty() => Ok(read),
            invalid => Err(NoSettings::Invalid(invalid)),
        }
    }
}

impl Settings {
    /// Everything that is wrong with these settings, each on one line that starts with the
    /// variable's name. Looks at the folder of the database and reads files of keys, but makes and
    /// starts nothing. [`Server::bind`](crate::Server::bind) asks this itself.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut taken = vec![("AMBIENT_REST_LISTEN", self.rest_listen)];
        for (variable, address) in [
            ("AMBIENT_GRPC_LISTEN", Some(self.grpc_listen)),
            ("AMBIENT_ADMIN_LISTEN", self.admin_listen),
        ] {
            let Some(address) = address else { continue };
            let same = taken.iter().find(|(_, it)| *it == address);
            if let Some((by, _)) = same
                && address.port() != 0
            {
                faults.push(format!(
                    "{variable}: {address} is taken by {by}; choose another port"
                ));
            }
            taken.push((variable, address));
        }
        if let Database::File(path) = &self.database {
            let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
            if path.as_os_str().is_empty() {
                faults.push("AMBIENT_DATABASE: no path given".to_owned());
            } else if path.is_dir() {
                faults.push(format!(
                    "AMBIENT_DATABASE: {} is a folder; name a file in it",
                    path.display()
                ));
            } else if folder.is_some_and(|folder| !folder.is_dir()) {
                faults.push(format!(
                    "AMBIENT_DATABASE: the folder of {} does not exist",
                    path.display()
                ));
            }
        }
        for (variable, sources) in [
            ("AMBIENT_JWKS", &self.jwks),
            ("AMBIENT_SESSION_JWKS", &self.session_jwks),
        ] {
            for source in sources {
                let JwksSource::File(path) = source else {
                    continue;
                };
                let path = path.as_path();
                if !path.is_file() {
                    faults.push(format!("{variable}: there is no file {}", path.display()));
                } else if let Err(why) = check_file(path) {
                    faults.push(format!(
                        "{variable}: keys of {} cannot be used: {why}",
                        path.display()
                    ));
                }
            }
        }
        for (variable, values) in [
            ("AMBIENT_SESSION_JWT_ISSUER", &self.session_issuer),
            ("AMBIENT_SESSION_JWT_AUDIENCE", &self.session_audience),
        ] {
            if !values.is_empty() && self.session_jwks.is_empty() {
                faults.push(format!(
                    "{variable}: is for keys of AMBIENT_SESSION_JWKS, and there are none"
                ));
            }
        }
        for (variable, token) in [
            ("AMBIENT_API_TOKEN", &self.api_token),
            ("AMBIENT_OPERATOR_TOKEN", &self.operator_token),
        ] {
            if let Some(token) = token
                && let Err(error) = Token::new(token.expose_secret(), None)
            {
                faults.push(format!("{variable}: {error}"));
            }
        }
        let texts = [&self.api_token, &self.operator_token]
            .map(|token| token.as_ref().map(|token| token.expose_secret().trim()));
        if texts[0].is_some() && texts[0] == texts[1] {
            faults.push(
                "AMBIENT_OPERATOR_TOKEN: is the same as AMBIENT_API_TOKEN; they mean different \
                 rights"
                    .to_owned(),
            );
        }
        for (variable, names) in [
            ("AMBIENT_ADMINS", self.admins.iter().collect::<Vec<_>>()),
            (
                "GRPC_SERVICE_ACCOUNT",
                self.service_account.iter().collect(),
            ),
        ] {
            if let Some(name) = names.iter().find(|name| name.contains(':')) {
                faults.push(format!(
                    "{variable}: {name:?} has a colon; such names are never taken from a token"
                ));
            }
        }
        if self.jwks.is_empty()
            && self.session_jwks.is_empty()
            && self.api_token.is_none()
            && self.operator_token.is_none()
        {
            faults.push(
                "AMBIENT_JWKS: nobody could sign in; set it, AMBIENT_API_TOKEN or \
                 AMBIENT_OPERATOR_TOKEN"
                    .to_owned(),
            );
        }
        faults
    }
}

#[cfg(test)]
mod tests;
