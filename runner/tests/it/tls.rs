//! Token endpoint and API server behind TLS, with a certificate that only the operator's CA file
//! vouches for.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use ambient_testing::programs::Program;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

use crate::{
    messages::{ApiServer, ECHO},
    scene::{Agent as _, Answer, Endpoint, LIMITS},
};

/// What the endpoint gives: the service token of the API server in these tests.
const TOKEN: &str = r#"{"token":"service-token-of-the-tests","expires_at":"2999-01-01T00:00:00Z"}"#;

/// Both servers with TLS before them, on `localhost`.
struct Scenery {
    api: ApiServer,
    endpoint: Endpoint,
    certificate: String,
    token_url: String,
    grpc_url: String,
    _running: JoinSet<()>,
}

impl Scenery {
    async fn start() -> Self {
        let api = ApiServer::start().await;
        let endpoint = Endpoint::start([], Answer::Status(200, None, TOKEN)).await;
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let mut running = JoinSet::new();
        let plain = endpoint.url.trim_start_matches("http://");
        let plain = plain.trim_end_matches("/token").parse().unwrap();
        let token_port = front(&mut running, &made, b"http/1.1", plain).await;
        let grpc_port = front(&mut running, &made, b"h2", api.relay.address()).await;
        Self {
            api,
            endpoint,
            certificate: made.cert.pem(),
            token_url: format!("https://localhost:{token_port}/token"),
            grpc_url: format!("localhost:{grpc_port}"),
            _running: running,
        }
    }

    /// The certificate as a file, and the path of that file.
    fn ca_file(&self) -> PathBuf {
        let folder = self.api.scene.path("ca");
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("ca.pem");
        std::fs::write(&file, &self.certificate).unwrap();
        file
    }

    fn runner(&self, ca: PathBuf) -> Program {
        let runner = self.api.scene.runner_of(&self.endpoint);
        self.api
            .with_session(runner, "lines")
            .env("AMBIENT_CP_TOKEN_URL", &self.token_url)
            .env("AMBIENT_GRPC_URL", &self.grpc_url)
            .env("AMBIENT_GRPC_USE_TLS", "true")
            .env("AMBIENT_GRPC_CA_CERT_FILE", ca)
    }
}

/// Takes TLS off, and passes on what comes. Gives its port.
async fn front(
    running: &mut JoinSet<()>,
    made: &rcgen::CertifiedKey<rcgen::KeyPair>,
    protocol: &[u8],
    plain: SocketAddr,
) -> u16 {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    tls.alpn_protocols = vec![protocol.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    running.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut plain = TcpStream::connect(plain).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut plain).await;
            });
        }
    });
    port
}

#[tokio::test]
async fn token_and_messages_come_over_tls_with_a_ca_file_or_folder() {
    for as_folder in [false, true] {
        let scenery = Scenery::start().await;
        let mut ca = scenery.ca_file();
        if as_folder {
            ca.pop();
        }
        let mut runner = scenery.runner(ca).agent(ECHO).start();
        scenery.api.say("hello").await;
        let said = scenery.api.payloads("assistant", 1).await;
        assert_eq!(said, ["you said hello"], "folder: {as_folder}");
        scenery.api.close_input().await;
        assert_eq!(runner.wait().await.code(), Some(0));
        assert_eq!(scenery.endpoint.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_certificate_nobody_vouches_for_gives_no_token() {
    let scenery = Scenery::start().await;
    let mut words = String::new();
    for limit in LIMITS {
        let missing = scenery.api.scene.path("missing");
        let mut runner = scenery
            .runner(missing)
            .env("AMBIENT_TOKEN_TIMEOUT", limit)
            .agent("touch agent-started")
            .start();
        assert_eq!(runner.wait().await.code(), Some(69));
        assert!(scenery.endpoint.requests().is_empty());
        words = scenery.api.scene.last_words();
        if words.contains("certificate") {
            return;
        }
    }
    panic!("no word of the certificate: {words}");
}
