//! Follows the mounted token file and publishes each valid token.
//!
//! In: a Secret volume. Out: a [`Feed`]. The folder is watched, not the file: the kubelet swaps the
//! `..data` symlink, which a watch on the file sees as a deletion, or not at all. As announcements
//! may be missing (no inotify left, a network file system, a folder replaced by another), the file
//! is also read each second. A bad read keeps the last good token.

mod read;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ambient_shared::{clock::Clock, token::Token};
use metrics::{counter, gauge};
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{metrics as names, tokens::Feed};
use read::{FolderId, ReadError, folder_id, is_frozen, read_token};

/// How often the file is read, announced or not: how late an update may be seen that the system
/// did not announce, while so few reads cost next to nothing.
const POLL: Duration = Duration::from_secs(1);

/// From an announcement to the read: a swap is several steps, of which each is announced; and a
/// folder that is written to without end must not keep us busy.
const SETTLE: Duration = Duration::from_millis(10);

/// The folder a token file is in.
pub(crate) fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Follows one token file; owns the only feed.
pub(crate) struct Watcher {
    file: PathBuf,
    feed: Feed,
    clock: Clock,
    /// Set by the thread that gets the system's announcements.
    announced: Arc<Notify>,
    /// [`POLL`], but in tests of what is announced.
    poll: Duration,
    armed: Option<Armed>,
    /// What was last said about a file that cannot be used, so that it is said once.
    said: Option<ReadError>,
    said_unwatched: bool,
    said_frozen: bool,
}

/// A running watch, and the folder that it is on.
struct Armed {
    folder: FolderId,
    /// Dropping it ends the watch.
    _watch: RecommendedWatcher,
}

/// What one look at the file system found.
struct Look {
    folder: Option<FolderId>,
    token: Result<Token, ReadError>,
    frozen: bool,
}

impl Watcher {
    /// Follows `file`, which may appear later.
    pub(crate) fn new(file: PathBuf, feed: Feed, clock: Clock) -> Self {
        Self {
            file,
            feed,
            clock,
            announced: Arc::new(Notify::new()),
            poll: POLL,
            armed: None,
            said: None,
            said_unwatched: false,
            said_frozen: false,
        }
    }

    /// Runs until `stop`.
    ///
    /// Cancel-safe: what it holds is only a copy of what is in the file.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut tick = interval(self.poll);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wishes = tokio::select! {
                () = stop.cancelled() => return,
                wishes = self.feed.wishes() => wishes,
                () = self.announced.notified() => {
                    sleep(SETTLE).await;
                    Vec::new()
                }
                _ = tick.tick() => Vec::new(),
            };
            // A file system that hangs must not hold up the end.
            if stop.run_until_cancelled(self.look()).await.is_none() {
                return;
            }
            for wish in wishes {
                // Who asked may have gone.
                let _ = wish.send(());
            }
        }
    }

    async fn look(&mut self) {
        let Some(mut look) = look_at(&self.file).await else {
            return;
        };
        if look.folder != self.armed.as_ref().map(|armed| armed.folder) {
            self.arm(look.folder);
            if self.armed.is_some() {
                // What changed before the watch was on was announced to nobody.
                let Some(second) = look_at(&self.file).await else {
                    return;
                };
                look = second;
            }
        }
        gauge!(names::FOLDER_WATCHED).set(if self.armed.is_some() { 1.0 } else { 0.0 });
        if look.frozen && !self.said_frozen {
            self.said_frozen = true;
            warn!(
                file = %self.file.display(),
                "token file is a plain file in a read-only mount, as with subPath, and will never \
                 be updated; mount the whole volume"
            );
        }
        self.judge(look.token);
    }

    fn judge(&mut self, token: Result<Token, ReadError>) {
        let result = match &token {
            Ok(_) => "ok",
            Err(error) => error.label(),
        };
        counter!(names::TOKEN_READS, "result" => result).increment(1);
        match token {
            Ok(token) => {
                if self.said.take().is_some() {
                    info!(file = %self.file.display(), "token file can be used");
                }
                self.feed.publish(token, "file");
            }
            Err(error) => {
                if self.said.replace(error) == Some(error) {
                    return;
                }
                let kept = self.feed.latest();
                let usable = kept
                    .as_ref()
                    .map(|token| !token.is_expired(self.clock.now()));
                warn!(
                    file = %self.file.display(),
                    reason = %error,
                    keeps = kept.map(|token| token.hash().to_string()),
                    usable,
                    "token file cannot be used; keeping the last good token"
                );
            }
        }
    }

    /// Puts the watch on the folder that is there now.
    fn arm(&mut self, folder: Option<FolderId>) {
        self.armed = None;
        let Some(folder) = folder else {
            return;
        };
        match watch_folder(folder_of(&self.file), Arc::clone(&self.announced)) {
            Ok(watch) => {
                debug!(folder = %folder_of(&self.file).display(), "folder is watched");
                self.said_unwatched = false;
                self.armed = Some(Armed {
                    folder,
                    _watch: watch,
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut self.said_unwatched, true) {
                    warn!(
                        folder = %folder_of(&self.file).display(),
                        reason = %error,
                        "folder cannot be watched; the token file is read every second instead"
                    );
                }
            }
        }
    }
}

/// Looks once, off the async threads; none when the runtime ends.
async fn look_at(file: &Path) -> Option<Look> {
    let file = file.to_owned();
    tokio::task::spawn_blocking(move || Look {
        folder: folder_id(folder_of(&file)),
        token: read_token(&file),
        frozen: is_frozen(&file),
    })
    .await
    .ok()
}

fn watch_folder(folder: &Path, announced: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watch = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // An error may stand for lost announcements: look then too.
        if event.map_or(true, |event| may_change_content(event.kind)) {
            announced.notify_one();
        }
    })?;
    watch.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watch)
}

/// Our own reads are announced too, and must not lead to reads.
fn may_change_content(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

#[cfg(test)]
mod tests;
