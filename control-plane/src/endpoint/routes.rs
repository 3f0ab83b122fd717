//! Which path is answered by what.

use std::{net::IpAddr, sync::Arc};

use http::{Method, Request};
use metrics::counter;

use super::{
    EndpointSettings, Parts, answer,
    answer::{Refusal, Response},
    exchange::Exchange,
};
use crate::{issuer::Issuer, metrics::EXCHANGES};

/// All that the endpoint answers.
pub(super) struct Routes {
    exchange: Exchange,
    issuer: Arc<dyn Issuer>,
}

impl Routes {
    pub(super) fn new(settings: &EndpointSettings, parts: Parts) -> Self {
        Self {
            issuer: Arc::clone(&parts.issuer),
            exchange: Exchange::new(settings, parts),
        }
    }

    /// Answers one request; its body is never read. Where it is crowded there are no tokens.
    pub(super) async fn answer<B>(
        &self,
        source: IpAddr,
        request: &Request<B>,
        is_crowded: bool,
    ) -> Response {
        let is_get = request.method() == Method::GET;
        match request.uri().path() {
            "/token" if is_get && is_crowded => {
                let refusal = Refusal::Overloaded;
                counter!(EXCHANGES, "result" => refusal.label()).increment(1);
                refusal.into_response()
            }
            "/token" if is_get => self.exchange.answer(source, request.headers()).await,
            "/healthz" if is_get => answer::healthy(),
            "/token" | "/healthz" => answer::method_not_allowed(),
            "/.well-known/jwks.json" => match self.issuer.jwks() {
                Some(jwks) if is_get => answer::jwks(jwks),
                Some(_) => answer::method_not_allowed(),
                None => answer::not_found(),
            },
            _ => answer::not_found(),
        }
    }
}
