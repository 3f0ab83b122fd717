//! The server behind a proxy.

use std::{net::SocketAddr, path::PathBuf};

use ambient_shared::client::install_crypto_provider;
use http::{
    Request, Response, Uri,
    header::{CONNECTION, HOST, TRANSFER_ENCODING},
    uri::{Authority, Scheme},
};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// A server, and how it is spoken to.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// HTTP/1.1.
    Http(SocketAddr),
    /// HTTP/2 without TLS, as gRPC needs.
    Grpc(SocketAddr),
    /// HTTP/1.1 with TLS.
    Tls {
        /// Where it listens; its certificate is for this address.
        address: SocketAddr,
        /// PEM of who signed its certificate.
        ca: PathBuf,
    },
}

/// Sends calls to the server.
pub(super) struct Client {
    http: legacy::Client<HttpsConnector<HttpConnector>, Incoming>,
    scheme: Scheme,
    authority: Authority,
}

impl Client {
    pub(super) fn new(upstream: &Upstream) -> Self {
        install_crypto_provider();
        let mut roots = RootCertStore::empty();
        let (address, scheme) = match upstream {
            Upstream::Http(address) | Upstream::Grpc(address) => (address, Scheme::HTTP),
            Upstream::Tls { address, ca } => {
                for certificate in CertificateDer::pem_file_iter(ca).expect("a CA file") {
                    let certificate = certificate.expect("a certificate");
                    roots.add(certificate).expect("a usable certificate");
                }
                (address, Scheme::HTTPS)
            }
        };
        let tls = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(plain);
        let http = legacy::Client::builder(TokioExecutor::new())
            .http2_only(matches!(upstream, Upstream::Grpc(_)))
            .build(connector);
        Self {
            http,
            scheme,
            authority: address.to_string().parse().expect("an authority"),
        }
    }

    pub(super) async fn send(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, legacy::Error> {
        let (mut parts, body) = request.into_parts();
        let mut uri = parts.uri.into_parts();
        uri.scheme = Some(self.scheme.clone());
        uri.authority = Some(self.authority.clone());
        parts.uri = Uri::from_parts(uri).expect("a path and an authority make a URI");
        parts.version = http::Version::default();
        for name in [HOST, CONNECTION, TRANSFER_ENCODING] {
            parts.headers.remove(name);
        }
        let mut answer = self.http.request(Request::from_parts(parts, body)).await?;
        *answer.version_mut() = http::Version::default();
        for name in [CONNECTION, TRANSFER_ENCODING] {
            answer.headers_mut().remove(name);
        }
        Ok(answer)
    }
}
