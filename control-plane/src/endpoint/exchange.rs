//! One exchange: headers in, a token or the reason why not out.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ambient_shared::{
    clock::Clock,
    exit,
    proof::{self, ProofError, SessionKey},
    session::{SessionHash, SessionId},
    token::Token,
};
use http::{HeaderMap, HeaderValue, header};
use metrics::{Counter, Histogram, counter, histogram};
use tracing::{
    Instrument as _, debug, debug_span,
    field::{Empty, display},
    info, warn,
};

use super::{
    EndpointSettings, Parts, Standing, StandingOf,
    answer::{self, Refusal, Response},
    decrypt::{Answered, Ciphertext, Decryptor, Known, OpenError, ParseError},
    limits::{Limits, Lines},
};
use crate::{
    issuer::{Issuer, Subject},
    keypair::{Keyring, Keys},
    metrics::{EXCHANGE_SECONDS, EXCHANGES},
};

/// Exchanges ciphertexts for tokens.
pub(super) struct Exchange {
    keys: Keyring,
    decryptor: Decryptor,
    limits: Option<Limits>,
    lines: Lines,
    /// For the issuer's failures: a flood of refusals must not hide them.
    issuer_lines: Lines,
    allow_unproven: bool,
    standing: StandingOf,
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    // Looked up once: this is the hottest path of all.
    granted: Counter,
    granted_seconds: Histogram,
    refused_seconds: Histogram,
}

/// What a caller gets.
struct Granted {
    answered: Answered,
    /// Whether it is another than the same ciphertext got last.
    is_news: bool,
}

/// What a request says of who sent it.
struct Asked<'a> {
    source: IpAddr,
    bearer: &'a str,
    proof: Option<&'a HeaderValue>,
}

/// Who asked, by a ciphertext that opens and a proof of its session's key.
struct Identified {
    caller: Caller,
    ciphertext: Ciphertext,
    known: Option<Arc<Known>>,
}

/// Why it is not known who asks.
enum NotIdentified {
    /// Whatever the keys.
    Refused(Refusal),
    /// It fits none of these keys; it may fit newer ones.
    Misfit(Refusal),
}

impl NotIdentified {
    /// What is answered, by a replica that may or may not have missed newer keys.
    fn into_refusal(self, is_blind: bool) -> Refusal {
        match self {
            Self::Misfit(_) if is_blind => Refusal::KeysUnread,
            Self::Refused(refusal) | Self::Misfit(refusal) => refusal,
        }
    }
}

impl From<Refusal> for NotIdentified {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Whom a token is for, as far as is known.
struct Caller {
    id: SessionId,
    proven: bool,
}

impl Exchange {
    pub(super) fn new(settings: &EndpointSettings, parts: Parts) -> Self {
        // There from the start, so that a rate has the first of them.
        for refusal in [Refusal::NoToken, Refusal::Overloaded] {
            counter!(EXCHANGES, "result" => refusal.label()).increment(0);
        }
        Self {
            decryptor: Decryptor::new(),
            keys: parts.keys,
            limits: settings.rate_limits.then(Limits::default),
            lines: Lines::default(),
            issuer_lines: Lines::default(),
            allow_unproven: settings.allow_unproven,
            standing: parts.standing,
            issuer: parts.issuer,
            clock: parts.clock,
            granted: counter!(EXCHANGES, "result" => "ok"),
            granted_seconds: histogram!(EXCHANGE_SECONDS, "result" => "ok"),
            refused_seconds: histogram!(EXCHANGE_SECONDS, "result" => "refused"),
        }
    }

    /// Answers a request from this address.
    pub(super) async fn answer(&self, source: IpAddr, headers: &HeaderMap) -> Response {
        let began = Instant::now();
        let span = debug_span!(
            "token exchange",
            otel.kind = "server",
            result = Empty,
            session = Empty
        );
        let mut audit = Audit {
            source,
            session: None,
            decrypted: false,
            latency: Duration::ZERO,
        };
        let deciding = async {
            match self.decide(source, headers, &mut audit).await {
                Err(refusal)
                    if refusal.before_authentication()
                        || (audit.decrypted && refusal.of_a_session()) =>
                {
                    Err(self.charge_source(source, refusal).await)
                }
                decided => decided,
            }
        };
        let decided = deciding.instrument(span.clone()).await;
        let result = decided
            .as_ref()
            .map_or_else(|refusal| refusal.label(), |_| "ok");
        let seconds = if decided.is_ok() {
            self.granted.increment(1);
            &self.granted_seconds
        } else {
            counter!(EXCHANGES, "result" => result).increment(1);
            &self.refused_seconds
        };
        audit.latency = began.elapsed();
        seconds.record(audit.latency);
        span.record("result", result);
        if let Some(session) = audit.session {
            span.record("session", display(session));
        }
        let _entered = span.enter();
        match decided {
            Ok(granted) => {
                audit.granted(&granted);
                answer::granted(granted.answered.body, self.clock.now())
            }
            Err(refusal) => {
                audit.refused(refusal, &self.lines);
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
        let asked = Asked {
            source,
            bearer: bearer_of(headers)?,
            proof: headers.get(proof::HEADER),
        };
        let mut keys = self.keys.current();
        let mut identified = self.identify(&keys, &asked, audit).await;
        // A rotation may have come this far, but not to this replica.
        if matches!(identified, Err(NotIdentified::Misfit(_)))
            && let Some(newer) = self.keys.newer_than(&keys).await
        {
            keys = newer;
            identified = self.identify(&keys, &asked, audit).await;
        }
        let Identified {
            caller,
            ciphertext,
            known,
        } = identified.map_err(|not| not.into_refusal(self.keys.is_blind()))?;
        let generation = self.generation(&caller).await?;
        let subject = Subject {
            session: caller.id,
            generation,
        };
        let token = self.issue(&subject).await?;
        let same = known.as_ref().and_then(|known| known.answered(&token));
        let is_news = same.is_none();
        let body = match same {
            Some(body) => body,
            None => answer::body(&token).ok_or(Refusal::NoToken)?,
        };
        let answered = Answered { token, body };
        match known.filter(|known| known.session_keys(&keys).is_some()) {
            Some(known) if is_news => known.answers(answered.clone()),
            Some(_) => {}
            None => {
                let session = subject.session;
                self.decryptor
                    .remember(&ciphertext, session, answered.clone())
                    .await;
            }
        }
        Ok(Granted { answered, is_news })
    }

    /// Who asks, as these keys tell.
    async fn identify(
        &self,
        keys: &Arc<Keys>,
        asked: &Asked<'_>,
        audit: &mut Audit,
    ) -> Result<Identified, NotIdentified> {
        let ciphertext = Decryptor::parse(keys, asked.bearer).map_err(|error| match error {
            ParseError::Malformed => Refusal::NotBase64.into(),
            ParseError::OtherKey => NotIdentified::Misfit(Refusal::NotBase64),
        })?;
        let known = self.decryptor.known(&ciphertext).await;
        let id = if let Some(known) = &known {
            known.id.clone()
        } else {
            let id = self.open(asked.source, &ciphertext).await?;
            audit.decrypted = true;
            id
        };
        audit.session = Some(id.hash());
        let cached = known.as_ref().and_then(|known| known.session_keys(keys));
        let caller = match cached {
            Some(session_keys) => self.prove(session_keys, id, asked).await?,
            None => self.prove(&keys.session_keys(&id), id, asked).await?,
        };
        Ok(Identified {
            caller,
            ciphertext,
            known,
        })
    }

    /// Decrypts an unknown ciphertext, unless its source has failed too often.
    async fn open(
        &self,
        source: IpAddr,
        ciphertext: &Ciphertext,
    ) -> Result<SessionId, NotIdentified> {
        if let Some(limits) = &self.limits
            && let Err(wait) = limits.admit(source).await
        {
            return Err(Refusal::SourceLimited(wait).into());
        }
        let plaintext = self
            .decryptor
            .open(ciphertext)
            .await
            .map_err(|error| match error {
                OpenError::Overloaded => Refusal::Overloaded.into(),
                OpenError::Undecryptable => NotIdentified::Misfit(Refusal::Undecryptable),
            })?;
        std::str::from_utf8(&plaintext)
            .ok()
            .and_then(|id| SessionId::parse(id).ok())
            .ok_or_else(|| Refusal::Unproven.into())
    }

    /// Checks the proof against each of the session's keys, and charges who holds one for the
    /// request. That a proof is stale is told only to who holds one.
    async fn prove(
        &self,
        session_keys: &[SessionKey],
        id: SessionId,
        asked: &Asked<'_>,
    ) -> Result<Caller, NotIdentified> {
        let now = self.clock.now();
        let proven = match asked.proof {
            None if self.allow_unproven => Ok(false),
            None => return Err(Refusal::Unproven.into()),
            Some(proof) => {
                // What is no text is no proof either, and is refused by the same steps.
                let proof = proof.to_str().unwrap_or_default();
                match proof::verify(session_keys, proof, asked.bearer, now) {
                    Ok(()) => Ok(true),
                    Err(ProofError::Stale) => Err(Refusal::StaleProof(now)),
                    Err(ProofError::Malformed) => return Err(Refusal::Unproven.into()),
                    Err(ProofError::Wrong) => {
                        return Err(NotIdentified::Misfit(Refusal::Unproven));
                    }
                }
            }
        };
        if let Some(limits) = &self.limits
            && let Err(wait) = limits.charge_session(&id).await
        {
            return Err(Refusal::SessionLimited(wait).into());
        }
        let proven = proven?;
        Ok(Caller { id, proven })
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
            if self.issuer_lines.has_room() {
                let session = subject.session.hash();
                warn!(%session, error = %exit::report(&error), "no token for a session");
            }
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
    /// Whether it took a decryption, which is the dearest step of all.
    decrypted: bool,
    latency: Duration,
}

impl Audit {
    fn latency_ms(&self) -> u64 {
        u64::try_from(self.latency.as_millis()).unwrap_or(u64::MAX)
    }

    /// Who asks again and gets the same token again is logged for who looks for it: the line for
    /// that token is there.
    fn granted(&self, granted: &Granted) {
        let (session, source) = (self.session.map(display), self.source);
        if granted.is_news {
            let token = granted.answered.token.hash();
            let latency_ms = self.latency_ms();
            info!(result = "ok", session, %token, %source, latency_ms, "token exchange");
        } else {
            let latency_ms = self.latency_ms();
            debug!(result = "ok", session, %source, latency_ms, "token exchange");
        }
    }

    /// What a limit refuses is a flood by its nature: it is counted, and logged for who looks for
    /// it. So is what comes from too many at once.
    fn refused(&self, refusal: Refusal, lines: &Lines) {
        let (session, source) = (self.session.map(display), self.source);
        let (result, latency_ms) = (refusal.label(), self.latency_ms());
        if refusal.by_limit() || !lines.has_room() {
            debug!(result, session, %source, latency_ms, "token exchange");
        } else {
            info!(result, session, %source, latency_ms, "token exchange");
        }
    }
}
