//! HTTP clients and gRPC channels with our name resolution, TLS roots and limits.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper_util::client::legacy::connect::HttpConnector;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use url::{Host, Url};

use crate::resolve::{self, Resolver};

/// Longest wait for a connection, TLS included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often an open but silent gRPC connection is pinged. Go's servers end connections that ping
/// more often than every 5 minutes (gRPC proposal A8).
const PING_INTERVAL: Duration = Duration::from_mins(6);

/// How long a ping may stay unanswered before the connection counts as dead.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be silent before the kernel asks whether the other side is there,
/// and how long data may stay unacknowledged: no server minds these, and a peer that vanished is
/// noticed within [`TCP_IDLE`] and three probes.
const TCP_IDLE: Duration = Duration::from_secs(10);
const TCP_PROBE_INTERVAL: Duration = Duration::from_secs(3);
const TCP_PROBES: u32 = 3;
const TCP_UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// Why a client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A CA file is there, but cannot be used.
    #[error("cannot read CA certificates from {}", path.display())]
    Certificates {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::pki_types::pem::Error,
    },
    /// A CA file or folder is there, but has no certificate in it.
    #[error("there is no CA certificate in {}", path.display())]
    NoCertificate {
        /// The file or folder.
        path: PathBuf,
    },
    /// The address is not `host:port`.
    #[error("{address:?} is not a gRPC address such as api.example:8001")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// The TLS or HTTP library refused its configuration.
    #[error("cannot set up the HTTP client")]
    Http(#[from] reqwest::Error),
    /// The TLS library refused its configuration.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
}

/// A text has no certificates in it that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no PEM certificate in it")]
pub struct NoCertificates;

/// Makes aws-lc-rs the process's TLS provider, and draws the first random number, which costs
/// 20 ms once. First thing in every `main`.
pub fn install_crypto_provider() {
    // An error means that one is installed already, which is what we want.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let _ = aws_lc_rs::rand::fill(&mut [0; 8]);
}

/// The CA certificates to trust: those of the system (`SSL_CERT_FILE` and `SSL_CERT_DIR`
/// included), Mozilla's when there are none, and `extra`: a PEM file or a folder of PEM files. An
/// `extra` that does not exist adds nothing (contract section 3: it may be missing).
///
/// # Errors
/// When `extra` exists but holds no certificates.
pub fn trust_roots(extra: Option<&Path>) -> Result<RootCertStore, ClientError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    if let Some(path) = extra.filter(|path| path.exists()) {
        let (added, _) = roots.add_parsable_certificates(read_certificates(path)?);
        if added == 0 {
            let path = path.to_owned();
            return Err(ClientError::NoCertificate { path });
        }
    }
    Ok(roots)
}

/// The certificates in a PEM text.
///
/// # Errors
/// When there is none in it, or one is malformed.
pub fn parse_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, NoCertificates> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let parsed = parsed.map_err(|_| NoCertificates)?;
    let (usable, _) = RootCertStore::empty().add_parsable_certificates(parsed.iter().cloned());
    if usable == 0 {
        return Err(NoCertificates);
    }
    Ok(parsed)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let broken = |source| ClientError::Certificates {
        path: path.to_owned(),
        source,
    };
    if !path.is_dir() {
        return CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(broken);
    }
    let files = std::fs::read_dir(path)
        .map_err(|error| broken(rustls::pki_types::pem::Error::Io(error)))?;
    let mut found = Vec::new();
    for file in files
        .flatten()
        .map(|entry| entry.path())
        .filter(|file| file.is_file())
    {
        // A folder of a Secret or ConfigMap may hold other files too.
        found.extend(
            CertificateDer::pem_file_iter(file)
                .into_iter()
                .flatten()
                .flatten(),
        );
    }
    Ok(found)
}

/// A TLS client configuration with the given roots, offering HTTP/2 and HTTP/1.1.
///
/// # Errors
/// When the TLS library refuses it.
pub fn tls_config(roots: RootCertStore) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// An HTTP client for the server of one URL: no redirects, the given time limit for a whole
/// request. Proxies of the environment are used, but never for a server on this machine, which no
/// proxy reaches: it would only learn our credentials.
///
/// # Errors
/// When TLS cannot be set up.
pub fn http_client_to(
    server: &Url,
    resolver: &Resolver,
    roots: RootCertStore,
    timeout: Duration,
) -> Result<reqwest::Client, ClientError> {
    let builder = reqwest::Client::builder();
    let builder = if is_loopback(server) {
        builder.no_proxy()
    } else {
        builder
    };
    Ok(builder
        .tls_backend_preconfigured(tls_config(roots)?)
        .dns_resolver(Arc::new(resolver.clone()))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout)
        .user_agent(concat!("ambient/", env!("CARGO_PKG_VERSION")))
        .build()?)
}

/// Whether a URL's host is this machine: a loopback address, or a name that is always one.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => resolve::is_localhost(name),
        None => false,
    }
}

/// How to reach a gRPC server.
#[derive(Debug, Clone)]
pub struct GrpcAddress {
    /// `host:port`, or a URL with the scheme `http` or `https`.
    pub address: String,
    /// Whether to use TLS. A URL's own scheme wins.
    pub tls: bool,
    /// More CA certificates to trust: a PEM file or folder.
    pub ca: Option<PathBuf>,
}

/// A channel that connects when first used and again whenever it must. A peer that vanished is
/// noticed within 20 s; one that hangs, only by the deadline of a call.
///
/// # Errors
/// When the address or a CA file is malformed.
pub fn grpc_channel(resolver: &Resolver, to: &GrpcAddress) -> Result<Channel, ClientError> {
    let url = if to.address.contains("://") {
        to.address.clone()
    } else {
        format!("{}://{}", if to.tls { "https" } else { "http" }, to.address)
    };
    let broken = |source| ClientError::Address {
        address: to.address.clone(),
        source,
    };
    let mut endpoint = Endpoint::from_shared(url.clone())
        .map_err(broken)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .tcp_nodelay(true);
    if url.starts_with("https://") {
        let roots = trust_roots(to.ca.as_deref())?.roots;
        endpoint = endpoint
            .tls_config(ClientTlsConfig::new().trust_anchors(roots))
            .map_err(broken)?;
    }
    Ok(endpoint.connect_with_connector_lazy(tcp_connector(resolver)))
}

/// TCP connections with our name resolution, for any scheme: TLS goes on top. A peer that vanished is noticed
/// within 20 s.
pub fn tcp_connector(resolver: &Resolver) -> HttpConnector<Resolver> {
    let mut connector = HttpConnector::new_with_resolver(resolver.clone());
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(TCP_IDLE));
    connector.set_keepalive_interval(Some(TCP_PROBE_INTERVAL));
    connector.set_keepalive_retries(Some(TCP_PROBES));
    connector.set_tcp_user_timeout(Some(TCP_UNACKNOWLEDGED));
    connector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_this_machine_are_known_by_their_url() {
        let local = |url: &str| is_loopback(&url.parse().unwrap());
        assert!(local("http://127.0.0.1:8080/token"));
        assert!(local("http://127.8.9.1/"));
        assert!(local("https://[::1]:8443/"));
        assert!(local("http://LOCALHOST./"));
        assert!(local("http://api.localhost/"));
        assert!(!local("http://localhost.example/"));
        assert!(!local("http://10.0.0.1/"));
    }

    #[test]
    fn a_ca_file_may_be_missing_but_not_empty() {
        let folder = tempfile::tempdir().unwrap();
        assert!(trust_roots(Some(&folder.path().join("missing.pem"))).is_ok());
        let empty = folder.path().join("empty.pem");
        std::fs::write(&empty, "nothing here\n").unwrap();
        for path in [&empty, folder.path()] {
            let error = trust_roots(Some(path)).unwrap_err();
            assert!(
                matches!(error, ClientError::NoCertificate { .. }),
                "{error}"
            );
        }
    }
}
