//! Completes rotations: the next signing key is put to use, and old keys go once nobody needs them.
//!
//! In: the keys, and which runs were started with which. Out: one change of a Secret for each step;
//! replicas follow by reading their keys again. Only the leader takes steps. It counts all waits from
//! what it has seen itself, by the monotonic clock: clocks that differ do no harm, and a change of
//! the leader only makes a rotation longer. What it cannot have seen is in the Secret: how long
//! tokens lived before a restart, so until when some of the old signing key may be valid. A replica
//! that cannot read its keys signs with the old one: the waits for a signing key begin once all
//! replicas have read it ([`super::readers`]).
//!
//! ```text
//! keypair, root   rotate → [new, old] ── nobody uses the old one for a while → [new]
//! signing key     rotate → [old, next] ── all know it, published for a while → [next, old]
//!                        ── all sign with it, the last token of the old one has expired → [next]
//! ```

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use ambient_shared::{clock::Clock, exit};
use metrics::counter;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::progress::{Progress, Runs, Sight};
use super::{
    KeyIds, Keyring,
    kind::KeyKind,
    secret::{
        SecretKeypairStore,
        change::{ChangeError, Step},
    },
};
use crate::{
    backend::{Backend, RunStatus},
    metrics::ROTATION_STEPS,
    settings::DEFAULT_TOKEN_TTL,
};

mod progress;

pub use progress::Waits;

/// Time between two looks.
const TICK: Duration = Duration::from_secs(3);

/// Longest time for one step.
const LIMIT: Duration = Duration::from_secs(10);

/// Completes rotations while this replica leads.
pub struct Rotation {
    /// Where the keys are.
    pub store: SecretKeypairStore,
    /// The keys as this replica has them.
    pub keyring: Keyring,
    /// Who uses which.
    pub backend: Arc<dyn Backend>,
    /// The life of the tokens that this replica mints; none when it mints none.
    pub token_life: Option<Duration>,
    /// Tells when tokens of before have expired.
    pub clock: Clock,
    /// How long it waits for what.
    pub waits: Waits,
}

impl Rotation {
    /// Takes steps until `shutdown`.
    ///
    /// Cancel-safe: a step is one write.
    pub async fn run(&self, shutdown: CancellationToken) {
        let life = self.token_life.unwrap_or(DEFAULT_TOKEN_TTL);
        let mut progress = Progress::new(self.waits, life, self.backend.lag());
        let mut told = Told::default();
        let mut is_noted = self.token_life.is_none();
        let turning = async {
            loop {
                if !is_noted {
                    // Since we started, who led before may have put a new key to use, and have
                    // noted with it only for how long its own tokens live.
                    is_noted = self.note(life, &mut told).await;
                }
                let sight = self.look();
                told.tell(&sight.keys, sight.runs);
                self.wait_for_readers(&sight, &mut told);
                for step in progress.decide(&sight, Instant::now()) {
                    self.take(&step, &mut told).await;
                }
                sleep(TICK.min(self.waits.tick())).await;
            }
        };
        shutdown.run_until_cancelled(turning).await;
    }

    fn look(&self) -> Sight {
        let current = self.keyring.current();
        let keys = current.ids();
        // It signs until all replicas have read their keys.
        let now = self.clock.now() - self.waits.leeway;
        let until = current.signing().previous_until();
        Sight {
            runs: self.runs(&keys),
            behind: self.keyring.readers().behind(&keys.signing),
            keys,
            longer_tokens: until.is_some_and(|until| now < until),
        }
    }

    /// Who needs which keys. Nobody is asked when there are only the current ones.
    fn runs(&self, keys: &KeyIds) -> Runs {
        if keys.keypair.previous.is_none() && keys.root.previous.is_none() {
            return Runs::default();
        }
        let mut runs = Runs {
            unknown: !self.backend.sees_all(),
            ..Runs::default()
        };
        for id in self.backend.sessions() {
            let Some(run) = self.backend.run_state(&id) else {
                continue;
            };
            match run.status {
                RunStatus::Ended { .. } => continue,
                RunStatus::Unknown => {
                    runs.unknown = true;
                    continue;
                }
                // Until its very end an agent may ask for a token.
                RunStatus::Starting { .. }
                | RunStatus::Doomed(_)
                | RunStatus::Running { .. }
                | RunStatus::Ending(_) => {}
            }
            let root = self.backend.token_times(&id).and_then(|times| times.root);
            runs.live += 1;
            runs.of_other_keypair += usize::from(run.keypair != Some(keys.keypair.current));
            runs.of_other_root += usize::from(root != Some(keys.root.current));
        }
        runs
    }

    /// Says whether it was done.
    async fn note(&self, life: Duration, told: &mut Told) -> bool {
        let noted = tokio::time::timeout(LIMIT, self.store.note_token_life(life)).await;
        let reason = match noted {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => exit::report(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        if told.failed.insert(KeyKind::SigningKey) {
            warn!(%reason, "cannot note how long tokens of the signing key live; trying again");
        }
        false
    }

    /// Tells whom a rotation of the signing key waits for, and has what they say read soon.
    fn wait_for_readers(&self, sight: &Sight, told: &mut Told) {
        let (signing, readers) = (&sight.keys.signing, self.keyring.readers());
        let late = match (&signing.next, &signing.previous) {
            (Some(next), None) => readers.unaware_of(next),
            (_, Some(_)) => readers.signing_without(&signing.current),
            (None, None) => Vec::new(),
        };
        if !late.is_empty() {
            // What they say is read with the keys.
            self.keyring.want_reading();
        }
        told.late(late);
    }

    /// Who has not followed by now is taken for gone, and is not waited for in the next step.
    async fn forget(&self, step: &Step) {
        let readers = self.keyring.readers();
        let late = match step {
            Step::Promote { next, .. } => readers.unaware_of(next),
            Step::Drop {
                kind: KeyKind::SigningKey,
                ..
            } => readers.signing_without(&self.keyring.current().ids().signing.current),
            Step::Drop { .. } => return,
        };
        if late.is_empty() {
            return;
        }
        warn!(replicas = ?late, "replicas that did not follow a rotation are taken for gone");
        let forgotten = self.store.annotate(late.into_iter().map(|it| (it, None)));
        let failed = match tokio::time::timeout(LIMIT, forgotten).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => exit::report(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        // Then it only takes longer.
        warn!(reason = %failed, "cannot forget replicas that are gone");
    }

    async fn take(&self, step: &Step, told: &mut Told) {
        let taking = self.store.take(step, self.clock.now());
        let taken = tokio::time::timeout(LIMIT, taking).await;
        let kind = step.kind();
        match taken {
            Ok(Ok(done)) => {
                told.failed.remove(&kind);
                if done {
                    report(step);
                    self.forget(step).await;
                }
                // Whoever took it: our own keys are not those of the Secret.
                self.keyring.want_reading();
            }
            Ok(Err(ChangeError::Foreign { secret })) => {
                if told.failed.insert(kind) {
                    info!(%secret, key = kind.as_str(), ?step, "a rotation is to be completed by whoever keeps the Secret");
                }
            }
            Ok(Err(error)) => {
                if told.failed.insert(kind) {
                    let reason = exit::report(&error);
                    warn!(key = kind.as_str(), ?step, %reason, "cannot complete a rotation; trying again");
                }
            }
            Err(_) => {
                if told.failed.insert(kind) {
                    warn!(
                        key = kind.as_str(),
                        ?step,
                        "cannot complete a rotation in time; trying again"
                    );
                }
            }
        }
    }
}

impl fmt::Debug for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rotation")
            .field("waits", &self.waits)
            .finish_non_exhaustive()
    }
}

fn report(step: &Step) {
    let key = step.kind().as_str();
    let name = match step {
        Step::Promote { next, .. } => {
            info!(key, id = %next, "the next key is in use");
            "promoted"
        }
        Step::Drop { previous, .. } => {
            info!(key, id = %previous, "nobody needs the old key any more; it is gone");
            "dropped"
        }
    };
    counter!(ROTATION_STEPS, "key" => key, "step" => name).increment(1);
}

/// What was told already.
#[derive(Default)]
struct Told {
    underway: HashSet<(KeyKind, String)>,
    /// Whose last step could not be taken.
    failed: HashSet<KeyKind>,
    /// Who was waited for.
    late: Vec<String>,
}

impl Told {
    /// Tells whom a rotation waits for, when that is somebody else than before.
    fn late(&mut self, late: Vec<String>) {
        if late == self.late {
            return;
        }
        if !late.is_empty() {
            info!(replicas = ?late, "a rotation waits until these have read the signing keys");
        }
        self.late = late;
    }

    /// Tells of each rotation once when it is first seen.
    fn tell(&mut self, keys: &KeyIds, runs: Runs) {
        let id = |id: &super::id::KeyId| id.to_string();
        let old = [
            (
                KeyKind::Keypair,
                keys.keypair.previous.as_ref().map(id),
                Some(runs.of_other_keypair),
            ),
            (
                KeyKind::SessionRoot,
                keys.root.previous.as_ref().map(id),
                Some(runs.of_other_root),
            ),
            (KeyKind::SigningKey, keys.signing.previous.clone(), None),
            (KeyKind::SigningKey, keys.signing.next.clone(), None),
        ];
        let old: Vec<_> = old
            .into_iter()
            .filter_map(|(kind, id, needed_by)| Some(((kind, id?), needed_by)))
            .collect();
        self.underway
            .retain(|told| old.iter().any(|(is, _)| is == told));
        for ((kind, id), needed_by) in old {
            if self.underway.insert((kind, id.clone())) {
                info!(key = kind.as_str(), %id, needed_by, "a rotation is under way");
            }
        }
    }
}
