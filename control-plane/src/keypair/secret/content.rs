//! What is in the key Secrets. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use ambient_shared::{clock, proof::SessionRoot};
use k8s_openapi::ByteString;
use zeroize::Zeroizing;

use super::change::Step;
use crate::keypair::{
    Ids, KeypairError, Rotating,
    decrypting::DecryptingKey,
    id::KeyId,
    kind::KeyKind,
    pem::{self, InvalidKey},
    root,
    signing::{SigningKey, SigningKeys},
};

const PRIVATE: &str = "private.pem";
const PUBLIC: &str = "public.pem";
const PREVIOUS_PRIVATE: &str = "previous-private.pem";
const NEXT_PRIVATE: &str = "next-private.pem";
const ROOT: &str = "root";
const PREVIOUS_ROOT: &str = "previous-root";
/// The longest life of tokens that `private.pem` may have signed, in seconds: it was another before
/// a restart.
const TOKEN_LIFE: &str = "token-life";
/// Until when tokens that `previous-private.pem` has signed may be valid, in Unix seconds.
const PREVIOUS_UNTIL: &str = "previous-until";

/// Data of a new Secret.
pub(super) type Made = Vec<(&'static str, Zeroizing<Vec<u8>>)>;

/// What a change of a Secret does to its data: none takes a key out.
pub(super) type Change = Vec<(&'static str, Option<Zeroizing<Vec<u8>>>)>;

/// A keypair; takes about half a second.
pub(super) fn new_keypair() -> Result<Made, InvalidKey> {
    let private = DecryptingKey::generate()?;
    let public = DecryptingKey::from_pem(&private)?.public_pem().to_owned();
    Ok(vec![
        (PRIVATE, Zeroizing::new(private.as_bytes().to_vec())),
        (PUBLIC, Zeroizing::new(public.into_bytes())),
    ])
}

/// A root of session keys.
pub(super) fn new_root() -> Result<Made, InvalidKey> {
    Ok(vec![(ROOT, root::generate()?)])
}

/// A signing key.
pub(super) fn new_signing_key() -> Result<Made, InvalidKey> {
    let private = SigningKey::generate()?;
    Ok(vec![(PRIVATE, Zeroizing::new(private.as_bytes().to_vec()))])
}

/// The data of one Secret.
pub(in crate::keypair) struct Content {
    place: String,
    data: BTreeMap<String, Zeroizing<Vec<u8>>>,
}

impl Content {
    /// `place` names the Secret in errors.
    pub(super) fn new(place: String, data: BTreeMap<String, ByteString>) -> Self {
        let data = data.into_iter();
        Self {
            place,
            data: data
                .map(|(key, value)| (key, Zeroizing::new(value.0)))
                .collect(),
        }
    }

    /// The keypair, and the key before it.
    pub(in crate::keypair) fn keypair(&self) -> Result<Rotating<DecryptingKey>, KeypairError> {
        let current = self.required(PRIVATE, |bytes| DecryptingKey::from_pem(pem::text(bytes)?))?;
        let is_pair = self.required(PUBLIC, |bytes| current.is_pair_of(pem::text(bytes)?))?;
        if !is_pair {
            return Err(KeypairError::Mismatch {
                public: self.key(PUBLIC),
                private: self.key(PRIVATE),
            });
        }
        let previous = self.optional(PREVIOUS_PRIVATE, |bytes| {
            DecryptingKey::from_pem(pem::text(bytes)?)
        })?;
        Ok(Rotating { current, previous })
    }

    /// The root of session keys, and the one before it.
    pub(in crate::keypair) fn root(&self) -> Result<Rotating<SessionRoot>, KeypairError> {
        Ok(Rotating {
            current: self.required(ROOT, root::parse)?,
            previous: self.optional(PREVIOUS_ROOT, root::parse)?,
        })
    }

    /// The key that signs, and those that are only published.
    pub(in crate::keypair) fn signing(&self) -> Result<SigningKeys, KeypairError> {
        let parse = |bytes: &[u8]| SigningKey::from_pem(pem::text(bytes)?);
        let current = self.required(PRIVATE, parse)?;
        let next = self.optional(NEXT_PRIVATE, parse)?;
        let previous = self.optional(PREVIOUS_PRIVATE, parse)?;
        let keys = SigningKeys::new(current, next.as_ref(), previous.as_ref());
        let until = self.seconds(PREVIOUS_UNTIL)?;
        Ok(keys.needing_previous_until(until.and_then(clock::from_unix_seconds)))
    }

    /// The longest life of tokens that the current signing key may have signed, as far as noted.
    fn token_life(&self) -> Result<Duration, KeypairError> {
        let seconds = self.seconds(TOKEN_LIFE)?;
        Ok(Duration::from_secs(seconds.unwrap_or_default()))
    }

    /// What the rotation of this kind that was begun before waits for, if there was one.
    pub(super) fn unfinished(&self, kind: KeyKind) -> Result<Option<&'static str>, KeypairError> {
        let ids = self.ids(kind)?;
        Ok(match (kind, ids.previous, ids.next) {
            (_, None, None) => None,
            (KeyKind::Keypair, ..) => Some("sessions that were started with the key before run on"),
            (KeyKind::SessionRoot, ..) => {
                Some("sessions that run have a key that was made from the root before")
            }
            (KeyKind::SigningKey, _, Some(_)) => {
                Some("the next key is published, but not used yet")
            }
            (KeyKind::SigningKey, Some(_), None) => {
                Some("tokens that the key before has signed are still valid")
            }
        })
    }

    /// The public names of the keys of this kind.
    pub(in crate::keypair) fn ids(&self, kind: KeyKind) -> Result<Ids<String>, KeypairError> {
        let root_id = |root: &SessionRoot| KeyId::from_bytes(root.id()).to_string();
        Ok(match kind {
            KeyKind::Keypair => {
                let keys = self.keypair()?;
                Ids {
                    current: keys.current.id().to_string(),
                    previous: keys.previous.map(|key| key.id().to_string()),
                    next: None,
                }
            }
            KeyKind::SessionRoot => {
                let roots = self.root()?;
                Ids {
                    current: root_id(&roots.current),
                    previous: roots.previous.as_ref().map(root_id),
                    next: None,
                }
            }
            KeyKind::SigningKey => self.signing()?.ids(),
        })
    }

    /// A new keypair, and the one before beside it.
    pub(super) fn rotate_keypair(&self) -> Result<Change, InvalidKey> {
        let mut change = set(new_keypair()?);
        change.push((PREVIOUS_PRIVATE, self.data.get(PRIVATE).cloned()));
        Ok(change)
    }

    /// A new root, and the one before beside it.
    pub(super) fn rotate_root(&self) -> Result<Change, InvalidKey> {
        let mut change = set(new_root()?);
        change.push((PREVIOUS_ROOT, self.data.get(ROOT).cloned()));
        Ok(change)
    }

    /// A new signing key, beside the one that is used.
    pub(super) fn publish_signing_key() -> Result<Change, InvalidKey> {
        let new = new_signing_key()?.into_iter();
        Ok(new.map(|(_, key)| (NEXT_PRIVATE, Some(key))).collect())
    }

    /// What it takes to note a life of tokens, if it is longer than those noted before.
    pub(super) fn note_life(&self, life: Duration) -> Result<Option<Change>, KeypairError> {
        let is_longer = life > self.token_life()?;
        Ok(is_longer.then(|| vec![(TOKEN_LIFE, Some(seconds(life.as_secs())))]))
    }

    /// What a step changes at this moment, if there is (still) anything to do.
    pub(super) fn step(
        &self,
        step: &Step,
        now: SystemTime,
    ) -> Result<Option<Change>, KeypairError> {
        let ids = self.ids(step.kind())?;
        Ok(match step {
            Step::Promote { next, life } => {
                let longest = self.token_life()?.max(*life).as_secs();
                let until = clock::unix_seconds(now).saturating_add(longest);
                let is_it = ids.next.as_ref() == Some(next) && ids.previous.is_none();
                is_it.then(|| {
                    vec![
                        (PRIVATE, self.data.get(NEXT_PRIVATE).cloned()),
                        (TOKEN_LIFE, Some(seconds(life.as_secs()))),
                        (PREVIOUS_PRIVATE, self.data.get(PRIVATE).cloned()),
                        (PREVIOUS_UNTIL, Some(seconds(until))),
                        (NEXT_PRIVATE, None),
                    ]
                })
            }
            Step::Drop { kind, previous } => {
                let gone: &[_] = match kind {
                    KeyKind::Keypair => &[PREVIOUS_PRIVATE],
                    KeyKind::SigningKey => &[PREVIOUS_PRIVATE, PREVIOUS_UNTIL],
                    KeyKind::SessionRoot => &[PREVIOUS_ROOT],
                };
                let is_it = ids.previous.as_ref() == Some(previous);
                is_it.then(|| gone.iter().map(|key| (*key, None)).collect())
            }
        })
    }

    fn seconds(&self, key: &str) -> Result<Option<u64>, KeypairError> {
        self.optional(key, |bytes| {
            let number = pem::text(bytes)?.trim().parse();
            number.map_err(|_| InvalidKey::NotSeconds)
        })
    }

    fn required<T>(
        &self,
        key: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, InvalidKey>,
    ) -> Result<T, KeypairError> {
        self.optional(key, parse)?
            .ok_or_else(|| KeypairError::Absent {
                secret: self.place.clone(),
                key: key.to_owned(),
            })
    }

    fn optional<T>(
        &self,
        key: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, InvalidKey>,
    ) -> Result<Option<T>, KeypairError> {
        let Some(bytes) = self.data.get(key) else {
            return Ok(None);
        };
        parse(bytes)
            .map(Some)
            .map_err(|source| KeypairError::Malformed {
                place: self.key(key),
                source,
            })
    }

    fn key(&self, key: &str) -> String {
        format!("key {key} of {}", self.place)
    }
}

fn set(made: Made) -> Change {
    let made = made.into_iter();
    made.map(|(key, value)| (key, Some(value))).collect()
}

fn seconds(number: u64) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(number.to_string().into_bytes())
}
