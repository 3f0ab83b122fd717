//! One exchange: headers in, a token or the reason why not out.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ambient_shared::{
    clock::Clock,
    exit,
    proof::{self, ProofError},
    session::{SessionHash, SessionId},
    token::Token,
};
use http::{HeaderMap, header};
use metrics::counter;
use tracing::{debug, field::display, info, warn};

use super::{
    EndpointSettings, Parts, Standing, StandingOf,
    answer::{self, Refusal, Response},
    decrypt::{Ciphertext, Decryptor, OpenError},
    limits::Limits,
};
use crate::{
    issuer::{Issuer, Subject},
    keypair::Keyring,
    metrics::EXCHANGES,
};

/// Exchanges ciphertexts for tokens.
pub(super) struct Exchange {
    keys: Keyring,
    decryptor: Decryptor,
    limits: Option<Limits>,
    allow_unproven: bool,
    standing: StandingOf,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
}

/// What a caller gets.
struct Granted {
    token: Token,
    /// Whether it is another than the same ciphertext got last.
    is_news: bool,
}

/// Who asked, as far as is known.
struct Caller {
    id: SessionId,
    proven: bool,
}

impl Exchange {
    pub(super) fn new(settings: &EndpointSettings, parts: Parts) -> Self {
        Self {
            decryptor: Decryptor::new(parts.keys.clone()),
            keys: parts.keys,
            limits: settings.rate_limits.then(Limits::default),
            allow_unproven: settings.allow_unproven,
            standing: parts.standing,
            issuer: parts.issuer,
            clock: parts.clock,
        }
    }

    /// Answers a request from this address.
    pub(super) async fn answer(&self, source: IpAddr, headers: &HeaderMap) -> Response {
        let mut audit = Audit {
            source,
            session: None,
        };
        let decided = match self.decide(source, headers, &mut audit).await {
            Err(refusal) if refusal.before_authentication() => {
                Err(self.charge_source(source, refusal).await)
            }
            decided => decided,
        };
        let result = decided
            .as_ref()
            .map_or_else(|refusal| refusal.label(), |_| "ok");
        counter!(EXCHANGES, "result" => result).increment(1);
        match decided {
            Ok(granted) => {
                audit.granted(&granted);
                answer::granted(&granted.token)
            }
            Err(refusal) => {
                audit.refused(refusal);
                refusal.into_response()
            }
        }
    }

    async fn decide(
        &self,
        source: IpAddr,
        headers: &HeaderMap,
        audit: &mut Audit,
    ) -> Result<Granted, Refusal> {
        let bearer = bearer_of(headers)?;
        let ciphertext = self.decryptor.parse(bearer).ok_or(Refusal::NotBase64)?;
        let known = self.decryptor.known(&ciphertext).await;
        let id = match &known {
            Some(known) => known.id.clone(),
            None => self.open(source, &ciphertext).await?,
        };
        audit.session = Some(id.hash());

        let caller = self.prove(id, bearer, headers).await?;
        let generation = self.generation(&caller).await?;
        let subject = Subject {
            session: caller.id,
            generation,
        };
        let token = self.issue(&subject).await?;
        let is_news = known.as_ref().is_none_or(|known| known.is_news(&token));
        if known.is_none() {
            let got = token.clone();
            self.decryptor
                .remember(&ciphertext, subject.session, got)
                .await;
        }
        Ok(Granted { token, is_news })
    }

    /// Decrypts an unknown ciphertext, unless its source has failed too often.
    async fn open(&self, source: IpAddr, ciphertext: &Ciphertext) -> Result<SessionId, Refusal> {
        if let Some(limits) = &self.limits
            && let Err(wait) = limits.admit(source).await
        {
            return Err(Refusal::SourceLimited(wait));
        }
        let plaintext = self
            .decryptor
            .open(ciphertext)
            .await
            .map_err(|error| match error {
                OpenError::Overloaded => Refusal::Overloaded,
                OpenError::Undecryptable => Refusal::Undecryptable,
            })?;
        std::str::from_utf8(&plaintext)
            .ok()
            .and_then(|id| SessionId::parse(id).ok())
            .ok_or(Refusal::Unproven)
    }

    /// Checks the proof, and charges who holds the session's key for the request.
    async fn prove(
        &self,
        id: SessionId,
        bearer: &str,
        headers: &HeaderMap,
    ) -> Result<Caller, Refusal> {
        let now = self.clock.now();
        let proven = match headers.get(proof::HEADER) {
            None if self.allow_unproven => Ok(false),
            None => return Err(Refusal::Unproven),
            Some(proof) => {
                // What is no text is no proof either, and is refused by the same steps.
                let proof = proof.to_str().unwrap_or_default();
                match self.keys.current().verify(&id, proof, bearer, now) {
                    Ok(()) => Ok(true),
                    Err(ProofError::Stale) => Err(Refusal::StaleProof(now)),
                    Err(ProofError::Malformed | ProofError::Wrong) => {
                        return Err(Refusal::Unproven);
                    }
                }
            }
        };
        if let Some(limits) = &self.limits
            && let Err(wait) = limits.charge_session(&id).await
        {
            return Err(Refusal::SessionLimited(wait));
        }
        proven.map(|proven| Caller { id, proven })
    }

    async fn generation(&self, caller: &Caller) -> Result<u32, Refusal> {
        match (self.standing)(caller.id.clone()).await {
            Standing::Active { generation } => Ok(generation),
            Standing::Inactive | Standing::Unknown if caller.proven => Err(Refusal::Inactive),
            Standing::Inactive | Standing::Unknown => Err(Refusal::Unproven),
            Standing::NotSynced => Err(Refusal::NotSynced),
        }
    }

    async fn issue(&self, subject: &Subject) -> Result<Token, Refusal> {
        // Half of a life: runners come back at four fifths of what they get.
        let min_life = self.issuer.life().unwrap_or(Duration::ZERO) / 2;
        self.issuer.issue(subject, min_life).await.map_err(|error| {
            let session = subject.session.hash();
            warn!(%session, error = %exit::report(&error), "no token for a session");
            Refusal::NoToken
        })
    }

    /// The refusal, or that the source has used up its share of them.
    async fn charge_source(&self, source: IpAddr, refusal: Refusal) -> Refusal {
        let Some(limits) = &self.limits else {
            return refusal;
        };
        match limits.charge_source(source).await {
            Ok(()) => refusal,
            Err(wait) => Refusal::SourceLimited(wait),
        }
    }
}

/// What follows `Bearer ` in the `Authorization` header; the scheme in any case.
fn bearer_of(headers: &HeaderMap) -> Result<&str, Refusal> {
    let value = headers
        .get(header::AUTHORIZATION)
        .ok_or(Refusal::NoHeader)?;
    let value = value.as_bytes();
    match value.split_at_checked("Bearer ".len()) {
        Some((scheme, bearer)) if scheme.eq_ignore_ascii_case(b"Bearer ") => {
            std::str::from_utf8(bearer).map_err(|_| Refusal::NotBase64)
        }
        _ => Err(Refusal::NotBearer),
    }
}

/// What the one log line of an exchange says beside its result.
struct Audit {
    source: IpAddr,
    session: Option<SessionHash>,
}

impl Audit {
    /// Who asks again and gets the same token again is logged for who looks for it: the line for
    /// that token is there.
    fn granted(&self, granted: &Granted) {
        let (session, source) = (self.session.map(display), self.source);
        if granted.is_news {
            let token = granted.token.hash();
            info!(result = "ok", session, %token, %source, "token exchange");
        } else {
            debug!(result = "ok", session, %source, "token exchange");
        }
    }

    /// What a limit refuses is a flood by its nature: it is counted, and logged for who looks for
    /// it.
    fn refused(&self, refusal: Refusal) {
        let (session, source) = (self.session.map(display), self.source);
        let result = refusal.label();
        if refusal.by_limit() {
            debug!(result, session, %source, "token exchange");
        } else {
            info!(result, session, %source, "token exchange");
        }
    }
}
