//! Reads the key Secrets again and again, so that every replica follows a rotation.
//!
//! In: the Secrets. Out: the [`Keyring`]. They are read every 10 s, and sooner, but not within 5 s,
//! when something came that fits no key. What cannot be read, or is malformed, changes nothing: each
//! Secret's keys stay in use until others can be read.

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
    secret::{SecretKeypairStore, Version, content::Content},
};
use crate::metrics::{KEY_READS, KEYS_HELD, KEYS_READ};

/// Time between two readings.
const INTERVAL: Duration = Duration::from_secs(10);

/// Least time between two readings, whatever is wanted.
const LEAST: Duration = Duration::from_secs(5);

/// Longest wait for one Secret.
const LIMIT: Duration = Duration::from_secs(5);

/// Keeps the keys of this replica up to date.
pub struct Reload {
    store: SecretKeypairStore,
    keyring: Keyring,
    clock: Clock,
    secrets: [Secret; 3],
}

/// One of the Secrets, as last seen.
struct Secret {
    kind: KeyKind,
    /// Of what is in use.
    version: Option<Version>,
    is_failing: bool,
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
    /// Brings what is in the Secrets to the keyring.
    pub fn new(store: SecretKeypairStore, keyring: Keyring, clock: Clock) -> Self {
        Self {
            store,
            keyring,
            clock,
            secrets: KeyKind::ALL.map(|kind| Secret {
                kind,
                version: None,
                is_failing: false,
            }),
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
    }

    async fn read(&mut self) {
        for secret in &mut self.secrets {
            let read = timeout(LIMIT, secret.read(&self.store, &self.keyring)).await;
            let read = read.unwrap_or(Err(ReadError::Slow));
            let key = secret.kind.as_str();
            let result = if read.is_ok() { "ok" } else { "failed" };
            counter!(KEY_READS, "key" => key, "result" => result).increment(1);
            if read.is_ok() {
                #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
                gauge!(KEYS_READ, "key" => key).set(self.clock.unix_seconds() as f64);
            }
            secret.tell(read.err());
        }
        report(&self.keyring.current());
    }
}

impl Secret {
    /// Puts what is in the Secret to use, if it is something else than before.
    async fn read(
        &mut self,
        store: &SecretKeypairStore,
        keyring: &Keyring,
    ) -> Result<(), ReadError> {
        let (version, content) = store.content_of(self.kind.secret()).await?;
        if self.version.as_ref() == Some(&version) {
            return Ok(());
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
        Ok(())
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
