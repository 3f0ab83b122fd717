//! Hands the token to the agent: a file that is replaced atomically, then what was asked for.
//!
//! In: the `watch` of the refresher. Out: the file named by `AMBIENT_TOKEN_FILE`, and a signal, a
//! command or a restart of the agent. Nothing is done when the secret is the same as before.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ambient_shared::{
    exit,
    swap::{SECRET_DIR, SECRET_FILE, write_atomic},
    token::Token,
};
use metrics::counter;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::spawn_blocking,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    agent::{hook::Hook, supervisor::Order},
    metrics as names,
};

/// Pause before a file that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The token's way to the agent.
#[derive(Debug)]
pub(crate) struct Handover {
    file: PathBuf,
    latest: watch::Receiver<Option<Token>>,
    then: Then,
    /// That a program is to be run. While one runs, this keeps one mark: however many tokens
    /// come, it is run once more.
    to_run: Arc<Notify>,
    /// What the agent was given last.
    given: Option<Token>,
}

/// What follows a new token file.
#[derive(Debug)]
pub(crate) enum Then {
    /// The agent reads the file when it likes.
    Nothing,
    /// The supervisor sees to it. One order that waits is as good as many.
    Order(mpsc::Sender<Order>, Order),
    /// A program is run, one at a time, beside the writing of the file.
    Run(Arc<Hook>),
}

/// The token file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the agent's token file {}; AMBIENT_TOKEN_FILE must be in a writable place", path.display())]
pub(crate) struct HandoverError {
    path: PathBuf,
    source: io::Error,
}

impl Handover {
    /// Nothing is written yet.
    pub(crate) fn new(file: PathBuf, latest: watch::Receiver<Option<Token>>, then: Then) -> Self {
        Self {
            file,
            latest,
            then,
            to_run: Arc::default(),
            given: None,
        }
    }

    /// Writes the token that is there. Before the agent starts: it must find one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) async fn first(&mut self) -> Result<(), HandoverError> {
        let token = self.latest.borrow_and_update().clone();
        match token {
            Some(token) => self.write(token).await,
            None => Ok(()),
        }
    }

    /// Follows the token until `shutdown`, then removes the file.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let hook = match &self.then {
            Then::Run(hook) => Some(Arc::clone(hook)),
            Then::Nothing | Then::Order(..) => None,
        };
        let runs = run_each_time(hook, Arc::clone(&self.to_run));
        let work = async {
            tokio::select! {
                () = self.follow() => {}
                never = runs => match never {},
            }
        };
        shutdown.run_until_cancelled(work).await;
        // The agent is gone: no token is left behind for whoever comes after it.
        if let Err(error) = fs::remove_file(&self.file) {
            debug!(%error, "token file was not removed");
        }
    }

    async fn follow(&mut self) {
        // Ends with the refresher.
        while self.latest.changed().await.is_ok() {
            while let Err(error) = self.try_newest().await {
                error!(error = %exit::report(&error), "token handover failed");
                sleep(RETRY).await;
            }
        }
    }

    /// The newest, not the one that was new when the first try failed.
    async fn try_newest(&mut self) -> Result<(), HandoverError> {
        let newest = self.latest.borrow_and_update().clone();
        let Some(token) = newest.filter(|token| !self.was_given(token)) else {
            return Ok(());
        };
        self.write(token).await?;
        match &self.then {
            Then::Nothing => {}
            Then::Order(supervisor, order) => {
                if supervisor.try_send(*order).is_err() {
                    debug!("an earlier order still waits for the supervisor");
                }
            }
            Then::Run(_) => self.to_run.notify_one(),
        }
        Ok(())
    }

    fn was_given(&self, token: &Token) -> bool {
        self.given.as_ref().is_some_and(|it| it.same_secret(token))
    }

    async fn write(&mut self, token: Token) -> Result<(), HandoverError> {
        let (path, content) = (self.file.clone(), token.clone());
        // A disk may take its time; signals must not wait for it.
        let written = spawn_blocking(move || write_token(&path, &content)).await;
        let written = written.unwrap_or_else(|failed| Err(io::Error::other(failed)));
        let result = if written.is_ok() { "ok" } else { "failed" };
        counter!(names::HANDOVERS, "result" => result).increment(1);
        written.map_err(|source| HandoverError {
            path: self.file.clone(),
            source,
        })?;
        info!(token = %token.hash(), "token handed to agent");
        self.given = Some(token);
        Ok(())
    }
}

/// Runs the program whenever it is to be run.
async fn run_each_time(hook: Option<Arc<Hook>>, to_run: Arc<Notify>) -> Infallible {
    let Some(hook) = hook else {
        return std::future::pending().await;
    };
    loop {
        to_run.notified().await;
        match hook.run().await {
            Ok(()) => debug!("refresh command ended"),
            Err(error) => warn!(error = %exit::report(&error), "refresh command failed"),
        }
    }
}

/// The folder is made private when it is not there; one that is there is left as it is.
fn write_token(path: &Path, token: &Token) -> io::Result<()> {
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(SECRET_DIR)
            .create(folder)?;
    }
    write_atomic(path, token.expose().as_bytes(), SECRET_FILE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn token(text: &str) -> Option<Token> {
        Token::new(text, None).ok()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn file_and_folder_are_private_and_gone_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("private/token");
        let (_sender, latest) = watch::channel(token("first-token"));
        let mut handover = Handover::new(file.clone(), latest, Then::Nothing);

        handover.first().await.unwrap();

        assert_eq!(fs::read_to_string(&file).unwrap(), "first-token");
        assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        handover.run(shutdown).await;
        assert!(!file.exists());
    }

    #[tokio::test]
    async fn only_another_secret_counts_as_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, latest) = watch::channel(token("first-token"));
        let (orders, mut received) = mpsc::channel(1);
        let then = Then::Order(orders, Order::Restart);
        let mut handover = Handover::new(dir.path().join("token"), latest, then);
        handover.first().await.unwrap();

        sender.send_replace(token("first-token"));
        handover.try_newest().await.unwrap();
        assert!(received.try_recv().is_err());

        sender.send_replace(token("second-token"));
        handover.try_newest().await.unwrap();
        assert_eq!(received.try_recv().unwrap(), Order::Restart);
        let written = fs::read_to_string(dir.path().join("token")).unwrap();
        assert_eq!(written, "second-token");
    }

    #[tokio::test]
    async fn a_place_that_cannot_be_written_is_an_error_that_names_it() {
        let (_sender, latest) = watch::channel(token("first-token"));
        let file = PathBuf::from("/proc/ambient/token");
        let mut handover = Handover::new(file, latest, Then::Nothing);
        let error = exit::report(&handover.first().await.unwrap_err());
        assert!(error.contains("/proc/ambient/token"), "{error}");
        assert!(error.contains("AMBIENT_TOKEN_FILE"), "{error}");
    }
}
