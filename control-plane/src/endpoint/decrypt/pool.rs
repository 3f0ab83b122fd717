//! A bounded line of decryptions, and a thread for each core that works it off.
//!
//! A thread that has ended one takes the next itself: were it the async threads that hand them out,
//! each would wait for one of those to get a core while all cores decrypt.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::oneshot, task::spawn_blocking};
use zeroize::Zeroizing;

use crate::keypair::Keys;

/// What a ciphertext opens to; none when no accepted key opens it.
type Opened = Option<Zeroizing<Vec<u8>>>;

/// Decrypts off the async threads.
pub(super) struct Pool {
    line: Arc<Mutex<Line>>,
    cores: usize,
    waiting: usize,
}

#[derive(Default)]
struct Line {
    waiting: VecDeque<Job>,
    working: usize,
}

struct Job {
    bytes: Vec<u8>,
    keys: Arc<Keys>,
    answer: oneshot::Sender<Opened>,
}

impl Pool {
    /// `cores` decrypt at a time, and `waiting` more may wait.
    pub(super) fn new(cores: usize, waiting: usize) -> Self {
        Self {
            line: Arc::default(),
            cores,
            waiting,
        }
    }

    /// Puts a ciphertext into the line; none when it is full. Who drops what he gets leaves the
    /// line.
    pub(super) fn open(
        &self,
        bytes: Vec<u8>,
        keys: Arc<Keys>,
    ) -> Option<oneshot::Receiver<Opened>> {
        let mut line = lock(&self.line);
        if line.waiting.len() >= self.waiting && line.working >= self.cores {
            line.waiting.retain(Job::is_awaited);
            if line.waiting.len() >= self.waiting {
                return None;
            }
        }
        let (answer, opened) = oneshot::channel();
        line.waiting.push_back(Job {
            bytes,
            keys,
            answer,
        });
        if line.working < self.cores {
            line.working += 1;
            let line = Arc::clone(&self.line);
            spawn_blocking(move || {
                while let Some(job) = next(&line) {
                    job.run();
                }
            });
        }
        Some(opened)
    }
}

impl Job {
    fn is_awaited(&self) -> bool {
        !self.answer.is_closed()
    }

    fn run(self) {
        if !self.is_awaited() {
            return;
        }
        // A panic, which is told on stderr, must not cost the thread: nobody would count it.
        let opened = catch_unwind(AssertUnwindSafe(|| self.keys.open(&self.bytes)));
        if let Ok(opened) = opened {
            // Who went away meanwhile does not mind.
            let _ = self.answer.send(opened);
        }
    }
}

/// The next in line; none when the thread is to end, which is then counted.
fn next(line: &Mutex<Line>) -> Option<Job> {
    let mut line = lock(line);
    let job = line.waiting.pop_front();
    if job.is_none() {
        line.working -= 1;
    }
    job
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
