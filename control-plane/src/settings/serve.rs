//! Settings of the control plane on Kubernetes (contract section 6).

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path, sync::Arc};

use ambient_shared::{
    client::GrpcAddress, exchange::parse_endpoint, exit, settings::parse_flag,
    telemetry::parse_level, token::Token,
};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use secrecy::ExposeSecret as _;
use url::Url;

use super::{
    DEFAULT_TOKEN_TTL, Faults, IssuerSettings, LogSettings, Secrets, raw,
    values::{
        parse_command, parse_interval, parse_lease, parse_listen_anywhere, parse_rotation,
        parse_ttl,
    },
};
use crate::{
    authority::Authority,
    backend::kubernetes::{
        objects::check_overlay,
        settings::{
            Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings, PodUser,
            Provider, SecretRef, Vertex,
        },
    },
    check::CheckSettings,
    cluster::ClusterSettings,
    endpoint::tls::{self, TlsSettings},
    keypair::rotation::Waits,
    keys::{KeysAction, KeysSettings},
    leader::LeaseTimes,
    reconcile::desired::parse_quantities,
    refresh::Interval,
    rules::{CONTROL_PLANE, RuleSettings},
};

/// The control plane's settings.
#[derive(Debug)]
pub struct ServeSettings {
    /// API server's REST.
    pub api_url: Url,
    /// API server's gRPC, `host:port`.
    pub grpc_address: String,
    /// Whether that speaks TLS.
    pub grpc_tls: bool,
    /// The control plane's own credential for the API server: `Static` or `Oidc`.
    pub own: IssuerSettings,
    /// Where sessions' tokens come from.
    pub issuer: IssuerSettings,
    /// The refresh ticker's interval.
    pub refresh: Interval,
    /// Where the token endpoint listens.
    pub token_listen: SocketAddr,
    /// What it shows over TLS; none: plain HTTP.
    pub token_tls: Option<TlsSettings>,
    /// What sessions are told of it.
    pub token_url: Url,
    /// CA certificates that runners are to trust for that.
    pub token_ca: Option<Arc<Authority>>,
    /// Where metrics and health are served.
    pub admin_listen: SocketAddr,
    /// How the cluster is reached.
    pub cluster: ClusterSettings,
    /// How session pods are made.
    pub kubernetes: KubernetesSettings,
    /// The agent of sessions that name none.
    pub agent_command: Option<Vec<String>>,
    /// Images that sessions may ask for, as globs.
    pub agent_image_allow: Vec<String>,
    /// The most of each resource that a session may ask for, as Kubernetes quantities.
    pub max_resources: BTreeMap<String, String>,
    /// `LOG_LEVEL` of runners and sidecars.
    pub runner_log_level: Option<String>,
    /// Proxies, which sessions get too.
    pub passed_on: BTreeMap<String, String>,
    /// Whether the token endpoint limits rates.
    pub rate_limits: bool,
    /// Whether runners without a proof may have tokens.
    pub allow_unproven: bool,
    /// The times of the Lease by which one replica leads.
    pub lease: LeaseTimes,
    /// How long rotations of keys wait for what.
    pub rotation: Waits,
    /// The name of this replica, for people: the pod's.
    pub replica: String,
    /// `AMBIENT_POD_UID`: the `uid` of the pod that this program runs in, to send Events about it.
    pub pod_uid: Option<String>,
    /// What is logged.
    pub log: LogSettings,
}

impl From<&ServeSettings> for CheckSettings {
    fn from(settings: &ServeSettings) -> Self {
        Self {
            api_url: settings.api_url.clone(),
            grpc: GrpcAddress {
                address: settings.grpc_address.clone(),
                tls: settings.grpc_tls,
                ca: None,
            },
            own: settings.own.clone(),
            cluster: settings.cluster.clone(),
            rules: RuleSettings::from(&settings.kubernetes),
        }
    }
}

/// Longest pod template that is read, in bytes: an object of Kubernetes is no larger (etcd's
/// request limit).
const MAX_TEMPLATE: u64 = 1536 * 1024;

const TLS_CERT: &str = "CP_TOKEN_TLS_CERT_FILE";
const TLS_KEY: &str = "CP_TOKEN_TLS_KEY_FILE";

/// None only where there are faults.
pub(super) fn check(
    from: raw::Serve,
    secrets: Secrets,
    log: LogSettings,
    environment: impl Fn(&str) -> Option<String>,
    faults: &mut Faults,
) -> Option<ServeSettings> {
    let flag = |faults: &mut Faults, name: &str, text: &str| {
        faults.check(name, parse_flag(text)).unwrap_or_default()
    };
    let namespace = own_namespace(&from, &environment);
    let token_listen = listen(faults, "CP_TOKEN_LISTEN_ADDR", &from.cp_token_listen_addr);
    let token_tls = token_tls(&from, faults);
    let token_url = from.cp_token_url.clone().unwrap_or_else(|| {
        let port = token_listen.port();
        let scheme = if token_tls.is_some() { "https" } else { "http" };
        format!("{scheme}://ambient-control-plane.{namespace}.svc:{port}/token")
    });
    let api_url = url(
        faults,
        "AMBIENT_API_SERVER_URL",
        &from.ambient_api_server_url,
    );
    let grpc_tls = flag(faults, "AMBIENT_GRPC_USE_TLS", &from.ambient_grpc_use_tls);
    let grpc_address = from.ambient_grpc_server_addr.clone();
    if grpc_address.contains("://") || !grpc_address.contains(':') {
        faults.add(
            "AMBIENT_GRPC_SERVER_ADDR",
            format!("{grpc_address:?} is not HOST:PORT"),
        );
    }
    let (own, issuer) = tokens(&from, &secrets, faults);
    let refresh = from.cp_refresh_interval.as_deref().map_or_else(
        || Interval::Auto,
        |text| {
            faults
                .check("CP_REFRESH_INTERVAL", parse_interval(text))
                .unwrap_or_default()
        },
    );
    let agent_command = from
        .agent_command
        .as_deref()
        .and_then(|text| faults.check("AGENT_COMMAND", parse_command(text)));
    if let Some(level) = &from.runner_log_level {
        faults.check("RUNNER_LOG_LEVEL", parse_level(level));
    }
    let overlay = from
        .ambient_pod_template
        .as_deref()
        .and_then(|path| faults.check("AMBIENT_POD_TEMPLATE", read_template(path)));
    let scheme = if grpc_tls { "https" } else { "http" };
    let kubernetes = KubernetesSettings {
        platform: platform(&from, faults),
        images: Images {
            agent: from.runner_image.clone(),
            runner: from.ambient_runner_image.clone(),
            sidecar: from.ambient_sidecar_image.clone(),
            pull_namespace: from.runner_image_namespace.clone(),
            pull_secret: from.image_pull_secret.clone(),
        },
        overlay,
        upstream: from.ambient_api_server_url.trim_end_matches('/').to_owned(),
        grpc_upstream: format!("{scheme}://{grpc_address}"),
        model_access: ModelAccess {
            vertex: flag(faults, "USE_VERTEX", &from.use_vertex).then(|| vertex(&from, &namespace)),
            anthropic_api_key: secrets.anthropic_api_key,
        },
        companions: companions(&from),
        pods: pods(&from, faults),
        namespace,
    };
    let lease = faults.check("CP_LEASE_DURATION", parse_lease(&from.cp_lease_duration));
    let rotation = parse_rotation(&from.cp_key_rotation_wait);
    let rotation = faults.check("CP_KEY_ROTATION_WAIT", rotation);
    let token_url = url(faults, "CP_TOKEN_URL", &token_url);
    let token_ca = from
        .cp_token_ca_file
        .as_deref()
        .and_then(|path| faults.check("CP_TOKEN_CA_FILE", Authority::open(path)));
    let max_resources = parse_quantities(&from.ambient_max_resources);
    let max_resources = faults.check("AMBIENT_MAX_RESOURCES", max_resources);
    Some(ServeSettings {
        token_url: token_url?,
        admin_listen: listen(faults, "AMBIENT_ADMIN_LISTEN", &from.ambient_admin_listen),
        cluster: ClusterSettings {
            kubeconfig: from.kubeconfig,
            project_token_file: from.project_kube_token_file,
        },
        rate_limits: flag(faults, "CP_RATE_LIMITS", &from.cp_rate_limits),
        allow_unproven: flag(faults, "CP_ALLOW_UNPROVEN", &from.cp_allow_unproven),
        passed_on: proxies(&environment),
        agent_image_allow: from.agent_image_allow,
        max_resources: max_resources.unwrap_or_default(),
        runner_log_level: from.runner_log_level,
        api_url: api_url?,
        grpc_address,
        grpc_tls,
        own,
        issuer,
        refresh,
        token_listen,
        token_tls,
        token_ca: token_ca.map(Arc::new),
        kubernetes,
        agent_command,
        lease: lease.unwrap_or_default(),
        rotation: rotation.unwrap_or_default(),
        replica: environment("HOSTNAME").unwrap_or_else(|| CONTROL_PLANE.to_owned()),
        pod_uid: environment("AMBIENT_POD_UID"),
        log,
    })
}

/// What the permissions depend on.
pub(super) fn rules(
    from: &raw::Serve,
    environment: impl Fn(&str) -> Option<String>,
    faults: &mut Faults,
) -> RuleSettings {
    let namespace = own_namespace(from, &environment);
    let pull_secret = from.image_pull_secret.clone().map(|name| SecretRef {
        namespace: namespace.clone(),
        name,
    });
    let use_vertex = faults.check("USE_VERTEX", parse_flag(&from.use_vertex));
    let vertex = use_vertex
        .unwrap_or_default()
        .then(|| vertex(from, &namespace).secret);
    RuleSettings {
        service_account: CONTROL_PLANE.to_owned(),
        platform: platform(from, faults),
        pull_namespace: from.runner_image_namespace.clone(),
        copied: pull_secret.into_iter().chain(vertex.flatten()).collect(),
        namespace,
    }
}

/// For the verb `keys`, which needs nothing of the rest.
pub(super) fn keys(
    from: &raw::Serve,
    action: KeysAction,
    log: LogSettings,
    environment: impl Fn(&str) -> Option<String>,
) -> KeysSettings {
    KeysSettings {
        cluster: ClusterSettings {
            kubeconfig: from.kubeconfig.clone(),
            project_token_file: None,
        },
        namespace: own_namespace(from, &environment),
        action,
        log,
    }
}

fn own_namespace(from: &raw::Serve, environment: &impl Fn(&str) -> Option<String>) -> String {
    from.cp_runtime_namespace
        .clone()
        .or_else(|| environment("NAMESPACE"))
        .unwrap_or_else(|| "ambient-code".to_owned())
}

/// Our own credential, and the source of sessions' tokens. Client credentials win over a fixed
/// token, as existing installs set both (contract section 6).
fn tokens(
    from: &raw::Serve,
    secrets: &Secrets,
    faults: &mut Faults,
) -> (IssuerSettings, IssuerSettings) {
    let life = from.cp_token_ttl.as_deref().map(|text| {
        faults
            .check("CP_TOKEN_TTL", parse_ttl(text))
            .unwrap_or(DEFAULT_TOKEN_TTL)
    });
    let minted = IssuerSettings::Minted {
        life: life.unwrap_or(DEFAULT_TOKEN_TTL),
    };
    let oidc = oidc(from, secrets, faults);
    let fixed = secrets.api_token.as_ref().map(|token| {
        faults.check("AMBIENT_API_TOKEN", Token::new(token.expose_secret(), None));
        IssuerSettings::Static {
            token: token.clone(),
        }
    });
    let Some(own) = oidc.clone().or_else(|| fixed.clone()) else {
        faults.add(
            "AMBIENT_API_TOKEN",
            "missing; the control plane needs it, or OIDC_TOKEN_URL, OIDC_CLIENT_ID and \
             OIDC_CLIENT_SECRET, to talk to the API server",
        );
        return (minted.clone(), minted);
    };
    let issuer = match from.cp_token_issuer.as_deref() {
        None => own.clone(),
        Some("minted") => minted,
        Some("static") => fixed.unwrap_or_else(|| {
            faults.add(
                "AMBIENT_API_TOKEN",
                "missing; CP_TOKEN_ISSUER=static needs it",
            );
            minted
        }),
        Some("oidc") => oidc.unwrap_or_else(|| {
            faults.add(
                "OIDC_CLIENT_ID",
                "missing; CP_TOKEN_ISSUER=oidc needs it, OIDC_TOKEN_URL and OIDC_CLIENT_SECRET",
            );
            minted
        }),
        Some(other) => {
            faults.add(
                "CP_TOKEN_ISSUER",
                format!("{other:?} is neither minted, static nor oidc"),
            );
            minted
        }
    };
    if life.is_some() && !matches!(issuer, IssuerSettings::Minted { .. }) {
        faults.add(
            "CP_TOKEN_TTL",
            "only minted tokens have a life of our choice; set CP_TOKEN_ISSUER=minted, or leave \
             it out",
        );
    }
    (own, issuer)
}

/// Client credentials, when id and secret are set.
fn oidc(from: &raw::Serve, secrets: &Secrets, faults: &mut Faults) -> Option<IssuerSettings> {
    let client_id = from.oidc_client_id.clone()?;
    let client_secret = secrets.oidc_client_secret.clone()?;
    let Some(url) = &from.oidc_token_url else {
        faults.add(
            "OIDC_TOKEN_URL",
            "missing; OIDC_CLIENT_ID and OIDC_CLIENT_SECRET are for it",
        );
        return None;
    };
    let url = faults.check("OIDC_TOKEN_URL", parse_endpoint(url))?;
    Some(IssuerSettings::Oidc {
        url,
        client_id,
        client_secret,
    })
}

/// What the token port shows over TLS. Some also where there is a fault: TLS is what was meant.
fn token_tls(from: &raw::Serve, faults: &mut Faults) -> Option<TlsSettings> {
    let (certificate, key) = (
        from.cp_token_tls_cert_file.clone(),
        from.cp_token_tls_key_file.clone(),
    );
    if certificate.is_none() && key.is_none() {
        return None;
    }
    for (name, file, other) in [(TLS_CERT, &certificate, TLS_KEY), (TLS_KEY, &key, TLS_CERT)] {
        if file.is_none() {
            faults.add(name, format!("missing; {other} needs it"));
        }
    }
    let are_both = certificate.is_some() && key.is_some();
    let files = TlsSettings {
        certificate: certificate.unwrap_or_default(),
        key: key.unwrap_or_default(),
        look_every: tls::LOOK_EVERY,
    };
    if are_both && let Err(error) = files.check() {
        let name = if error.is_of_key(&files) {
            TLS_KEY
        } else {
            TLS_CERT
        };
        faults.add(name, exit::report(&error));
    }
    Some(files)
}

fn platform(from: &raw::Serve, faults: &mut Faults) -> Platform {
    match from.platform_mode.as_str() {
        "standard" => Platform::Standard,
        "mpp" => Platform::Mpp {
            config_namespace: from.mpp_config_namespace.clone(),
        },
        other => {
            faults.add(
                "PLATFORM_MODE",
                format!("{other:?} is neither standard nor mpp"),
            );
            Platform::Standard
        }
    }
}

fn vertex(from: &raw::Serve, own_namespace: &str) -> Vertex {
    let variables = [
        (
            "ANTHROPIC_VERTEX_PROJECT_ID",
            &from.anthropic_vertex_project_id,
        ),
        ("CLOUD_ML_REGION", &from.cloud_ml_region),
    ];
    let set = |(name, value): (&str, &Option<String>)| Some((name.to_owned(), value.clone()?));
    Vertex {
        secret: from.vertex_secret_name.clone().map(|name| SecretRef {
            namespace: from
                .vertex_secret_namespace
                .clone()
                .unwrap_or_else(|| own_namespace.to_owned()),
            name,
        }),
        variables: variables.into_iter().filter_map(set).collect(),
    }
}

fn companions(from: &raw::Serve) -> Companions {
    let credentials = [
        (Provider::Github, &from.github_mcp_image),
        (Provider::Jira, &from.jira_mcp_image),
        (Provider::Kubernetes, &from.k8s_mcp_image),
        (Provider::Google, &from.google_mcp_image),
    ];
    let set = |(provider, image): (Provider, &Option<String>)| Some((provider, image.clone()?));
    Companions {
        mcp: from.mcp_image.clone(),
        mcp_api_server_url: from.mcp_api_server_url.clone(),
        credentials: credentials.into_iter().filter_map(set).collect(),
    }
}

fn pods(from: &raw::Serve, faults: &mut Faults) -> PodSettings {
    let user = match from.ambient_pod_user.as_deref() {
        // A tenant operator's platform gives each namespace users of its own.
        None if from.platform_mode == "mpp" => PodUser::Platform,
        None | Some("ours") => PodUser::Ours,
        Some("platform") => PodUser::Platform,
        Some(other) => {
            faults.add(
                "AMBIENT_POD_USER",
                format!("{other:?} is neither ours nor platform"),
            );
            PodUser::Ours
        }
    };
    PodSettings {
        user,
        service_ca: from.ambient_service_ca.clone(),
    }
}

fn listen(faults: &mut Faults, name: &str, text: &str) -> SocketAddr {
    faults
        .check(name, parse_listen_anywhere(text))
        .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
}

/// A URL that passes the rules of contract section 1. None is a fault, found already.
fn url(faults: &mut Faults, name: &str, text: &str) -> Option<Url> {
    faults.check(name, parse_endpoint(text))
}

/// The operator's overlay of the pod template.
fn read_template(path: &Path) -> Result<Box<PodTemplateSpec>, String> {
    let place = path.display();
    let text = read_text(path)?;
    let template = serde_saphyr::from_str(&text)
        .map_err(|error| format!("{place} is no pod template: {error}"))?;
    check_overlay(&template).map_err(|error| format!("{place}: {error}"))?;
    Ok(Box::new(template))
}

fn read_text(path: &Path) -> Result<String, String> {
    let place = path.display();
    let size = fs::metadata(path).map_err(|error| format!("cannot read {place}: {error}"))?;
    if size.len() > MAX_TEMPLATE {
        return Err(format!("{place} is larger than {MAX_TEMPLATE} bytes"));
    }
    fs::read_to_string(path).map_err(|error| format!("cannot read {place}: {error}"))
}

/// The proxies of this process, for sessions.
fn proxies(environment: &impl Fn(&str) -> Option<String>) -> BTreeMap<String, String> {
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), environment(name)?)))
        .collect()
}

#[cfg(test)]
mod tests;
