//! TLS of the token port: who is served, and certificates that are replaced while it runs.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ambient_control_plane::{
    endpoint::{ConnectionLimits, tls::TlsSettings},
    metrics::{CERTIFICATE_EXPIRY, CERTIFICATE_LOADED, CERTIFICATE_RELOADS, CONNECTIONS_CLOSED},
};
use ambient_shared::{
    bearer::PublicKey,
    client::{http_client_to, trust_roots},
    exchange::{self, Exchange},
    resolve::Resolver,
    swap::{SecretVolume, write_atomic},
    telemetry::MetricsPage,
};
use ambient_testing::DEADLINE;
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, ServerName},
    version::{TLS12, TLS13},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    clocks,
    scene::{ACTIVE, Client, Scene, Setup, id, raw},
};

/// How often the tests have the files looked at.
const LOOK: Duration = Duration::from_millis(30);

/// A certificate of its own authority, for this machine.
struct Pair(rcgen::CertifiedKey<rcgen::KeyPair>);

impl Pair {
    fn new() -> Self {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        Self(rcgen::generate_simple_self_signed(names).unwrap())
    }

    fn certificate(&self) -> String {
        self.0.cert.pem()
    }

    fn key(&self) -> String {
        self.0.signing_key.serialize_pem()
    }

    fn der(&self) -> CertificateDer<'static> {
        self.0.cert.der().clone()
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.der()).unwrap();
        roots
    }
}

/// The files of a token port.
struct Files {
    folder: TempDir,
}

impl Files {
    fn with(pair: &Pair) -> Self {
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        files.rename("tls.key", &pair.key());
        files.rename("tls.crt", &pair.certificate());
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new file over the old one.
    fn rename(&self, name: &str, text: &str) {
        write_atomic(&self.path(name), text.as_bytes(), 0o600).unwrap();
    }

    fn settings(&self) -> TlsSettings {
        TlsSettings {
            certificate: self.path("tls.crt"),
            key: self.path("tls.key"),
            look_every: LOOK,
        }
    }

    async fn serve(&self) -> Scene {
        let setup = Setup {
            tls: Some(self.settings()),
            ..Setup::default()
        };
        setup.start().await
    }
}

fn connector(
    roots: RootCertStore,
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&[u8]],
) -> TlsConnector {
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|it| it.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

async fn connect(scene: &Scene, connector: TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(scene.address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    connector.connect(name, stream).await
}

/// The certificate that a new client is shown; none when the pair is not the one it trusts.
async fn shows(scene: &Scene, pair: &Pair) -> bool {
    let connector = connector(pair.roots(), &[&TLS13], &[b"http/1.1"]);
    let Ok(stream) = connect(scene, connector).await else {
        return false;
    };
    let shown = stream.get_ref().1.peer_certificates().unwrap();
    shown[0] == pair.der()
}

/// Waits until new clients are shown this one.
async fn until_shown(scene: &Scene, pair: &Pair) {
    let deadline = Instant::now() + DEADLINE;
    while !shows(scene, pair).await {
        assert!(Instant::now() < deadline, "it is never shown");
        sleep(LOOK).await;
    }
}

async fn until_counted(page: &MetricsPage, line: &str) {
    let deadline = Instant::now() + DEADLINE;
    while !page.render().contains(line) {
        assert!(Instant::now() < deadline, "no {line} in\n{}", page.render());
        sleep(LOOK).await;
    }
}

#[tokio::test]
async fn our_own_client_gets_tokens_over_tls() {
    let pair = Pair::new();
    let files = Files::with(&pair);
    let scene = files.serve().await;
    let ca = files.path("tls.crt");
    let url = format!("https://{}/token", scene.address).parse().unwrap();
    let ask = async |roots| {
        let client = http_client_to(&url, &Resolver::system(), roots, exchange::TIMEOUT).unwrap();
        let bearer = PublicKey::from_pem(scene.keys.public_pem()).unwrap();
        let bearer = bearer.encrypt(&id(ACTIVE)).unwrap();
        let key = scene.keys.session_key(&id(ACTIVE));
        let clock = scene.clock.clone();
        Exchange::new(client, url.clone(), bearer, Some(key), clock)
            .fetch()
            .await
    };
    assert!(ask(trust_roots(Some(&ca)).unwrap()).await.is_ok());
    // Whom nobody vouched for gets no bearer.
    assert!(ask(trust_roots(None).unwrap()).await.is_err());
}

#[tokio::test]
async fn both_versions_are_spoken_and_no_protocol_but_ours() {
    let pair = Pair::new();
    let files = Files::with(&pair);
    let scene = files.serve().await;
    let ours: &[&[u8]] = &[b"http/1.1"];
    let both: &[&[u8]] = &[b"h2", b"http/1.1"];
    for (version, number) in [
        (&TLS12, ProtocolVersion::TLSv1_2),
        (&TLS13, ProtocolVersion::TLSv1_3),
    ] {
        for (protocols, agreed) in [(both, Some(ours[0])), (ours, Some(ours[0])), (&[], None)] {
            let connector = connector(pair.roots(), &[version], protocols);
            let mut stream = connect(&scene, connector).await.unwrap();
            let state = stream.get_ref().1;
            assert_eq!(state.protocol_version(), Some(number));
            assert_eq!(state.alpn_protocol(), agreed);
            let request = b"GET /healthz HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        let other = connector(pair.roots(), &[version], &[b"h2"]);
        assert!(connect(&scene, other).await.is_err());
    }
}

#[tokio::test]
async fn a_handshake_that_does_not_come_is_limited_like_a_head() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let pair = Pair::new();
    let files = Files::with(&pair);
    let setup = Setup {
        tls: Some(files.settings()),
        connections: ConnectionLimits {
            places: 4,
            head: Duration::from_millis(500),
            ..ConnectionLimits::default()
        },
        ..Setup::default()
    };
    let scene = setup.start().await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(Client::connect(scene.address).await);
    }
    // All places are taken, and yet there is one.
    assert!(shows(&scene, &pair).await);
    for mut client in silent {
        client.closed().await;
    }
    until_counted(
        &page,
        &format!("{CONNECTIONS_CLOSED}{{cause=\"made_room\"}} 1"),
    )
    .await;
    until_counted(
        &page,
        &format!("{CONNECTIONS_CLOSED}{{cause=\"head_late\"}} 3"),
    )
    .await;

    // A handshake is not a head yet.
    let handshake = connector(pair.roots(), &[&TLS13], &[]);
    let mut shaken = connect(&scene, handshake).await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(DEADLINE, shaken.read_to_end(&mut rest)).await;
    let _ = read.expect("the server closes it");
    until_counted(
        &page,
        &format!("{CONNECTIONS_CLOSED}{{cause=\"head_late\"}} 4"),
    )
    .await;
}

#[tokio::test]
async fn who_speaks_no_tls_learns_nothing_and_is_counted() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let pair = Pair::new();
    let scene = Files::with(&pair).serve().await;
    let answer = raw(scene.address, b"GET /healthz HTTP/1.1\r\nHost: cp\r\n\r\n").await;
    assert!(answer.is_none(), "{answer:?}");
    until_counted(
        &page,
        &format!("{CONNECTIONS_CLOSED}{{cause=\"handshake\"}} 1"),
    )
    .await;
    assert!(shows(&scene, &pair).await);
}

#[tokio::test]
async fn files_that_are_renamed_over_the_old_ones_are_used_without_a_break() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let (old, new) = (Pair::new(), Pair::new());
    let files = Files::with(&old);
    let scene = files.serve().await;
    let connector = connector(old.roots(), &[&TLS13], &[]);
    let mut before = connect(&scene, connector).await.unwrap();

    // One after the other: between them they are not a pair.
    files.rename("tls.crt", &new.certificate());
    files.rename("tls.key", &new.key());
    until_shown(&scene, &new).await;
    assert!(!shows(&scene, &old).await);

    // A connection from before goes on.
    let request = b"GET /healthz HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\r\n";
    before.write_all(request).await.unwrap();
    let mut answer = String::new();
    before.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    let page = page.render();
    assert!(page.contains(&format!("{CERTIFICATE_RELOADS}{{result=\"ok\"}} 1")));
    // rcgen's default, until the year 4096; and the scene's clock.
    assert!(
        page.contains(&format!("{CERTIFICATE_EXPIRY} 67090118400")),
        "{page}"
    );
    assert!(
        page.contains(&format!("{CERTIFICATE_LOADED} 2000000")),
        "{page}"
    );
}

#[tokio::test]
async fn a_secret_volume_that_is_swapped_is_followed() {
    let (old, new) = (Pair::new(), Pair::new());
    let folder = tempfile::tempdir().unwrap();
    let put = |pair: &Pair| {
        let (certificate, key) = (pair.certificate(), pair.key());
        let files = [
            ("tls.crt", certificate.as_bytes()),
            ("tls.key", key.as_bytes()),
        ];
        SecretVolume::new(folder.path()).write(&files).unwrap();
    };
    put(&old);
    let setup = Setup {
        tls: Some(TlsSettings {
            certificate: folder.path().join("tls.crt"),
            key: folder.path().join("tls.key"),
            look_every: LOOK,
        }),
        ..Setup::default()
    };
    let scene = setup.start().await;
    assert!(shows(&scene, &old).await);
    put(&new);
    until_shown(&scene, &new).await;
}

/// Spoils files of a pair.
type Break<'a> = Box<dyn Fn(&Files) + 'a>;

#[tokio::test]
async fn a_pair_that_cannot_be_used_keeps_the_last_good_one() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let (good, other) = (Pair::new(), Pair::new());
    let files = Files::with(&good);
    let scene = files.serve().await;
    let breaks: [(&str, Break<'_>); 4] = [
        (
            "of another",
            Box::new(|files| files.rename("tls.key", &other.key())),
        ),
        (
            "no PEM",
            Box::new(|files| files.rename("tls.crt", "certificate")),
        ),
        ("empty", Box::new(|files| files.rename("tls.key", ""))),
        (
            "gone",
            Box::new(|files| fs::remove_file(files.path("tls.key")).unwrap()),
        ),
    ];
    for (count, (name, breaks)) in breaks.iter().enumerate() {
        breaks(&files);
        let line = format!("{CERTIFICATE_RELOADS}{{result=\"failed\"}} {}", count + 1);
        until_counted(&page, &line).await;
        assert!(shows(&scene, &good).await, "{name}");
        files.rename("tls.crt", &good.certificate());
        files.rename("tls.key", &good.key());
        // Until the good pair was seen again, the next fault may count as the same one.
        sleep(LOOK * 4).await;
    }
    files.rename("tls.key", &other.key());
    files.rename("tls.crt", &other.certificate());
    until_shown(&scene, &other).await;
    let page = page.render();
    // Each was told once, however often it was seen.
    assert!(page.contains(&format!("{CERTIFICATE_RELOADS}{{result=\"failed\"}} 4")));
}

#[tokio::test]
async fn what_cannot_be_used_at_the_start_is_said_in_one_line() {
    let (one, other) = (Pair::new(), Pair::new());
    let files = Files::with(&one);
    let fault = |settings: TlsSettings| {
        let error = settings.check().unwrap_err();
        let of_key = error.is_of_key(&settings);
        (ambient_shared::exit::report(&error), of_key)
    };
    assert!(files.settings().check().is_ok());
    let path = |name: &str| files.path(name).display().to_string();

    files.rename("tls.key", &other.key());
    let not_a_pair = format!(
        "the key in {} is not that of the certificate in {}",
        path("tls.key"),
        path("tls.crt")
    );
    assert_eq!(fault(files.settings()), (not_a_pair, false));

    files.rename("tls.key", &one.certificate());
    let no_key = format!("there is no PEM private key in {}", path("tls.key"));
    assert_eq!(fault(files.settings()), (no_key, true));

    fs::remove_file(files.path("tls.key")).unwrap();
    let (gone, of_key) = fault(files.settings());
    assert!(
        gone.starts_with(&format!("cannot read {}: ", path("tls.key"))),
        "{gone}"
    );
    assert!(of_key);

    files.rename("tls.key", &one.key());
    files.rename("tls.crt", &one.key());
    let none = format!("there is no PEM certificate in {}", path("tls.crt"));
    assert_eq!(fault(files.settings()), (none, false));

    files.rename("tls.crt", &"x".repeat(1024 * 1024 + 1));
    let large = format!("cannot read {}: it is larger than 1 MiB", path("tls.crt"));
    assert_eq!(fault(files.settings()), (large, false));
    // Never a word of what is in them.
    assert!(!gone.contains("BEGIN"));
}

#[tokio::test]
async fn a_runner_that_was_passed_the_authority_gets_its_token() {
    let pair = Pair::new();
    let scene = Files::with(&pair).serve().await;
    scene
        .clock
        .set(ambient_shared::clock::Clock::system().now());
    let url = format!("https://localhost:{}/token", scene.address.port());
    let run = |folder: &Path| clocks::runner(&scene, folder).env("AMBIENT_CP_TOKEN_URL", &url);

    let folder = tempfile::tempdir().unwrap();
    let mut trusting = run(folder.path())
        .env("AMBIENT_CP_TOKEN_CA", pair.certificate())
        .start();
    trusting.output_line("has a token").await;
    assert!(trusting.wait().await.success());

    let folder = tempfile::tempdir().unwrap();
    let mut others = run(folder.path())
        .env("AMBIENT_CP_TOKEN_CA", Pair::new().certificate())
        .env("AMBIENT_TOKEN_TIMEOUT", "1s")
        .start();
    assert_eq!(others.wait().await.code(), Some(69));

    let folder = tempfile::tempdir().unwrap();
    let mut malformed = run(folder.path())
        .env("AMBIENT_CP_TOKEN_CA", "a certificate")
        .start();
    assert_eq!(malformed.wait().await.code(), Some(78));
    let log = malformed.log().join("\n");
    assert!(
        log.contains("AMBIENT_CP_TOKEN_CA: there is no PEM certificate in it"),
        "{log}"
    );
}
