//! The token endpoint: `GET /token`, `/healthz` and `/.well-known/jwks.json` (contract section 1).
//!
//! In: a ciphertext of a session id and a proof that the caller holds the session's key. Out: an
//! API token. Cheap checks come first (header, length, base64), then the cache of known
//! ciphertexts, then RSA on a bounded pool, then the proof, and only for who holds the key whether
//! the session may have a token: a caller without proof learns nothing about which ids exist.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use ambient_shared::{clock::Clock, session::SessionId};
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::{
    routes::Routes,
    server::Server,
    tls::{Reloader, TlsError, TlsSettings},
};
use crate::{issuer::Issuer, keypair::Keyring};

mod answer;
mod decrypt;
mod exchange;
mod limits;
pub mod lookup;
mod routes;
mod server;
pub mod tls;

pub use server::ConnectionLimits;

/// How the endpoint is to be served.
#[derive(Debug, Clone)]
pub struct EndpointSettings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// `CP_ALLOW_UNPROVEN`: tokens for runners that send no proof.
    pub allow_unproven: bool,
    /// `CP_RATE_LIMITS`.
    pub rate_limits: bool,
    /// How many connections there may be, and for how long.
    pub connections: ConnectionLimits,
    /// `CP_TOKEN_TLS_CERT_FILE` and `CP_TOKEN_TLS_KEY_FILE`; none: plain HTTP.
    pub tls: Option<TlsSettings>,
}

/// What the endpoint works with.
pub struct Parts {
    /// The keys that are accepted.
    pub keys: Keyring,
    /// Where tokens come from.
    pub issuer: Arc<dyn Issuer>,
    /// Whether a session may have a token; see [`lookup::Lookup`].
    pub standing: StandingOf,
    /// Wall time, for proofs.
    pub clock: Clock,
}

/// Tells where a session stands.
pub type StandingOf = Arc<dyn Fn(SessionId) -> BoxFuture<'static, Standing> + Send + Sync>;

/// Whether a session may have a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It may.
    Active {
        /// How often it was started before.
        generation: u32,
    },
    /// It has ended or was deleted.
    Inactive,
    /// The API server has no such session.
    Unknown,
    /// Cannot be told yet: the first list after a start is not complete, or the API server does
    /// not answer.
    NotSynced,
}

/// Answers [`Standing::NotSynced`] until the real answer is there: the endpoint is bound before
/// there is a controller to ask.
pub(crate) fn late(standing: Arc<OnceLock<StandingOf>>) -> StandingOf {
    Arc::new(move |id| match standing.get() {
        Some(standing) => standing(id),
        None => Box::pin(std::future::ready(Standing::NotSynced)),
    })
}

/// Why the endpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken, or not ours.
    #[error(
        "cannot serve tokens on {address}; is the port taken? choose another with --token-listen"
    )]
    Listen {
        /// As asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its certificate cannot be used.
    #[error("cannot serve tokens over TLS")]
    Tls(#[from] TlsError),
}

/// The token endpoint, bound to its address.
pub struct Endpoint {
    address: SocketAddr,
    server: Server,
    certificate: Option<Reloader>,
}

impl Endpoint {
    /// Binds the address, and logs `listening` with `port_of` = `endpoint`.
    ///
    /// # Errors
    /// When the address cannot be bound, or the certificate cannot be used.
    pub async fn bind(settings: EndpointSettings, parts: Parts) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Listen {
            address: settings.listen,
            source,
        };
        let certificate = match settings.tls.clone() {
            Some(files) => Some(Reloader::new(files, parts.clock.clone()).await?),
            None => None,
        };
        let listener = server::listen(settings.listen).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (limits, tls) = (settings.connections, certificate.is_some());
        info!(%address, port_of = "endpoint", tls, places = limits.places, "listening");
        let config = certificate.as_ref().map(Reloader::config);
        let routes = Routes::new(&settings, parts);
        Ok(Self {
            address,
            server: Server::new(listener, config, routes, limits),
            certificate,
        })
    }

    /// The address that it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then lets requests that have begun end.
    ///
    /// # Errors
    /// None at present: what fails at a listener later, such as too many open files, passes.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), EndpointError> {
        let certificate = async {
            if let Some(certificate) = self.certificate {
                certificate.run(shutdown.clone()).await;
            }
        };
        tokio::join!(self.server.run(shutdown.clone()), certificate);
        Ok(())
    }
}
