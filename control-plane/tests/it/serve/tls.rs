//! The token port with TLS, from the program's settings to a runner that pulls.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use ambient_control_plane::metrics::CERTIFICATE_RELOADS;
use ambient_shared::swap::write_atomic;
use ambient_testing::{
    DEADLINE,
    faults::Relay,
    programs::{Program, Running},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::faults::site::{Session, Site};

/// How often is looked for what nothing announces.
const LOOK: Duration = Duration::from_millis(50);

/// An authority, which signs what a program then shows.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { pem, issuer }
    }

    /// Puts a new certificate of this machine, and its key, in the place of those before.
    fn sign_into(&self, folder: &Path) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let put = |name, pem: &str| write_atomic(&folder.join(name), pem.as_bytes(), 0o600);
        put("tls.crt", &signed.pem()).unwrap();
        put("tls.key", &key.serialize_pem()).unwrap();
    }
}

/// The session's runner, with what its pod says, and its files in this folder.
async fn runner(session: &Session<'_>, folder: &Path) -> Running {
    let site = session.site;
    let secret = site.get(&session.secret()).await.unwrap();
    let key = secret["data"]["session-key"].as_str().unwrap();
    fs::write(folder.join("session-key"), STANDARD.decode(key).unwrap()).unwrap();
    let pod = site.get(&session.pod()).await.unwrap();
    let variables = pod["spec"]["containers"][0]["env"].as_array().unwrap();
    let mut program = Program::new("ambient-runner");
    for variable in variables {
        let (name, value) = (variable["name"].as_str().unwrap(), &variable["value"]);
        if name == "SESSION_ID" || name.starts_with("AMBIENT_CP_") {
            program = program.env(name, value.as_str().unwrap());
        }
    }
    program
        .env("AMBIENT_BOT_TOKEN_FILE", folder.join("none"))
        .env("AMBIENT_SESSION_KEY_FILE", folder.join("session-key"))
        .env("AMBIENT_TOKEN_FILE", folder.join("token"))
        .env("AMBIENT_TERMINATION_LOG", folder.join("last-words"))
        .args(["--", "sleep", "600"])
        .start()
}

/// Waits until a file holds something else than before, and gives it.
async fn other_than(before: &str, file: &Path) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let now = fs::read_to_string(file).unwrap_or_default();
        if !now.is_empty() && now != before {
            return now;
        }
        assert!(Instant::now() < deadline, "{} stays", file.display());
        sleep(LOOK).await;
    }
}

/// Waits until the program has taken over so many new certificates.
async fn until_reloaded(admin: SocketAddr, count: usize) {
    let url = format!("http://{admin}/metrics");
    let line = format!("{CERTIFICATE_RELOADS}{{result=\"ok\"}} {count}");
    let deadline = Instant::now() + DEADLINE;
    loop {
        let metrics = reqwest::get(&url).await.unwrap().text().await.unwrap();
        if metrics.lines().any(|it| it == line) {
            return;
        }
        assert!(Instant::now() < deadline, "no {line} in\n{metrics}");
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_gets_its_tokens_over_tls_while_the_certificate_is_replaced() {
    let site = Site::new("serve-tls").await;
    let folder = tempfile::tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let (authority, other) = (Authority::new(), Authority::new());
    authority.sign_into(folder.path());
    fs::write(file("ca.crt"), &authority.pem).unwrap();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let relay = Relay::start(nobody).await;
    let url = format!("https://localhost:{}/token", relay.address().port());
    let mut program = site
        .program()
        .env("CP_TOKEN_URL", &url)
        .env("CP_TOKEN_TLS_CERT_FILE", file("tls.crt"))
        .env("CP_TOKEN_TLS_KEY_FILE", file("tls.key"))
        .env("CP_TOKEN_CA_FILE", file("ca.crt"))
        .env("CP_TOKEN_TTL", "4s")
        .start();
    let admin = program.listening("admin").await;
    relay.set_server(program.listening("endpoint").await);
    site.create_project().await;
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;
    let mut runner = runner(&session, folder.path()).await;
    let first = other_than("", &file("token")).await;

    authority.sign_into(folder.path());
    until_reloaded(admin, 1).await;
    // The runner has to shake hands again.
    relay.reset();
    let second = other_than(&first, &file("token")).await;

    other.sign_into(folder.path());
    until_reloaded(admin, 2).await;
    relay.reset();
    let distrusts = |line: &Value| line.to_string().contains("invalid peer certificate");
    runner.log_line("it distrusts the other", distrusts).await;
    authority.sign_into(folder.path());
    let third = other_than(&second, &file("token")).await;
    other_than(&third, &file("token")).await;
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(143));
}
