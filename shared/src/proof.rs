//! Proof of possession: who asks for a token must hold the session's key, not only know its id.
//!
//! Header `X-Ambient-Session-Proof: v1 <unix seconds> <mac>` with mac = base64 of
//! HMAC-SHA256(session key, bearer + "." + seconds), all as text (contract section 1).

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{constant_time::verify_slices_are_equal, hkdf, hmac};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret as _, SecretBox, SecretString};
use zeroize::Zeroizing;

use crate::{clock, session::SessionId};

/// Name of the header that carries a proof.
pub const HEADER: &str = "x-ambient-session-proof";

/// How far a proof's time may be off, either way (contract section 1).
pub const WINDOW: Duration = Duration::from_secs(60);

/// Bytes of a [`SessionRoot`].
pub const ROOT_LENGTH: usize = 32;

/// The secret from which every session's key is derived.
pub struct SessionRoot(SecretBox<[u8; ROOT_LENGTH]>);

impl SessionRoot {
    /// A root from its bytes.
    pub fn new(bytes: [u8; ROOT_LENGTH]) -> Self {
        Self(SecretBox::new(Box::new(bytes)))
    }

    /// The key of one session: base64 of HKDF-SHA256(root, `ambient session-key v1:` + id).
    pub fn session_key(&self, id: &SessionId) -> SessionKey {
        let label = [b"ambient session-key v1:", id.as_str().as_bytes()];
        let mut key = Zeroizing::new([0; 32]);
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(self.0.expose_secret());
        if let Ok(okm) = prk.expand(&label, hkdf::HKDF_SHA256) {
            // 32 bytes are below the limit of 255 hash lengths (RFC 5869), so this cannot fail.
            let filled = okm.fill(&mut *key);
            debug_assert!(filled.is_ok());
        }
        SessionKey::new(STANDARD.encode(*key))
    }

    /// A public name of this root, which says nothing of it or its keys: the first bytes of
    /// HKDF-SHA256(root, `ambient session-root id v1`).
    pub fn id(&self) -> [u8; 8] {
        let mut id = [0; 32];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(self.0.expose_secret());
        if let Ok(okm) = prk.expand(&[b"ambient session-root id v1"], hkdf::HKDF_SHA256) {
            // As above, this cannot fail.
            let filled = okm.fill(&mut id);
            debug_assert!(filled.is_ok());
        }
        id.first_chunk().copied().unwrap_or_default()
    }
}

impl fmt::Debug for SessionRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionRoot(..)")
    }
}

/// One session's key: the text of the file `session-key`.
#[derive(Clone)]
pub struct SessionKey {
    text: SecretString,
    hmac: Arc<hmac::Key>,
}

impl SessionKey {
    /// A key from the text of its file, without the white space around it; none when empty.
    pub fn from_text(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self::new(text.to_owned()))
    }

    fn new(text: String) -> Self {
        Self {
            hmac: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, text.as_bytes())),
            text: SecretString::from(text),
        }
    }

    /// The text, for the file `session-key` and for masking. Never for logs.
    pub fn expose(&self) -> &str {
        self.text.expose_secret()
    }

    /// The header's value for a request with this `Authorization` text at this time.
    pub fn sign(&self, bearer: &str, now: SystemTime) -> String {
        let seconds = clock::unix_seconds(now).to_string();
        let mac = self.mac(bearer, &seconds);
        format!("v1 {seconds} {}", STANDARD.encode(mac))
    }

    /// Checks a proof for a request with this bearer. The mac is checked before the time, and in
    /// constant time: only who holds the key learns that its clock is off.
    ///
    /// # Errors
    /// [`ProofError`] says why not.
    pub fn verify(&self, proof: &str, bearer: &str, now: SystemTime) -> Result<(), ProofError> {
        let mut parts = proof.split(' ');
        let (Some("v1"), Some(seconds), Some(mac), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ProofError::Malformed);
        };
        let mac = STANDARD.decode(mac).map_err(|_| ProofError::Malformed)?;
        verify_slices_are_equal(self.mac(bearer, seconds).as_ref(), &mac)
            .map_err(|_| ProofError::Wrong)?;

        let signed_at: u64 = seconds.parse().map_err(|_| ProofError::Malformed)?;
        if signed_at.abs_diff(clock::unix_seconds(now)) > WINDOW.as_secs() {
            return Err(ProofError::Stale);
        }
        Ok(())
    }

    /// Of `<bearer>.<seconds>`.
    fn mac(&self, bearer: &str, seconds: &str) -> hmac::Tag {
        let mut mac = hmac::Context::with_key(&self.hmac);
        for part in [bearer, ".", seconds] {
            mac.update(part.as_bytes());
        }
        mac.sign()
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// Checks a proof against each of a session's keys: while roots of keys change, it has two.
///
/// # Errors
/// [`ProofError`] says why none of them made it. `Stale` only for who holds one.
pub fn verify(
    keys: &[SessionKey],
    proof: &str,
    bearer: &str,
    now: SystemTime,
) -> Result<(), ProofError> {
    keys.iter()
        .map(|key| key.verify(proof, bearer, now))
        .find(|verdict| *verdict != Err(ProofError::Wrong))
        .unwrap_or(Err(ProofError::Wrong))
}

/// Why a proof does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// Not `v1 <unix seconds> <mac>`.
    #[error("proof is not `v1 <unix seconds> <mac>`")]
    Malformed,
    /// Made with another key, or for another request.
    #[error("proof does not match the session's key")]
    Wrong,
    /// Made by the right key, but at a time over [`WINDOW`] off.
    #[error("proof stale")]
    Stale,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SessionKey {
        SessionRoot::new([7; 32]).session_key(&SessionId::parse("session-0001").unwrap())
    }

    fn at(seconds: u64) -> SystemTime {
        clock::from_unix_seconds(seconds).unwrap()
    }

    #[test]
    fn key_is_hkdf_sha256_with_the_documented_label() {
        // python3: HKDF(SHA256, salt=None, info=b"ambient session-key v1:session-0001", length=32)
        //          .derive(bytes([7]*32)), in base64
        assert_eq!(
            key().expose(),
            "MMF/ogVaHcYI1IcmcjaubiQSYzU1aRRi2HAKKRITz+k="
        );
    }

    #[test]
    fn proof_holds_for_its_request_and_minute_only() {
        let proof = key().sign("Zm9v", at(1_000_000));
        assert_eq!(key().verify(&proof, "Zm9v", at(1_000_060)), Ok(()));
        assert_eq!(key().verify(&proof, "Zm9v", at(999_940)), Ok(()));
        assert_eq!(
            key().verify(&proof, "Zm9v", at(1_000_061)),
            Err(ProofError::Stale)
        );
        assert_eq!(
            key().verify(&proof, "YmFy", at(1_000_000)),
            Err(ProofError::Wrong)
        );

        let other =
            SessionRoot::new([8; 32]).session_key(&SessionId::parse("session-0001").unwrap());
        assert_eq!(
            other.verify(&proof, "Zm9v", at(1_000_000)),
            Err(ProofError::Wrong)
        );
        // A forged time is a wrong proof, not a stale one: nothing is learnt without the key.
        let forged = proof.replace("1000000", "2000000");
        assert_eq!(
            key().verify(&forged, "Zm9v", at(1_000_000)),
            Err(ProofError::Wrong)
        );
    }

    #[test]
    fn malformed_proofs_are_refused() {
        for proof in [
            "",
            "v1",
            "v1 1",
            "v2 1 AAAA",
            "v1 1 AAAA x",
            "v1 1 !!!",
            "v1  1 AAAA",
        ] {
            assert_eq!(
                key().verify(proof, "Zm9v", at(1)),
                Err(ProofError::Malformed),
                "{proof}"
            );
        }
    }
}
