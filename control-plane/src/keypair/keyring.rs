//! The keys in use, which a rotation changes while everything runs.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{Instant, timeout_at},
};

use super::{Keys, readers::Readers};

/// Longest wait for keys that may be newer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many may wait for them at a time: garbage, too, looks like the work of newer keys.
const WAITING: usize = 64;

/// The keys in use. All clones are one: who holds it asks for the keys at the moment of use and
/// keeps them only for the one piece of work.
#[derive(Clone)]
pub struct Keyring {
    keys: watch::Sender<Arc<Keys>>,
    /// When whoever reads the keys again may next be asked to; none while nobody does. Sent anew
    /// with each reading.
    readings: watch::Sender<Option<Instant>>,
    wanted: Arc<Notify>,
    waiting: Arc<Semaphore>,
    state: Arc<Mutex<State>>,
}

/// What the last reading showed beside the keys.
#[derive(Debug, Default)]
struct State {
    readers: Readers,
    is_blind: bool,
}

impl Keyring {
    /// Begins with these keys.
    pub fn new(keys: Keys) -> Self {
        Self {
            keys: watch::Sender::new(Arc::new(keys)),
            readings: watch::Sender::new(None),
            wanted: Arc::default(),
            waiting: Arc::new(Semaphore::new(WAITING)),
            state: Arc::default(),
        }
    }

    /// The keys at this moment.
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.borrow())
    }

    /// Uses these from now on. What has begun ends with those before.
    pub fn replace(&self, keys: Keys) {
        self.keys.send_replace(Arc::new(keys));
    }

    /// Other keys than these, if there are any by now: for whom what came fits none of these. Has
    /// the keys read again if that may be done soon, and waits for that, 2 s at most.
    ///
    /// Cancel-safe.
    pub(crate) async fn newer_than(&self, used: &Arc<Keys>) -> Option<Arc<Keys>> {
        if let Some(newer) = self.other_than(used) {
            return Some(newer);
        }
        let _place = self.waiting.try_acquire().ok()?;
        let mut readings = self.readings.subscribe();
        let soonest = *readings.borrow_and_update();
        let until = Instant::now() + PATIENCE;
        if soonest.is_some_and(|soonest| soonest < until) {
            self.wanted.notify_one();
            // Whether it came in time or not, what counts is which keys there are.
            let _ = timeout_at(until, readings.changed()).await;
        }
        self.other_than(used)
    }

    fn other_than(&self, used: &Arc<Keys>) -> Option<Arc<Keys>> {
        let current = self.current();
        (!Arc::ptr_eq(&current, used)).then_some(current)
    }

    /// Whether there may be newer keys, which cannot be read now.
    pub(crate) fn is_blind(&self) -> bool {
        self.state().is_blind
    }

    /// Which replica has read which signing keys, as last seen.
    pub(super) fn readers(&self) -> Readers {
        self.state().readers.clone()
    }

    pub(super) fn set_readers(&self, readers: Readers) {
        self.state().readers = readers;
    }

    pub(super) fn set_blind(&self, is_blind: bool) {
        self.state().is_blind = is_blind;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the keys read again as soon as that may be done.
    pub(super) fn want_reading(&self) {
        self.wanted.notify_one();
    }

    /// Waits until somebody wants the keys read again.
    ///
    /// Cancel-safe.
    pub(super) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// The keys were read, or could not be; that may be asked for again from `soonest` on. None:
    /// nobody will read them any more.
    pub(super) fn was_read(&self, soonest: Option<Instant>) {
        self.readings.send_replace(soonest);
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.current()).finish()
    }
}

#[cfg(test)]
mod tests {
    use ambient_shared::proof::SessionRoot;
    use ambient_testing::keypair::RsaKey;
    use aws_lc_rs::rsa::KeySize;
    use futures_util::FutureExt as _;

    use super::*;
    use crate::keypair::{
        Rotating,
        decrypting::DecryptingKey,
        signing::{SigningKey, SigningKeys},
    };

    fn keyring() -> Keyring {
        let key = RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem();
        let signing = SigningKey::from_pem(&key).unwrap();
        Keyring::new(Keys::new(
            DecryptingKey::from_pem(&key).unwrap(),
            SessionRoot::new([1; 32]),
            SigningKeys::new(signing, None, None),
        ))
    }

    fn rotate(keyring: &Keyring, root: u8) {
        let keys = Keys::clone(&keyring.current());
        keyring.replace(keys.with_root(Rotating::from(SessionRoot::new([root; 32]))));
    }

    /// Reads whenever it is wanted, as the program does; each reading brings the next root.
    async fn read_when_wanted(keyring: Keyring) {
        for root in 2.. {
            keyring.wanted().await;
            rotate(&keyring, root);
            keyring.was_read(Some(Instant::now() + Duration::from_secs(5)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_clones_have_the_same_keys() {
        let keyring = keyring();
        let clone = keyring.clone();
        let before = clone.current().root_id();
        rotate(&keyring, 2);
        assert_ne!(clone.current().root_id(), before);
    }

    #[tokio::test(start_paused = true)]
    async fn where_nobody_reads_again_nobody_waits() {
        let keyring = keyring();
        let used = keyring.current();
        assert!(keyring.newer_than(&used).now_or_never().unwrap().is_none());
        rotate(&keyring, 2);
        assert!(keyring.newer_than(&used).now_or_never().unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_meets_unknown_keys_has_them_read_and_gets_the_newer() {
        let keyring = keyring();
        let used = keyring.current();
        keyring.was_read(Some(Instant::now()));
        let reads = read_when_wanted(keyring.clone());
        let newer = tokio::select! {
            newer = keyring.newer_than(&used) => newer.unwrap(),
            () = reads => unreachable!("it reads on"),
        };
        assert_ne!(newer.root_id(), used.root_id());
        // They were read just now: who comes next is told so at once.
        assert!(keyring.newer_than(&newer).now_or_never().unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_that_takes_too_long_is_not_waited_for() {
        let keyring = keyring();
        let used = keyring.current();
        let began = Instant::now();
        keyring.was_read(Some(began));
        assert!(keyring.newer_than(&used).await.is_none());
        assert_eq!(began.elapsed(), PATIENCE);
        // The wish is kept for whoever reads next.
        assert!(keyring.wanted().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_wait() {
        let keyring = keyring();
        let used = keyring.current();
        keyring.was_read(Some(Instant::now()));
        let mut waiting = Vec::new();
        for _ in 0..WAITING {
            let mut waits = Box::pin(keyring.newer_than(&used));
            assert!(waits.as_mut().now_or_never().is_none());
            waiting.push(waits);
        }
        assert!(keyring.newer_than(&used).now_or_never().unwrap().is_none());
        rotate(&keyring, 2);
        keyring.was_read(Some(Instant::now()));
        for waits in waiting {
            assert!(waits.await.is_some());
        }
    }
}
