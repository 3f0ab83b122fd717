//! An API server behind TLS with a certificate that only the operator's CA file vouches for.

use std::{net::SocketAddr, sync::Arc};

use ambient_shared::proto::session_service_client::SessionServiceClient;
use ambient_testing::DEADLINE;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
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
    grpc::{self, Api},
    scene::{Scene, mount, program, read},
    upstream::{Shared, routes},
};

struct TlsUpstream {
    address: SocketAddr,
    certificate: String,
    shared: Shared,
    _running: JoinSet<()>,
}

impl TlsUpstream {
    async fn start() -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let mut tls = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let shared = Shared::default();
        let (accepted, accepts) = watch::channel("one".to_owned());
        let service = routes(shared.clone()).merge(
            Api::routes(accepts, || {})
                .prepare()
                .into_axum_router()
                .reset_fallback(),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut running = JoinSet::new();
        running.spawn(async move {
            let _accepted = accepted;
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, service) = (acceptor.clone(), service.clone());
                connections.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let service = TowerToHyperService::new(service);
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection_with_upgrades(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            certificate: made.cert.pem(),
            shared,
            _running: running,
        }
    }

    async fn scene(&self, trusted: bool) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        mount(&dir, "one");
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, &self.certificate).unwrap();
        let url = format!("https://localhost:{}", self.address.port());
        let mut program = program(&dir, &url);
        if trusted {
            program = program.arg("--ca-file").arg(ca);
        }
        let scene = Scene::start(program, dir).await;
        scene.ready().await;
        scene
    }
}

#[tokio::test]
async fn rest_and_grpc_in_the_clear_go_out_with_tls() {
    let upstream = TlsUpstream::start().await;
    let scene = upstream.scene(true).await;
    let answer = scene.post("/x").body("hello").send().await.unwrap();
    assert_eq!(read(answer).await, (200, "hello".to_owned()));
    let seen = upstream.shared.last();
    assert_eq!(seen.version, axum::http::Version::HTTP_2);
    assert_eq!(seen.header("authorization"), Some("Bearer one"));

    let mut client = SessionServiceClient::new(grpc::connect(&scene).await);
    let answer = client.push_session_message(grpc::push("hi")).await.unwrap();
    assert_eq!(answer.into_inner().payload, "hi");
}

#[tokio::test]
async fn a_websocket_goes_out_over_http1_with_tls() {
    let upstream = TlsUpstream::start().await;
    let scene = upstream.scene(true).await;
    let mut stream = TcpStream::connect(scene.proxy).await.unwrap();
    let handshake = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
                     Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(handshake.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    timeout(DEADLINE, stream.read_exact(&mut start))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&start, b"HTTP/1.1 101");
}

#[tokio::test]
async fn a_certificate_nobody_vouches_for_is_refused() {
    let upstream = TlsUpstream::start().await;
    let scene = upstream.scene(false).await;
    let (status, text) = read(scene.get("/x").send().await.unwrap()).await;
    assert_eq!(status, 502);
    assert!(text.contains("certificate"), "{text}");
    assert!(upstream.shared.seen().is_empty());
}
