//! How many connections a port has at once, and which it closes when there are too many.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::sleep,
};

/// Most connections at once; more wait in the system's queue. One agent and its tools need a few;
/// the limit keeps a leak of theirs from taking our memory.
const MOST_CONNECTIONS: usize = 128;

/// Connections that may be idle only while at least so many more are allowed: else those that
/// wait to be taken would wait for the idle ones' clients to close them.
const SPARE_CONNECTIONS: usize = 16;

/// How long a connection may be without a request, or take to send one's head. Go's and Rust's
/// clients keep idle connections for 90 s: they should close first, so that no request meets a
/// closed connection.
pub(super) const IDLE: Duration = Duration::from_secs(100);

/// How long a new connection may be without its first request while it is crowded.
const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// How long any other may: a client that has more to ask sends it within this, and a request that
/// meets a closed connection is lost.
const NEXT_REQUEST: Duration = Duration::from_secs(2);

/// The port's connections, against their limit.
#[derive(Clone)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    crowded: Arc<watch::Sender<bool>>,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            free: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
            crowded: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Waits for a place for one more connection.
    pub(super) async fn take(&self) -> OwnedSemaphorePermit {
        let taken = Arc::clone(&self.free).acquire_owned().await;
        let Ok(place) = taken else {
            // Nobody closes the semaphore.
            return std::future::pending().await;
        };
        self.crowded.send_if_modified(|crowded| {
            let now = self.free.available_permits() < SPARE_CONNECTIONS;
            std::mem::replace(crowded, now) != now
        });
        place
    }

    pub(super) fn is_crowded(&self) -> bool {
        *self.crowded.borrow()
    }

    /// Returns once no request has been under way for [`IDLE`], or for a moment while it is
    /// crowded.
    pub(super) async fn is_wanted_back(&self, requests: &watch::Sender<usize>) {
        let mut requests = requests.subscribe();
        let mut crowded = self.crowded.subscribe();
        let mut had_any = false;
        loop {
            let _ = requests.wait_for(|count| *count == 0).await;
            let next = requests.wait_for(|count| *count > 0);
            let crowd = async {
                // Its first request is on the way, surely; the next maybe.
                sleep(if had_any { NEXT_REQUEST } else { FIRST_REQUEST }).await;
                let _ = crowded.wait_for(|crowded| *crowded).await;
            };
            tokio::select! {
                biased;
                _ = next => had_any = true,
                () = crowd => return,
                () = sleep(IDLE) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    /// After what time a connection is wanted back that `requests` came on.
    async fn wanted_back(
        is_crowded: bool,
        requests: impl AsyncFnOnce(&watch::Sender<usize>),
    ) -> Duration {
        let places = Places::new();
        places.crowded.send_replace(is_crowded);
        let count = watch::Sender::new(0);
        let started = Instant::now();
        tokio::join!(places.is_wanted_back(&count), requests(&count));
        started.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_crowd_a_connection_is_wanted_back_soon_but_not_at_once() {
        let second = Duration::from_secs(1);
        let three = async |count: &watch::Sender<usize>| {
            for _ in 0..3 {
                count.send_replace(1);
                sleep(second).await;
                count.send_replace(0);
                sleep(second).await;
            }
        };
        assert_eq!(wanted_back(true, three).await, 5 * second + NEXT_REQUEST);
        assert_eq!(wanted_back(false, three).await, 5 * second + IDLE);
        assert_eq!(wanted_back(true, async |_| ()).await, FIRST_REQUEST);
        assert_eq!(wanted_back(false, async |_| ()).await, IDLE);
    }
}
