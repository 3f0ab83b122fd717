//! The one writer: commits whatever is queued in one transaction, then answers.
//!
//! In: a bounded queue of changes. Out: an answer to each after its commit, and events in commit
//! order. A commit costs about the same for one change as for a hundred, so the more callers wait,
//! the cheaper each becomes. A change that fails in the database must not fail its neighbours: the
//! batch is then rolled back and each change tried by itself.

use std::{future::Future, pin::Pin, time::Duration};

use ambient_shared::clock::Clock;
use sqlx::{Sqlite, SqliteConnection, SqlitePool, pool::PoolConnection};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Store;
use crate::{
    error::Error,
    events::{Committed, Events},
    metrics,
    time::micros_of,
};

/// Most changes in one transaction: bounds how long the first waits for the last.
const BATCH: usize = 256;

/// Longest that a caller waits for its change; disks that are slower than this are broken.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Something to change in one transaction.
pub(crate) trait Change: Send + Sync + 'static {
    /// What the caller gets when it is committed.
    type Done: Send + 'static;

    /// Makes the change. Maybe called again after a rollback. It either refuses before it has
    /// written anything, or writes all; what the database itself refuses is rolled back.
    fn apply(&self, to: &mut Transaction)
    -> impl Future<Output = Result<Self::Done, Error>> + Send;
}

/// A transaction that is being made.
pub(crate) struct Transaction {
    connection: PoolConnection<Sqlite>,
    events: Vec<Committed>,
    now: i64,
}

impl Transaction {
    /// Where to run statements.
    pub(crate) fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    /// The time of this change, in microseconds since the epoch: later than that of any change
    /// before it, so that `updated_at` tells which of two snapshots is newer.
    pub(crate) fn now(&self) -> i64 {
        self.now
    }

    /// Tells watchers, once it is committed.
    pub(crate) fn announce(&mut self, event: Committed) {
        self.events.push(event);
    }
}

/// A queued change, whatever it gives.
pub(super) type Request = Box<dyn Queued>;

type Applied<'a> = Pin<Box<dyn Future<Output = Result<(), sqlx::Error>> + Send + 'a>>;

pub(super) trait Queued: Send {
    fn apply<'a>(&'a mut self, to: &'a mut Transaction) -> Applied<'a>;
    fn answer(self: Box<Self>);
    fn fail(self: Box<Self>, error: sqlx::Error);
}

struct Waiting<C: Change> {
    change: C,
    outcome: Option<Result<C::Done, Error>>,
    answer: oneshot::Sender<Result<C::Done, Error>>,
}

impl<C: Change> Queued for Waiting<C> {
    fn apply<'a>(&'a mut self, to: &'a mut Transaction) -> Applied<'a> {
        Box::pin(async move {
            match self.change.apply(to).await {
                Err(Error::Database(error)) => Err(error),
                outcome => {
                    self.outcome = Some(outcome);
                    Ok(())
                }
            }
        })
    }

    fn answer(self: Box<Self>) {
        if let Some(outcome) = self.outcome {
            // A caller that went away does not mind.
            let _ = self.answer.send(outcome);
        }
    }

    fn fail(self: Box<Self>, error: sqlx::Error) {
        let _ = self.answer.send(Err(Error::Database(error)));
    }
}

impl Store {
    /// Hands in a change and waits until it is committed. Cancelling does not take it back.
    ///
    /// # Errors
    /// The change's own, or when the database failed or took too long; then it may still happen.
    pub(crate) async fn change<C: Change>(&self, change: C) -> Result<C::Done, Error> {
        let (answer, answered) = oneshot::channel();
        let request = Box::new(Waiting {
            change,
            outcome: None,
            answer,
        });
        let committed = async {
            self.queue.send(request).await.ok()?;
            answered.await.ok()
        };
        match timeout(ANSWER_LIMIT, committed).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(Error::Unavailable("the server is shutting down")),
            Err(_) => Err(Error::Unavailable("the database did not answer in time")),
        }
    }
}

/// Commits changes; owns the only connection that writes.
pub(crate) struct Writer {
    pool: SqlitePool,
    queue: mpsc::Receiver<Request>,
    clock: Clock,
    events: Events,
    /// The stamp of the last change.
    last: i64,
}

impl Writer {
    pub(super) fn new(
        pool: SqlitePool,
        queue: mpsc::Receiver<Request>,
        clock: Clock,
        events: Events,
        last: i64,
    ) -> Self {
        Self {
            pool,
            queue,
            clock,
            events,
            last,
        }
    }

    /// Runs until it is told to stop or nobody is left who could hand in a change. What was
    /// handed in by then is committed.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let taken = tokio::select! {
                taken = self.queue.recv_many(&mut batch, BATCH) => taken,
                () = stop.cancelled(), if !self.queue.is_closed() => {
                    self.queue.close();
                    continue;
                }
            };
            if taken == 0 {
                break;
            }
            if let Err(error) = self.commit(&mut batch).await {
                if batch.len() > 1 {
                    warn!(%error, changes = batch.len(), "commit failed; trying one by one");
                    for request in batch.drain(..) {
                        let mut alone = vec![request];
                        if let Err(error) = self.commit(&mut alone).await {
                            fail(&mut alone, error);
                        }
                    }
                } else {
                    fail(&mut batch, error);
                }
            }
        }
        self.pool.close().await;
    }

    /// Commits all of a batch and answers it, or none.
    async fn commit(&mut self, batch: &mut Vec<Request>) -> Result<(), sqlx::Error> {
        let started = Instant::now();
        let acquired = self.pool.acquire().await;
        let mut transaction = Transaction {
            connection: acquired.inspect_err(|_| metrics::commit_failed())?,
            events: Vec::with_capacity(batch.len()),
            now: self.last,
        };
        let result = self.try_commit(batch, &mut transaction).await;
        let events = std::mem::take(&mut transaction.events);
        if result.is_err() {
            // Without a transaction this fails, which is what we want in the end.
            let _ = run(&mut transaction, "rollback").await;
            metrics::commit_failed();
        }
        // A database in memory has one connection, which readers wait for.
        drop(transaction);
        result?;
        metrics::committed(batch.len(), started.elapsed());
        self.events.publish(events);
        batch.drain(..).for_each(Queued::answer);
        Ok(())
    }

    async fn try_commit(
        &mut self,
        batch: &mut [Request],
        transaction: &mut Transaction,
    ) -> Result<(), sqlx::Error> {
        run(transaction, "begin immediate").await?;
        for request in batch {
            self.last = micros_of(self.clock.now()).max(self.last + 1);
            transaction.now = self.last;
            request.apply(transaction).await?;
        }
        run(transaction, "commit").await
    }
}

async fn run(transaction: &mut Transaction, statement: &'static str) -> Result<(), sqlx::Error> {
    sqlx::query(statement)
        .execute(transaction.connection())
        .await?;
    Ok(())
}

fn fail(one: &mut Vec<Request>, error: sqlx::Error) {
    if let Some(request) = one.pop() {
        request.fail(error);
    }
}
