//! Reads the key Secrets again and again, so that every replica follows a rotation.
//!
//! In: the Secrets. Out: the [`Keyring`]. They are read every 10 s, and sooner, but not within 5 s,
//! when something came that fits no key. What cannot be read, or is malformed, changes nothing: each
//! Secret's keys stay in use until others can be read. A replica says, by an annotation of the
//! Secret, which signing keys it has read, so that a rotation waits for it.

use std::time::Duration;

use ambient_shared::{clock::Clock, exit};
use metrics::{counter, gauge};
use tokio::{
    select,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    KeypairError, Keyring, Keys,
    kind::KeyKind,
    readers::{Readers, annotation_of, said_of},
    secret::{SecretKeypairStore, Seen, Version, content::Content},
};
use crate::metrics::{KEY_READS, KEYS_HELD, KEYS_READ};

/// Time between two readings.
const INTERVAL: Duration = Duration::from_secs(10);

/// Least time between two readings, whatever is wanted.
const LEAST: Duration = Duration::from_secs(5);

/// Longest wait for one Secret.
const LIMIT: Duration = Duration::from_secs(5);

/// Longest wait, at the end, for the annotation to go. One that stays makes the next rotation wait
/// longer.
const PARTING: Duration = Duration::from_secs(2);

/// Keeps the keys of this replica up to date.
pub struct Reload {
    store: SecretKeypairStore,
    keyring: Keyring,
    clock: Clock,
    secrets: [Secret; 3],
    voice: Voice,
}

/// By what this replica says which signing keys it has.
struct Voice {
    annotation: String,
    /// Whether the Secret has its annotation.
    is_listed: bool,
    is_failing: bool,
}

/// One of the Secrets, as last seen.
struct Secret {
    kind: KeyKind,
    /// Of what is in use.
    version: Option<Version>,
    is_failing: bool,
}

/// What a Secret told beside its keys.
struct Told {
    readers: Readers,
    is_ours: bool,
}

/// Why a Secret brings no keys now.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Keypair(#[from] KeypairError),
    #[error("no answer within {}", humantime::format_duration(LIMIT))]
    Slow,
}

impl Reload {
    /// Brings what is in the Secrets to the keyring of the replica of this name, which no other has
    /// at the same time.
    pub fn new(store: SecretKeypairStore, keyring: Keyring, clock: Clock, replica: &str) -> Self {
        Self {
            store,
            keyring,
            clock,
            secrets: KeyKind::ALL.map(|kind| Secret {
                kind,
                version: None,
                is_failing: false,
            }),
            voice: Voice {
                annotation: annotation_of(replica),
                is_listed: false,
                is_failing: false,
            },
        }
    }

    /// Reads until `shutdown`.
    ///
    /// Cancel-safe: a reading that is cut off changes nothing.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let keyring = self.keyring.clone();
        let reading = async {
            loop {
                let began = Instant::now();
                self.read().await;
                keyring.was_read(Some(began + LEAST));
                let wanted = async {
                    keyring.wanted().await;
                    sleep_until(began + LEAST).await;
                };
                select! {
                    () = wanted => {}
                    () = sleep_until(began + INTERVAL) => {}
                }
            }
        };
        shutdown.run_until_cancelled(reading).await;
        keyring.was_read(None);
        if self.voice.is_listed {
            // No rotation waits for who is gone.
            let gone = self.store.annotate([(self.voice.annotation, None)]);
            let _ = timeout(PARTING, gone).await;
        }
    }

    async fn read(&mut self) {
        for secret in &mut self.secrets {
            let read = timeout(LIMIT, secret.read(&self.store, &self.keyring)).await;
            let read = match read {
                Ok(Ok(seen)) if secret.kind == KeyKind::SigningKey => {
                    self.voice.say(seen, &self.store, &self.keyring).await;
                    Ok(())
                }
                Ok(read) => read.map(drop),
                Err(_) => Err(ReadError::Slow),
            };
            let key = secret.kind.as_str();
            let result = if read.is_ok() { "ok" } else { "failed" };
            counter!(KEY_READS, "key" => key, "result" => result).increment(1);
            if read.is_ok() {
                #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
                gauge!(KEYS_READ, "key" => key).set(self.clock.unix_seconds() as f64);
            }
            secret.tell(read.err());
        }
        // Of those that requests are opened and proven with.
        let mut others = self.secrets.iter();
        let is_blind = others.any(|secret| secret.is_failing && secret.kind != KeyKind::SigningKey);
        self.keyring.set_blind(is_blind);
        report(&self.keyring.current());
    }
}

impl Secret {
    /// Puts what is in the Secret to use, if it is something else than before.
    async fn read(
        &mut self,
        store: &SecretKeypairStore,
        keyring: &Keyring,
    ) -> Result<Told, ReadError> {
        let Seen {
            version,
            content,
            readers,
            is_ours,
        } = store.see(self.kind.secret()).await?;
        let told = Told { readers, is_ours };
        if self.version.as_ref() == Some(&version) {
            return Ok(told);
        }
        let (kind, before) = (self.kind, keyring.current());
        let keys = Keys::clone(&before);
        // Reading a key takes some milliseconds of a core.
        let parsed = tokio::task::spawn_blocking(move || with(keys, kind, &content)).await;
        let keys = parsed.map_err(|_| KeypairError::CutOff)??;
        if keys.ids() != before.ids() {
            info!(secret = kind.secret(), keys = ?keys.ids(), "other keys from now on");
            keyring.replace(keys);
        }
        self.version = Some(version);
        Ok(told)
    }

    /// Says when a Secret begins to fail, and when that is over.
    fn tell(&mut self, error: Option<ReadError>) {
        let failed = std::mem::replace(&mut self.is_failing, error.is_some());
        match (failed, error) {
            (false, Some(error)) => {
                let reason = exit::report(&error);
                warn!(secret = self.kind.secret(), %reason, "cannot read keys again; those before stay in use");
            }
            (true, None) => info!(secret = self.kind.secret(), "keys can be read again"),
            _ => {}
        }
    }
}

impl Voice {
    /// Says what is in use now, if that is news, and passes on what all have said.
    async fn say(&mut self, told: Told, store: &SecretKeypairStore, keyring: &Keyring) {
        let Told {
            mut readers,
            is_ours,
        } = told;
        let signing = keyring.current().ids().signing;
        let says = said_of(&signing);
        // A Secret of somebody else is not written, and not rotated by us.
        if is_ours && readers.said_by(&self.annotation) != Some(says.as_str()) {
            // A rotation waits for each of them, and forgets them by itself.
            let crowd = match signing.next {
                None => readers.crowd(),
                Some(_) => Vec::new(),
            };
            let gone = crowd.iter().map(|it| (it.clone(), None));
            let ours = (self.annotation.clone(), Some(says.clone()));
            let saying = store.annotate(gone.chain([ours]));
            let said = timeout(LIMIT, saying).await;
            let error = match said {
                Ok(Ok(())) => {
                    readers.forget(&crowd);
                    readers.hear(self.annotation.clone(), says);
                    None
                }
                Ok(Err(error)) => Some(ReadError::from(error)),
                Err(_) => Some(ReadError::Slow),
            };
            let failed = std::mem::replace(&mut self.is_failing, error.is_some());
            if let Some(error) = error.filter(|_| !failed) {
                let reason = exit::report(&error);
                warn!(%reason, "cannot say which signing keys are read; rotations wait for that");
            }
        }
        self.is_listed |= is_ours && readers.said_by(&self.annotation).is_some();
        keyring.set_readers(readers);
    }
}

/// The keys, with those that are in this Secret.
fn with(keys: Keys, kind: KeyKind, content: &Content) -> Result<Keys, KeypairError> {
    Ok(match kind {
        KeyKind::Keypair => keys.with_keypair(content.keypair()?),
        KeyKind::SessionRoot => keys.with_root(content.root()?),
        KeyKind::SigningKey => keys.with_signing(content.signing()?),
    })
}

/// Shows which keys are held beside those in use: for as long as a rotation takes.
fn report(keys: &Keys) {
    let ids = keys.ids();
    let held = [
        (KeyKind::Keypair, "previous", ids.keypair.previous.is_some()),
        (
            KeyKind::SessionRoot,
            "previous",
            ids.root.previous.is_some(),
        ),
        (
            KeyKind::SigningKey,
            "previous",
            ids.signing.previous.is_some(),
        ),
        (KeyKind::SigningKey, "next", ids.signing.next.is_some()),
    ];
    for (kind, which, is_held) in held {
        gauge!(KEYS_HELD, "key" => kind.as_str(), "which" => which).set(u8::from(is_held));
    }
}
