//! Settings of local mode.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use ambient_api_server::JwksSource;
use ambient_shared::{
    exchange::parse_endpoint, settings::parse_flag, telemetry::parse_level, token::Token,
};
use secrecy::{ExposeSecret as _, SecretString};

use super::{
    DEFAULT_TOKEN_TTL, Faults, IssuerSettings, LogSettings, Secrets, raw,
    values::{default_data_dir, parse_command, parse_interval, parse_listen, parse_ttl, passed_on},
};
use crate::{reconcile::desired::AgentIo, refresh::Interval};

/// Where REST, gRPC and the token endpoint of `local` listen unless told.
const DEFAULT_PORTS: [u16; 3] = [8000, 8001, 8080];

/// Local mode's settings.
#[derive(Debug)]
pub struct LocalSettings {
    /// What is started.
    pub mode: Mode,
    /// Folder of all state. None: a temporary one.
    pub data_dir: Option<PathBuf>,
    /// Where the API server's REST listens.
    pub api_listen: Listen,
    /// Where the API server's gRPC listens.
    pub grpc_listen: Listen,
    /// Where the token endpoint listens.
    pub token_listen: Listen,
    /// The refresh ticker's interval.
    pub refresh: Interval,
    /// Where tokens come from.
    pub issuer: IssuerSettings,
    /// Keys of users' tokens.
    pub jwks: Vec<JwksSource>,
    /// Accepted issuers of users' tokens.
    pub jwt_issuers: Vec<String>,
    /// Accepted audiences of users' tokens.
    pub jwt_audiences: Vec<String>,
    /// User names of administrators.
    pub admins: Vec<String>,
    /// User name whose token makes a service caller.
    pub service_account: Option<String>,
    /// The agent of sessions that name none; none: the bundled demo agent.
    pub agent_command: Option<Vec<String>>,
    /// Whether the token endpoint limits rates.
    pub rate_limits: bool,
    /// Whether runners without a proof may have tokens.
    pub allow_unproven: bool,
    /// `LOG_LEVEL` of runners.
    pub runner_log_level: Option<String>,
    /// Environment of sessions' processes.
    pub passed_on: BTreeMap<String, String>,
    /// What is logged.
    pub log: LogSettings,
}

/// Where a server of local mode listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// The address; port 0 takes a free one.
    pub address: SocketAddr,
    /// Whether it was asked for. If not, it gives way to the address of the last start.
    pub asked: bool,
}

/// Kinds of local mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Stays up for whoever talks to its API.
    Serve,
    /// One session with this agent, on the terminal.
    Run {
        /// The agent.
        command: Vec<String>,
        /// How it is talked with.
        io: AgentIo,
        /// `stream-json`: close its stdin after that many results; 0: never.
        turns: u32,
    },
    /// One session with the bundled agent, and a time line.
    Demo,
}

pub(super) fn check(
    from: raw::Local,
    secrets: Secrets,
    log: LogSettings,
    environment: impl Fn(&str) -> Option<String>,
    faults: &mut Faults,
) -> LocalSettings {
    let flags = from.flags;
    let mode = mode(from.demo, from.mode, faults);
    let serve = mode == Mode::Serve;
    let [api, grpc, token] = listens(&flags, serve, faults);
    let token_ttl = flags.token_ttl.as_deref().map(|text| {
        faults
            .check("--token-ttl", parse_ttl(text))
            .unwrap_or(DEFAULT_TOKEN_TTL)
    });
    let refresh = flags.refresh_interval.as_deref().map_or_else(
        || Interval::Auto,
        |text| {
            faults
                .check("--refresh-interval", parse_interval(text))
                .unwrap_or_default()
        },
    );
    // What is malformed cannot contradict.
    if mode == Mode::Demo && faults.0.is_empty() {
        demo_faults(&flags, token_ttl, refresh, faults);
    }
    let issuer = issuer(&flags, token_ttl, &mode, secrets, faults);
    let agent_command = flags
        .agent_command
        .as_deref()
        .and_then(|text| faults.check("AGENT_COMMAND", parse_command(text)));
    let jwks = flags
        .jwks
        .iter()
        .filter_map(|source| faults.check("AMBIENT_JWKS", source.parse()))
        .collect();
    let rate_limits = faults.check("CP_RATE_LIMITS", parse_flag(&flags.cp_rate_limits));
    let allow_unproven = faults.check("CP_ALLOW_UNPROVEN", parse_flag(&flags.cp_allow_unproven));
    if let Some(level) = &flags.runner_log_level {
        faults.check("RUNNER_LOG_LEVEL", parse_level(level));
    }
    if flags
        .data_dir
        .as_ref()
        .is_some_and(|dir| dir.as_os_str().is_empty())
    {
        faults.add("--data-dir", "is empty");
    }
    let data_dir = match flags.data_dir {
        None if serve => faults.check("--data-dir", default_data_dir(&environment)),
        given => given,
    };
    // On a terminal that one talks on, only what is wrong; the demo reads its programs' logs.
    let log = match mode {
        Mode::Run { .. } | Mode::Demo if log.level.is_empty() => LogSettings {
            level: "warn".to_owned(),
            ..log
        },
        _ => log,
    };
    let runner_log_level = match mode {
        Mode::Demo => Some("info".to_owned()),
        Mode::Serve | Mode::Run { .. } => flags.runner_log_level,
    };
    let settings = LocalSettings {
        mode,
        data_dir,
        api_listen: api,
        grpc_listen: grpc,
        token_listen: token,
        refresh,
        issuer,
        jwks,
        jwt_issuers: flags.jwt_issuer,
        jwt_audiences: flags.jwt_audience,
        admins: flags.admins,
        service_account: flags.grpc_service_account,
        agent_command,
        rate_limits: rate_limits.unwrap_or(true),
        allow_unproven: allow_unproven.unwrap_or(false),
        runner_log_level,
        passed_on: passed_on(&environment),
        log,
    };
    faults.0.extend(api_server_faults(&settings));
    settings
}

fn mode(demo: bool, mode: Option<raw::LocalVerb>, faults: &mut Faults) -> Mode {
    match (demo, mode) {
        (false, None) => Mode::Serve,
        (true, None) => Mode::Demo,
        (true, Some(_)) => {
            faults.add("--demo", "cannot be used together with run");
            Mode::Demo
        }
        (false, Some(raw::LocalVerb::Run(run))) => {
            let io = faults.check("--io", run.io.parse::<AgentIo>());
            if run.turns > 0 && io != Some(AgentIo::StreamJson) {
                faults.add("--turns", "only --io stream-json has turns");
            }
            if run.command.first().is_none_or(String::is_empty) {
                faults.add("COMMAND", "the agent's program is empty");
            }
            Mode::Run {
                command: run.command,
                io: io.unwrap_or(AgentIo::Lines),
                turns: run.turns,
            }
        }
    }
}

/// The demo shows renewals by pull and by push, so it must have both.
fn demo_faults(
    flags: &raw::Flags,
    token_ttl: Option<Duration>,
    refresh: Interval,
    faults: &mut Faults,
) {
    if flags
        .cp_token_issuer
        .as_deref()
        .is_some_and(|kind| kind != "minted")
    {
        faults.add("CP_TOKEN_ISSUER", "the demo shows minted tokens only");
    }
    let longest = crate::local::demo::TOKEN_TTL;
    if token_ttl.is_some_and(|life| life > longest) {
        let longest = longest.as_secs();
        faults.add(
            "--token-ttl",
            format!("the demo is over before tokens of more than {longest}s are renewed twice"),
        );
    }
    if refresh == Interval::Off {
        faults.add("--refresh-interval", "the demo shows renewals by push");
    }
}

fn listens(flags: &raw::Flags, serve: bool, faults: &mut Faults) -> [Listen; 3] {
    let given = [
        ("--api-listen", &flags.api_listen),
        ("--grpc-listen", &flags.grpc_listen),
        ("--token-listen", &flags.token_listen),
    ];
    let mut addresses =
        DEFAULT_PORTS.map(|port| SocketAddr::from(([127, 0, 0, 1], if serve { port } else { 0 })));
    for ((flag, text), address) in given.iter().zip(&mut addresses) {
        let Some(text) = text else { continue };
        if let Some(parsed) = faults.check(flag, parse_listen(text)) {
            *address = parsed;
        }
    }
    for (later, address) in addresses.iter().enumerate() {
        if let Some(earlier) = addresses[..later].iter().position(|other| other == address)
            && address.port() != 0
        {
            faults.add(
                given[later].0,
                format!(
                    "{address} is taken by {}; choose another port",
                    given[earlier].0
                ),
            );
        }
    }
    let mut given = given.iter();
    addresses.map(|address| Listen {
        address,
        asked: given.next().is_some_and(|(_, text)| text.is_some()),
    })
}

/// What the API server would refuse: asked before anything is made.
fn api_server_faults(settings: &LocalSettings) -> Vec<String> {
    ambient_api_server::Settings {
        database: ambient_api_server::Database::Memory,
        jwks: settings.jwks.clone(),
        issuer: settings.jwt_issuers.clone(),
        audience: settings.jwt_audiences.clone(),
        admins: settings.admins.clone(),
        service_account: settings.service_account.clone(),
        // There will be one, made with the data folder.
        operator_token: Some(SecretString::from("operator")),
        ..ambient_api_server::Settings::default()
    }
    .faults()
}

fn issuer(
    flags: &raw::Flags,
    token_ttl: Option<Duration>,
    mode: &Mode,
    secrets: Secrets,
    faults: &mut Faults,
) -> IssuerSettings {
    let minted = IssuerSettings::Minted {
        life: token_ttl.unwrap_or(match mode {
            Mode::Demo => crate::local::demo::TOKEN_TTL,
            Mode::Serve | Mode::Run { .. } => DEFAULT_TOKEN_TTL,
        }),
    };
    let kind = flags.cp_token_issuer.as_deref().unwrap_or("minted");
    if kind != "minted" && token_ttl.is_some() {
        faults.add(
            "--token-ttl",
            format!("only minted tokens have a life of our choice, and CP_TOKEN_ISSUER is {kind}"),
        );
    }
    match kind {
        "minted" => minted,
        "static" => {
            let Some(token) = secrets.api_token else {
                faults.add(
                    "AMBIENT_API_TOKEN",
                    "missing; CP_TOKEN_ISSUER=static needs it",
                );
                return minted;
            };
            faults.check("AMBIENT_API_TOKEN", Token::new(token.expose_secret(), None));
            IssuerSettings::Static { token }
        }
        "oidc" => {
            let mut needed = |name: &str, value: &Option<String>| {
                if value.is_none() {
                    faults.add(name, "missing; CP_TOKEN_ISSUER=oidc needs it");
                }
                value.clone()
            };
            let url = needed("OIDC_TOKEN_URL", &flags.oidc_token_url);
            let client_id = needed("OIDC_CLIENT_ID", &flags.oidc_client_id);
            if secrets.oidc_client_secret.is_none() {
                needed("OIDC_CLIENT_SECRET", &None);
            }
            if flags.jwks.is_empty() {
                faults.add(
                    "AMBIENT_JWKS",
                    "missing; without it the API server cannot check the tokens of OIDC_TOKEN_URL",
                );
            }
            let url = url.and_then(|url| faults.check("OIDC_TOKEN_URL", parse_endpoint(&url)));
            match (url, client_id, secrets.oidc_client_secret) {
                (Some(url), Some(client_id), Some(client_secret)) => IssuerSettings::Oidc {
                    url,
                    client_id,
                    client_secret,
                },
                _ => minted,
            }
        }
        other => {
            faults.add(
                "CP_TOKEN_ISSUER",
                format!("{other:?} is neither minted, static nor oidc"),
            );
            minted
        }
    }
}

#[cfg(test)]
mod tests;
