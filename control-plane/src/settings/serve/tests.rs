use std::{io::Write as _, time::Duration};

use clap::Parser as _;

use super::*;

const CREDENTIALS: [(&str, &str); 1] = [("AMBIENT_API_TOKEN", "the-token")];

fn serve(arguments: &[&str], variables: &[(&str, &str)]) -> Result<ServeSettings, Vec<String>> {
    let arguments = std::iter::once("ambient-control-plane").chain(arguments.iter().copied());
    let parsed =
        raw::Arguments::try_parse_from(arguments).map_err(|error| vec![error.to_string()])?;
    let environment = |name: &str| {
        let set = variables.iter().find(|(variable, _)| *variable == name);
        set.map(|(_, value)| (*value).to_owned())
    };
    let secret = |name| environment(name).map(Into::into);
    let secrets = Secrets {
        api_token: secret("AMBIENT_API_TOKEN"),
        oidc_client_secret: secret("OIDC_CLIENT_SECRET"),
        anthropic_api_key: secret("ANTHROPIC_API_KEY"),
    };
    let log = LogSettings {
        level: String::new(),
        format: parsed.log.log_format,
    };
    let mut faults = Faults::default();
    let settings = check(parsed.serve, secrets, log, environment, &mut faults);
    if faults.0.is_empty() {
        Ok(settings.unwrap())
    } else {
        Err(faults.0)
    }
}

fn faults(arguments: &[&str]) -> Vec<String> {
    serve(arguments, &CREDENTIALS).unwrap_err()
}

#[test]
fn defaults_are_those_of_the_contract() {
    let settings = serve(&[], &CREDENTIALS).unwrap();

    assert_eq!(settings.api_url.as_str(), "http://localhost:8000/");
    assert_eq!(settings.grpc_address, "localhost:8001");
    assert!(!settings.grpc_tls);
    assert_eq!(settings.token_listen, "[::]:8080".parse().unwrap());
    assert_eq!(
        settings.token_url.as_str(),
        "http://ambient-control-plane.ambient-code.svc:8080/token"
    );
    assert_eq!(settings.kubernetes.namespace, "ambient-code");
    assert_eq!(settings.kubernetes.platform, Platform::Standard);
    assert!(settings.rate_limits && !settings.allow_unproven);
    assert!(matches!(settings.own, IssuerSettings::Static { .. }));
    assert!(matches!(settings.issuer, IssuerSettings::Static { .. }));
}

#[test]
fn the_own_namespace_is_in_what_runners_are_told() {
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("NAMESPACE", "agents"));
    let settings = serve(&["--cp-token-listen-addr", ":9999"], &variables).unwrap();
    assert_eq!(
        settings.token_url.as_str(),
        "http://ambient-control-plane.agents.svc:9999/token"
    );

    let arguments = ["--cp-runtime-namespace", "other"];
    let settings = serve(&arguments, &variables).unwrap();
    assert_eq!(settings.kubernetes.namespace, "other");
}

/// Files of a certificate and its key, and an argument for each.
fn tls_files() -> (tempfile::TempDir, [String; 4]) {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["cp.example".to_owned()]).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("tls.crt"), made.cert.pem()).unwrap();
    fs::write(path("tls.key"), made.signing_key.serialize_pem()).unwrap();
    let arguments = [
        "--cp-token-tls-cert-file".to_owned(),
        path("tls.crt"),
        "--cp-token-tls-key-file".to_owned(),
        path("tls.key"),
    ];
    (folder, arguments)
}

#[test]
fn with_a_certificate_runners_are_told_https() {
    assert!(serve(&[], &CREDENTIALS).unwrap().token_tls.is_none());

    let (folder, files) = tls_files();
    let arguments = files.each_ref().map(String::as_str);
    let settings = serve(&arguments, &CREDENTIALS).unwrap();
    assert_eq!(
        settings.token_url.as_str(),
        "https://ambient-control-plane.ambient-code.svc:8080/token"
    );
    let tls = settings.token_tls.unwrap();
    assert_eq!(tls.certificate, folder.path().join("tls.crt"));
    assert_eq!(tls.key, folder.path().join("tls.key"));

    // As behind a proxy that has a certificate of its own.
    let url = ["--cp-token-url", "https://tokens.example/token"];
    let settings = serve(&[&arguments[..], &url].concat(), &CREDENTIALS).unwrap();
    assert_eq!(settings.token_url.as_str(), url[1]);
}

#[test]
fn a_certificate_needs_its_key_and_the_other_way_round() {
    let (folder, files) = tls_files();
    let arguments = files.each_ref().map(String::as_str);
    for (given, missing, other) in [
        (
            &arguments[..2],
            "CP_TOKEN_TLS_KEY_FILE",
            "CP_TOKEN_TLS_CERT_FILE",
        ),
        (
            &arguments[2..],
            "CP_TOKEN_TLS_CERT_FILE",
            "CP_TOKEN_TLS_KEY_FILE",
        ),
    ] {
        assert_eq!(
            faults(given),
            [format!("{missing}: missing; {other} needs it")]
        );
    }
    fs::write(folder.path().join("tls.key"), "nothing").unwrap();
    let found = faults(&arguments);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("CP_TOKEN_TLS_KEY_FILE: there is no PEM private key in"),
        "{found:?}"
    );
}

#[test]
fn an_authority_for_runners_is_passed_on_as_it_is() {
    let (folder, _) = tls_files();
    let path = folder.path().join("tls.crt");
    let arguments = ["--cp-token-ca-file", path.to_str().unwrap()];
    let settings = serve(&arguments, &CREDENTIALS).unwrap();
    let given = settings.token_ca.unwrap().pem();
    assert_eq!(*given, *fs::read_to_string(&path).unwrap());

    let key = folder.path().join("tls.key");
    for (file, fault) in [
        (key.to_str().unwrap(), "there is no PEM certificate in it"),
        ("/does/not/exist", "cannot read"),
    ] {
        let found = faults(&["--cp-token-ca-file", file]);
        assert!(
            found[0].starts_with("CP_TOKEN_CA_FILE: ") && found[0].contains(fault),
            "{found:?}"
        );
    }
}

#[test]
fn client_credentials_win_over_a_fixed_token() {
    let arguments = [
        "--oidc-client-id",
        "me",
        "--oidc-token-url",
        "https://idp.example/token",
    ];
    let variables = [
        ("AMBIENT_API_TOKEN", "the-token"),
        ("OIDC_CLIENT_SECRET", "hush"),
    ];
    let settings = serve(&arguments, &variables).unwrap();
    assert!(matches!(settings.own, IssuerSettings::Oidc { .. }));
    assert!(matches!(settings.issuer, IssuerSettings::Oidc { .. }));

    let minted = [&arguments[..], &["--cp-token-issuer", "minted"]].concat();
    let settings = serve(&minted, &variables).unwrap();
    assert!(matches!(settings.own, IssuerSettings::Oidc { .. }));
    assert!(matches!(settings.issuer, IssuerSettings::Minted { .. }));
}

#[test]
fn without_any_credential_it_says_what_is_missing() {
    let faults = serve(&[], &[]).unwrap_err();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].starts_with("AMBIENT_API_TOKEN: missing"));
}

#[test]
fn every_fault_is_found() {
    let found = faults(&[
        "--ambient-api-server-url",
        "ftp://api",
        "--ambient-grpc-server-addr",
        "http://api:8001",
        "--ambient-grpc-use-tls",
        "perhaps",
        "--cp-token-issuer",
        "magic",
        "--cp-token-ttl",
        "5m",
        "--cp-token-listen-addr",
        "here",
        "--cp-token-url",
        "http://user:secret@cp/token",
        "--platform-mode",
        "cloud",
        "--agent-command",
        "sh -c",
        "--runner-log-level",
        "=nonsense=",
        "--ambient-pod-template",
        "/does/not/exist",
        "--ambient-max-resources",
        r#"{"cpu":"lots"}"#,
        "--ambient-pod-user",
        "root",
    ]);
    for setting in [
        "AMBIENT_API_SERVER_URL",
        "AMBIENT_GRPC_SERVER_ADDR",
        "AMBIENT_GRPC_USE_TLS",
        "CP_TOKEN_ISSUER",
        "CP_TOKEN_LISTEN_ADDR",
        "CP_TOKEN_URL",
        "PLATFORM_MODE",
        "AGENT_COMMAND",
        "RUNNER_LOG_LEVEL",
        "AMBIENT_POD_TEMPLATE",
        "AMBIENT_MAX_RESOURCES",
        "AMBIENT_POD_USER",
    ] {
        assert!(
            found.iter().any(|fault| fault.starts_with(setting)),
            "{setting}: {found:?}"
        );
    }
    assert!(!found.concat().contains("secret"), "{found:?}");
}

#[test]
fn only_minted_tokens_have_a_life_of_our_choice() {
    let found = faults(&["--cp-token-ttl", "5m"]);
    assert!(found[0].starts_with("CP_TOKEN_TTL"), "{found:?}");

    let arguments = ["--cp-token-ttl", "5m", "--cp-token-issuer", "minted"];
    let settings = serve(&arguments, &CREDENTIALS).unwrap();
    let IssuerSettings::Minted { life } = settings.issuer else {
        panic!("{:?}", settings.issuer);
    };
    assert_eq!(life.as_secs(), 300);
}

#[test]
fn companions_and_model_access_are_as_set() {
    let mut variables = CREDENTIALS.to_vec();
    variables.push(("ANTHROPIC_API_KEY", "sk-hush"));
    let settings = serve(
        &[
            "--use-vertex",
            "true",
            "--vertex-secret-name",
            "vertex",
            "--cloud-ml-region",
            "global",
            "--mcp-image",
            "mcp:1",
            "--jira-mcp-image",
            "jira:1",
            "--platform-mode",
            "mpp",
        ],
        &variables,
    )
    .unwrap();

    let kubernetes = &settings.kubernetes;
    assert_eq!(kubernetes.companions.mcp.as_deref(), Some("mcp:1"));
    let credentials = &kubernetes.companions.credentials;
    assert_eq!(credentials.len(), 1);
    assert_eq!(credentials[&Provider::Jira], "jira:1");
    let vertex = kubernetes.model_access.vertex.as_ref().unwrap();
    assert_eq!(vertex.variables["CLOUD_ML_REGION"], "global");
    assert_eq!(vertex.secret.as_ref().unwrap().namespace, "ambient-code");
    assert_eq!(kubernetes.namespace_of("Team"), "ambient-code--team");
    assert!(!format!("{settings:?}").contains("hush"));
}

#[test]
fn a_pod_template_is_yaml_or_a_clear_fault() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"spec:\n  nodeSelector: {pool: agents}\n  containers: []\n")
        .unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let settings = serve(&["--ambient-pod-template", &path], &CREDENTIALS).unwrap();
    let overlay = settings.kubernetes.overlay.unwrap();
    let selector = overlay.spec.unwrap().node_selector.unwrap();
    assert_eq!(selector["pool"], "agents");

    file.write_all(b"spec: [not, a, template]\n").unwrap();
    let found = faults(&["--ambient-pod-template", &path]);
    assert!(found[0].contains("is no pod template"), "{found:?}");
}

#[test]
fn a_tenant_operators_platform_says_whom_pods_run_as() {
    let user = |arguments: &[&str]| serve(arguments, &CREDENTIALS).unwrap().kubernetes.pods.user;
    assert_eq!(user(&[]), PodUser::Ours);
    assert_eq!(user(&["--platform-mode", "mpp"]), PodUser::Platform);
    assert_eq!(user(&["--ambient-pod-user", "platform"]), PodUser::Platform);
    let ours = ["--platform-mode", "mpp", "--ambient-pod-user", "ours"];
    assert_eq!(user(&ours), PodUser::Ours);
}

#[test]
fn a_pod_template_that_says_what_is_not_its_to_say_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let template = |text: &str| {
        fs::write(path, text).unwrap();
        serve(&["--ambient-pod-template", path], &CREDENTIALS)
    };
    assert!(template("spec:\n  nodeSelector: {pool: agents}\n").is_ok());
    let faults = template("spec:\n  serviceAccountName: admin\n").unwrap_err();
    assert!(faults[0].contains("spec.serviceAccountName"), "{faults:?}");
}

#[test]
fn a_lease_is_neither_too_short_nor_too_long() {
    let lease = |text| serve(&["--cp-lease-duration", text], &CREDENTIALS);
    assert_eq!(
        serve(&[], &CREDENTIALS).unwrap().lease,
        LeaseTimes::default()
    );
    let five = LeaseTimes::new(Duration::from_secs(5));
    assert_eq!(lease("5s").unwrap().lease, five);
    for text in ["2s", "6m", "0", "soon"] {
        let faults = lease(text).unwrap_err();
        assert!(faults[0].starts_with("CP_LEASE_DURATION: "), "{faults:?}");
    }
}
