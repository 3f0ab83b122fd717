//! Keeping the session's sidecar running.
//!
//! It is started again whenever it ends, after a wait that grows while it keeps ending. It finds
//! its old addresses in its address file and listens there again, so the agent notices nothing.

use std::{io, process::Stdio, time::Duration};

use ambient_shared::retry::{Backoff, Policy};
use rustix::process::Signal;
use tokio::{
    process::Child,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use crate::backend::process::{
    folder::{ProgramRecord, SessionFolder, open_log},
    identity::ProcessIdentity,
};

/// Waits between restarts.
const RESTART: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(10),
    brief: Duration::MAX,
    longest_asked: Duration::from_secs(10),
};

/// A sidecar that lived this long was healthy: the next wait is a short one.
const HEALTHY: Duration = Duration::from_secs(30);

/// From SIGTERM to SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// The sidecar of one run.
pub(super) struct Sidecar {
    program: ProgramRecord,
    folder: SessionFolder,
    child: Option<(Child, ProcessIdentity)>,
    started_at: Instant,
    start_again_at: Instant,
    backoff: Backoff,
}

impl Sidecar {
    pub(super) fn new(program: ProgramRecord, folder: SessionFolder) -> Self {
        let now = Instant::now();
        Self {
            program,
            folder,
            child: None,
            started_at: now,
            start_again_at: now,
            backoff: Backoff::new(RESTART),
        }
    }

    /// Who it is, while it runs.
    pub(super) fn identity(&self) -> Option<ProcessIdentity> {
        self.child.as_ref().map(|(_, identity)| identity.clone())
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(|(_, identity)| identity.pid)
    }

    /// Starts it; if that fails, [`Self::run`] tries again.
    pub(super) fn start(&mut self) {
        self.started_at = Instant::now();
        match self.spawn() {
            Ok(started) => self.child = Some(started),
            Err(error) => {
                warn!(%error, "sidecar cannot be started");
                self.start_again_at = Instant::now() + self.backoff.next_wait();
            }
        }
    }

    fn spawn(&self) -> io::Result<(Child, ProcessIdentity)> {
        let log = open_log(&self.folder.sidecar_log())?;
        let token = self.folder.token_mount();
        let child = super::command(&self.program)
            .current_dir(self.folder.path())
            // Relative, as the sidecar logs the path, and the folder's name is the session's id.
            .env(
                "AMBIENT_BOT_TOKEN_FILE",
                token.strip_prefix(self.folder.path()).unwrap_or(&token),
            )
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()?;
        let pid = child
            .id()
            .ok_or_else(|| io::Error::other("the sidecar ended at once"))?;
        Ok((child, ProcessIdentity::of(pid)?))
    }

    /// Waits until something changed: it ended, or it was started again. Cancel-safe.
    pub(super) async fn run(&mut self) {
        let Some((child, _)) = &mut self.child else {
            sleep_until(self.start_again_at).await;
            self.start();
            return;
        };
        let ended = child.wait().await;
        if self.started_at.elapsed() >= HEALTHY {
            self.backoff.reset();
        }
        let wait = self.backoff.next_wait();
        match ended {
            Ok(status) => warn!(%status, wait_ms = wait.as_millis(), "sidecar ended"),
            Err(error) => warn!(%error, "sidecar cannot be waited for"),
        }
        self.child = None;
        self.start_again_at = Instant::now() + wait;
    }

    /// Ends it: it is not needed without the runner.
    pub(super) async fn stop(&mut self) {
        let Some((mut child, identity)) = self.child.take() else {
            return;
        };
        if let Err(error) = identity.signal(Signal::TERM) {
            warn!(%error, "sidecar cannot be signalled");
        }
        if !super::ends_within(&mut child, STOP_LIMIT).await {
            // An error means that it just ended.
            let _ = child.start_kill();
            super::ends_within(&mut child, STOP_LIMIT).await;
        }
        info!("sidecar stopped");
    }
}
