//! From ciphertext to session id: the cache of known ciphertexts, and RSA on a bounded pool.

mod pool;

use std::{
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use ambient_shared::{
    bearer::{MAX_KEY_BITS, MIN_KEY_BITS},
    proof::SessionKey,
    session::SessionId,
    token::Token,
};
use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use metrics::{Counter, counter};
use moka::future::Cache;
use zeroize::Zeroizing;

use self::pool::Pool;
use crate::{
    keypair::Keys,
    metrics::{CIPHERTEXT_CACHE, DECRYPTIONS},
};

/// Most ciphertexts that are known: a runner makes one for its whole life, and some 10,000
/// sessions run at a time. Some 30 MiB when full, as each holds the last answer it got.
const KNOWN: u64 = 20_000;

/// How long a ciphertext is known; decrypting it once an hour costs nothing.
const KNOWN_FOR: Duration = Duration::from_hours(1);

/// How many may wait for a core: at 1.3 ms each (RSA-4096) the last waits 0.17 s. Who would wait
/// longer is told so at once.
const LINE_PER_CORE: usize = 128;

/// Bytes of ciphertexts for the keys that there can be.
const LENGTHS: RangeInclusive<usize> = MIN_KEY_BITS / 8..=MAX_KEY_BITS / 8;

/// Opens ciphertexts.
pub(super) struct Decryptor {
    known: Cache<[u8; 32], Arc<Known>>,
    pool: Pool,
    hits: Counter,
    misses: Counter,
}

/// A well-formed ciphertext.
pub(super) struct Ciphertext {
    bytes: Vec<u8>,
    /// The keys that were accepted when it came.
    keys: Arc<Keys>,
    /// Of the bytes and those keys: under others it is not known any more.
    digest: [u8; 32],
}

/// A ciphertext that passed every check before.
pub(super) struct Known {
    /// Whose it is.
    pub(super) id: SessionId,
    /// The keys that were accepted then, and the session's key of each root among them.
    keys: Weak<Keys>,
    session_keys: Vec<SessionKey>,
    last: Mutex<Answered>,
}

/// A token, and the body of the answer with it.
#[derive(Clone)]
pub(super) struct Answered {
    pub(super) token: Token,
    pub(super) body: Bytes,
}

impl Known {
    /// The session's keys, if the accepted keys are still the same.
    pub(super) fn session_keys(&self, keys: &Arc<Keys>) -> Option<&[SessionKey]> {
        let are_same = std::ptr::eq(self.keys.as_ptr(), Arc::as_ptr(keys));
        are_same.then_some(self.session_keys.as_slice())
    }

    /// The last answer, if it was with this token.
    pub(super) fn answered(&self, token: &Token) -> Option<Bytes> {
        let last = self.last();
        let is_same =
            last.token.same_secret(token) && last.token.expires_at() == token.expires_at();
        is_same.then(|| last.body.clone())
    }

    /// This was the last answer.
    pub(super) fn answers(&self, answered: Answered) {
        *self.last() = answered;
    }

    fn last(&self) -> MutexGuard<'_, Answered> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a bearer holds no ciphertext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParseError {
    /// It can be none, whatever the keys.
    Malformed,
    /// By its length it is for none of these keys.
    OtherKey,
}

/// Why a ciphertext was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenError {
    /// Too many wait already.
    Overloaded,
    /// No accepted key opens it.
    Undecryptable,
}

impl Decryptor {
    pub(super) fn new() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::with_pool(cores, LINE_PER_CORE * cores)
    }

    /// `cores` decrypt at a time, and `waiting` more may wait.
    fn with_pool(cores: usize, waiting: usize) -> Self {
        Self {
            known: Cache::builder()
                .max_capacity(KNOWN)
                .time_to_live(KNOWN_FOR)
                .build(),
            pool: Pool::new(cores, waiting),
            hits: counter!(CIPHERTEXT_CACHE, "result" => "hit"),
            misses: counter!(CIPHERTEXT_CACHE, "result" => "miss"),
        }
    }

    /// The ciphertext in a bearer, if its length is that of an accepted key's and it is strict
    /// base64: padded, standard alphabet, nothing else.
    pub(super) fn parse(keys: &Arc<Keys>, bearer: &str) -> Result<Ciphertext, ParseError> {
        let padding = bearer.len() - bearer.trim_end_matches('=').len();
        let length = (bearer.len() / 4 * 3).saturating_sub(padding);
        if !LENGTHS.contains(&length) {
            return Err(ParseError::Malformed);
        }
        if !keys.fits(length) {
            return Err(ParseError::OtherKey);
        }
        let bytes = STANDARD.decode(bearer);
        let bytes = bytes.map_err(|_| ParseError::Malformed)?;
        let mut digest = digest::Context::new(&digest::SHA256);
        digest.update(keys.fingerprint());
        digest.update(&bytes);
        let digest = digest.finish().as_ref().try_into();
        Ok(Ciphertext {
            digest: digest.map_err(|_| ParseError::Malformed)?,
            bytes,
            keys: Arc::clone(keys),
        })
    }

    /// What is known of a ciphertext that passed every check before.
    pub(super) async fn known(&self, ciphertext: &Ciphertext) -> Option<Arc<Known>> {
        let known = self.known.get(&ciphertext.digest).await;
        let counted = if known.is_some() {
            &self.hits
        } else {
            &self.misses
        };
        counted.increment(1);
        known
    }

    /// To be called only once everything else about the request was right: what is known is not
    /// for callers to fill.
    pub(super) async fn remember(
        &self,
        ciphertext: &Ciphertext,
        id: SessionId,
        answered: Answered,
    ) {
        let known = Known {
            session_keys: ciphertext.keys.session_keys(&id),
            keys: Arc::downgrade(&ciphertext.keys),
            id,
            last: Mutex::new(answered),
        };
        self.known.insert(ciphertext.digest, Arc::new(known)).await;
    }

    /// Decrypts off the async threads.
    ///
    /// Cancel-safe: a request that is dropped leaves the line; a decryption that has begun is ended.
    pub(super) async fn open(
        &self,
        ciphertext: &Ciphertext,
    ) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let opened = self.open_in_line(ciphertext).await;
        let result = match &opened {
            Ok(_) => "ok",
            Err(OpenError::Overloaded) => "overloaded",
            Err(OpenError::Undecryptable) => "failed",
        };
        counter!(DECRYPTIONS, "result" => result).increment(1);
        opened
    }

    async fn open_in_line(&self, ciphertext: &Ciphertext) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let keys = Arc::clone(&ciphertext.keys);
        let opened = self.pool.open(ciphertext.bytes.clone(), keys);
        let opened = opened.ok_or(OpenError::Overloaded)?.await;
        // There is no answer only when the program ends, or has a defect.
        opened
            .map_err(|_| OpenError::Overloaded)?
            .ok_or(OpenError::Undecryptable)
    }
}

#[cfg(test)]
mod tests;
