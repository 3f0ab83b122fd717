//! Flags and variables as they are given, before they are checked.

use std::path::PathBuf;

use ambient_shared::telemetry::LogFormat;
use clap::{Args, Parser, Subcommand};

use crate::keypair::kind::KeyKind;

pub(super) use self::serve::Serve;

mod serve;

/// Keeps agent sessions supplied with tokens, and runs them: as pods, with a Kubernetes cluster;
/// as processes, with `local`.
#[derive(Debug, Parser)]
#[command(name = "ambient-control-plane", version)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Option<Verb>,
    #[command(flatten)]
    pub(super) serve: Serve,
    #[command(flatten)]
    pub(super) log: Log,
}

#[derive(Debug, Args)]
pub(super) struct Log {
    /// Log level: error, warn, info, debug, trace, or a list such as `info,tower=debug` [default:
    /// info; warn for `run` and `--demo`].
    #[arg(long, global = true, env = "LOG_LEVEL", value_name = "LEVEL")]
    pub(super) log_level: Option<String>,
    /// Log lines for people (text), for machines (json), or by whether stderr is a terminal.
    #[arg(
        long,
        global = true,
        env = "AMBIENT_LOG_FORMAT",
        default_value = "auto"
    )]
    pub(super) log_format: LogFormat,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Run everything on this machine: API server, control plane, sessions as processes.
    ///
    /// No sandbox: agents run as you, with all that you may do.
    Local(Box<Local>),
    /// Try each thing that the control plane depends on, with its own settings, and print a table.
    ///
    /// Changes nothing. Settings are given as without this verb: before it, or by environment.
    Check,
    /// Make a session, fetch its token as its runner would, and delete it again; print a table.
    ///
    /// The control plane must run. Settings are given as without this verb: before it, or by
    /// environment.
    Try {
        /// The session's project; made, and deleted again, when it is not there.
        #[arg(long, default_value = "ambient-test", value_name = "NAME")]
        project: String,
    },
    /// Print the permissions that the control plane needs, for `kubectl apply --filename -`.
    ///
    /// They depend on its settings, which are given as without this verb: before it, or by
    /// environment.
    Rules,
    /// Show or rotate the keys in the cluster.
    ///
    /// The namespace and the access to the cluster are given as without this verb: before it, or by
    /// environment.
    Keys {
        #[command(subcommand)]
        what: KeysVerb,
    },
    /// Print the hash under which logs show a session.
    Hash {
        /// The session's id.
        id: String,
    },
    /// Hold one session's processes together. For the control plane alone.
    #[command(hide = true)]
    Shim {
        /// The session's folder.
        #[arg(long)]
        folder: PathBuf,
        /// Most open files of the session's processes, unless they ask for more themselves.
        #[arg(long)]
        open_files: u64,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum KeysVerb {
    /// Print the ids of the keys: those in use, and those that a rotation still keeps beside them.
    Show,
    /// Begin a rotation; the control plane that runs completes it, and interrupts nobody.
    ///
    /// What is still needed stays valid: running sessions, and tokens until they expire. Refused
    /// while the rotation before is not complete.
    Rotate {
        /// What is made anew.
        #[arg(value_enum)]
        kind: KeyKind,
    },
}

#[derive(Debug, Args)]
pub(super) struct Local {
    /// Run one session with the bundled agent, show what happens, and end.
    #[arg(long)]
    pub(super) demo: bool,
    #[command(subcommand)]
    pub(super) mode: Option<LocalVerb>,
    #[command(flatten)]
    pub(super) flags: Flags,
}

#[derive(Debug, Subcommand)]
pub(super) enum LocalVerb {
    /// Run one session with this agent, talk with it on the terminal, and end as it ends.
    ///
    /// What the agent says is on stdout, all else on stderr; lines typed go to the agent; Ctrl-D
    /// ends its input, Ctrl-C stops it, twice at once.
    Run(Run),
}

#[derive(Debug, Args)]
pub(super) struct Run {
    /// How to talk with the agent: none, lines or stream-json.
    #[arg(long, value_name = "MODE", default_value = "lines")]
    pub(super) io: String,
    /// With stream-json: close the agent's stdin after that many results; 0: never.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(super) turns: u32,
    /// The agent.
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub(super) command: Vec<String>,
}

/// Flags of all kinds of local mode; those with a variable can be set by that too.
#[derive(Debug, Args)]
pub(super) struct Flags {
    /// Folder of all state. Default: ambient in `XDG_STATE_HOME`, else in ~/.local/state; a
    /// temporary one for `run` and `--demo`.
    #[arg(long, global = true, env = "AMBIENT_DATA_DIR", value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Where the session API is served over REST [default: 127.0.0.1:8000; any port for `run` and
    /// `--demo`].
    #[arg(long, global = true, value_name = "ADDR:PORT")]
    pub(super) api_listen: Option<String>,
    /// Where the session API is served over gRPC [default: 127.0.0.1:8001, likewise].
    #[arg(long, global = true, value_name = "ADDR:PORT")]
    pub(super) grpc_listen: Option<String>,
    /// Where sessions get their tokens [default: 127.0.0.1:8080, likewise].
    #[arg(long, global = true, value_name = "ADDR:PORT")]
    pub(super) token_listen: Option<String>,
    /// Life of minted tokens, from 2s [default: 15m].
    #[arg(long, global = true, value_name = "DURATION")]
    pub(super) token_ttl: Option<String>,
    /// How often tokens of running sessions are renewed by push: a duration, or off [default: a
    /// third of the tokens' life].
    #[arg(long, global = true, value_name = "DURATION")]
    pub(super) refresh_interval: Option<String>,
    /// The agent of sessions that name none, as a JSON array [default: the bundled demo agent].
    #[arg(long, global = true, env = "AGENT_COMMAND", value_name = "JSON")]
    pub(super) agent_command: Option<String>,
    /// Where tokens come from: minted, static (`AMBIENT_API_TOKEN`) or oidc [default: minted].
    #[arg(long, global = true, env = "CP_TOKEN_ISSUER", value_name = "KIND")]
    pub(super) cp_token_issuer: Option<String>,
    /// Token URL of the identity provider; its client secret is `OIDC_CLIENT_SECRET`.
    #[arg(long, global = true, env = "OIDC_TOKEN_URL", value_name = "URL")]
    pub(super) oidc_token_url: Option<String>,
    /// Client id at the identity provider.
    #[arg(long, global = true, env = "OIDC_CLIENT_ID", value_name = "ID")]
    pub(super) oidc_client_id: Option<String>,
    /// Keys that sign users' tokens: JWKS URLs or files, with commas between.
    #[arg(
        long,
        global = true,
        env = "AMBIENT_JWKS",
        value_delimiter = ',',
        value_name = "URL|FILE"
    )]
    pub(super) jwks: Vec<String>,
    /// Accepted issuers of users' tokens, with commas between [default: any].
    #[arg(
        long,
        global = true,
        env = "AMBIENT_JWT_ISSUER",
        value_delimiter = ',',
        value_name = "ISS"
    )]
    pub(super) jwt_issuer: Vec<String>,
    /// Accepted audiences of users' tokens, with commas between [default: any].
    #[arg(
        long,
        global = true,
        env = "AMBIENT_JWT_AUDIENCE",
        value_delimiter = ',',
        value_name = "AUD"
    )]
    pub(super) jwt_audience: Vec<String>,
    /// User names of administrators, with commas between.
    #[arg(
        long,
        global = true,
        env = "AMBIENT_ADMINS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    pub(super) admins: Vec<String>,
    /// User name whose token makes a service caller.
    #[arg(long, global = true, env = "GRPC_SERVICE_ACCOUNT", value_name = "NAME")]
    pub(super) grpc_service_account: Option<String>,
    /// Limit the rates of the token endpoint: on or off.
    #[arg(
        long,
        global = true,
        env = "CP_RATE_LIMITS",
        default_value = "on",
        value_name = "ON|OFF"
    )]
    pub(super) cp_rate_limits: String,
    /// Give tokens to runners that send no proof: true or false.
    #[arg(
        long,
        global = true,
        env = "CP_ALLOW_UNPROVEN",
        default_value = "false",
        value_name = "BOOL"
    )]
    pub(super) cp_allow_unproven: String,
    /// Log level of runners and sidecars.
    #[arg(long, global = true, env = "RUNNER_LOG_LEVEL", value_name = "LEVEL")]
    pub(super) runner_log_level: Option<String>,
}
