//! All settings of the control plane, from flags and environment, checked before anything starts.
//!
//! The only file that reads the environment. Secrets have no flag: arguments are public. A
//! variable that is set but empty counts as not set. Every fault is found, not only the first.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use ambient_shared::{
    session::SessionHash,
    settings::{InvalidSettings, NoSettings, secret},
    telemetry::{LogFormat, parse_level},
};
use secrecy::SecretString;
use url::Url;

use crate::{
    keys::{KeysAction, KeysSettings},
    rules::RuleSettings,
};

mod local;
mod raw;
mod serve;
mod values;

pub use local::{Listen, LocalSettings, Mode};
pub use serve::ServeSettings;

/// Life of minted tokens.
pub const DEFAULT_TOKEN_TTL: Duration = Duration::from_mins(15);

/// What the program is asked to do.
#[derive(Debug)]
pub enum Action {
    /// Print the hash under which logs show this session.
    Hash(SessionHash),
    /// Be a session's shim.
    Shim {
        /// The session's folder.
        folder: PathBuf,
        /// Soft limit of open files for the session's processes.
        open_files: u64,
        /// What is logged.
        log: LogSettings,
    },
    /// Local mode.
    Local(Box<LocalSettings>),
    /// The control plane of a Kubernetes cluster.
    Serve(Box<ServeSettings>),
    /// Try all that [`Action::Serve`] depends on.
    Check(Box<ServeSettings>),
    /// Try [`Action::Serve`] itself, by a session in this project.
    Try(Box<ServeSettings>, String),
    /// Show or rotate the keys in a cluster.
    Keys(KeysSettings),
    /// Print the permissions that [`Action::Serve`] needs in a cluster.
    Rules(RuleSettings),
}

/// What is logged, and how it looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// Which lines.
    pub level: String,
    /// How they look.
    pub format: LogFormat,
}

/// Where API tokens come from.
#[derive(Debug, Clone)]
pub enum IssuerSettings {
    /// The control plane signs them.
    Minted {
        /// Their life.
        life: Duration,
    },
    /// One token for all.
    Static {
        /// `AMBIENT_API_TOKEN`.
        token: SecretString,
    },
    /// Client credentials.
    Oidc {
        /// Token URL of the identity provider.
        url: Url,
        /// Client id.
        client_id: String,
        /// Client secret.
        client_secret: SecretString,
    },
}

impl IssuerSettings {
    /// The life of the tokens that the control plane signs; none when it signs none.
    pub fn minted_life(&self) -> Option<Duration> {
        match self {
            Self::Minted { life } => Some(*life),
            Self::Static { .. } | Self::Oidc { .. } => None,
        }
    }
}

/// Secrets, which have no flags.
#[derive(Debug, Default)]
struct Secrets {
    api_token: Option<SecretString>,
    oidc_client_secret: Option<SecretString>,
    anthropic_api_key: Option<SecretString>,
}

/// Reads arguments and environment.
///
/// # Errors
/// [`NoSettings`] when help was asked for, or with one line for each fault.
pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Action, NoSettings> {
    let parsed: raw::Arguments = ambient_shared::settings::parse(arguments)?;
    let secrets = Secrets {
        api_token: secret("AMBIENT_API_TOKEN"),
        oidc_client_secret: secret("OIDC_CLIENT_SECRET"),
        anthropic_api_key: secret("ANTHROPIC_API_KEY"),
    };
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let mut faults = Faults::default();
    let log = LogSettings {
        level: parsed.log.log_level.unwrap_or_default(),
        format: parsed.log.log_format,
    };
    faults.check("LOG_LEVEL", parse_level(&log.level));
    let action = match parsed.command {
        Some(raw::Verb::Hash { id }) => Action::Hash(SessionHash::of(&id)),
        Some(raw::Verb::Shim { folder, open_files }) => Action::Shim {
            folder,
            open_files,
            log,
        },
        Some(raw::Verb::Local(local)) => {
            let settings = local::check(*local, secrets, log, environment, &mut faults);
            Action::Local(Box::new(settings))
        }
        Some(raw::Verb::Keys { what }) => {
            let action = match what {
                raw::KeysVerb::Show => KeysAction::Show,
                raw::KeysVerb::Rotate { kind } => KeysAction::Rotate(kind),
            };
            Action::Keys(serve::keys(&parsed.serve, action, log, environment))
        }
        Some(raw::Verb::Rules) => {
            Action::Rules(serve::rules(&parsed.serve, environment, &mut faults))
        }
        serve @ (None | Some(raw::Verb::Check | raw::Verb::Try { .. })) => {
            let settings = serve::check(parsed.serve, secrets, log, environment, &mut faults);
            let Some(settings) = settings.map(Box::new) else {
                return Err(faults.into());
            };
            match serve {
                None => Action::Serve(settings),
                Some(raw::Verb::Try { project }) => Action::Try(settings, project),
                Some(_) => Action::Check(settings),
            }
        }
    };
    faults.end().map(|()| action)
}

/// Faults found so far, each a line that starts with the setting's name.
#[derive(Debug, Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, setting: &str, what: impl std::fmt::Display) {
        self.0.push(format!("{setting}: {what}"));
    }

    fn check<T, E: std::fmt::Display>(&mut self, setting: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(setting, error)).ok()
    }

    fn end(self) -> Result<(), NoSettings> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(self.into())
    }
}

impl From<Faults> for NoSettings {
    fn from(faults: Faults) -> Self {
        Self::Invalid(InvalidSettings(faults.0.join("\n")))
    }
}
