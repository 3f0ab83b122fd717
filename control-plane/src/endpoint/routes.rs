//! Which path is answered by what.

use std::net::IpAddr;

use bytes::Bytes;
use http::{Method, Request};

use super::{EndpointSettings, Parts, answer, answer::Response, exchange::Exchange};

/// All that the endpoint answers.
pub(super) struct Routes {
    exchange: Exchange,
    jwks: Option<Bytes>,
}

impl Routes {
    pub(super) fn new(settings: &EndpointSettings, parts: Parts) -> Self {
        let jwks = parts.issuer.jwks();
        Self {
            exchange: Exchange::new(settings, parts),
            jwks: jwks.map(|jwks| Bytes::from(jwks.to_string())),
        }
    }

    /// Answers one request; its body is never read.
    pub(super) async fn answer<B>(&self, source: IpAddr, request: &Request<B>) -> Response {
        let is_get = request.method() == Method::GET;
        match (request.uri().path(), &self.jwks) {
            ("/token", _) if is_get => self.exchange.answer(source, request.headers()).await,
            ("/healthz", _) if is_get => answer::healthy(),
            ("/.well-known/jwks.json", Some(jwks)) if is_get => answer::jwks(jwks.clone()),
            ("/token" | "/healthz", _) | ("/.well-known/jwks.json", Some(_)) => {
                answer::method_not_allowed()
            }
            _ => answer::not_found(),
        }
    }
}
