//! Sessions, messages and projects in SQLite.
//!
//! In: typed reads and [`Change`]s. Out: objects, and events for watchers. Reads run side by side
//! on their own connections; all changes go through the one [`Writer`], which commits whatever is
//! queued in one transaction. With a write-ahead log and `synchronous=NORMAL` a killed process
//! loses nothing that was answered; a machine that loses power may lose the last moments, but
//! keeps a sound database.

mod files;
pub(crate) mod messages;
pub(crate) mod project_settings;
pub(crate) mod projects;
pub(crate) mod sessions;
mod writer;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ambient_shared::clock::Clock;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Row as _, SqliteConnection, SqlitePool,
    sqlite::{
        SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow,
        SqliteSynchronous,
    },
};
use tokio::{sync::mpsc, time::timeout};

use self::files::{keep_private, lock, private_file};
pub(crate) use self::writer::{Change, Transaction, Writer};
use crate::{
    error::Error,
    events::Events,
    search::{Filter, Order, Value},
    settings::Database,
};

/// The schema's versions, oldest first; `PRAGMA user_version` says how many were applied.
const MIGRATIONS: [&str; 1] = [include_str!("../migrations/0001_initial.sql")];

/// Connections that read: a few for each core, as reads are short.
const READERS: u32 = 8;

/// Longest wait for a connection or a lock of the database.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// Longest that a reader works from when it is taken: most take a millisecond, and a search over
/// all texts of many large sessions must not keep the readers from everybody else.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// SQLite's steps between two looks at the clock: some tens of microseconds.
const STEPS: i32 = 10_000;

/// Longest that a list takes, with its wait for a connection.
const LIST_LIMIT: Duration = Duration::from_secs(10);

/// Rows that a connection reads ahead: messages may have a mebibyte each.
const ROWS_AHEAD: usize = 16;

/// Size to which the write-ahead log is cut after a checkpoint, in bytes.
const LOG_SIZE: &str = "67108864";

/// Changes that wait to be committed. More wait in their callers, where they hold nothing up.
const QUEUE: usize = 1024;

/// Why the database cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// SQLite says no.
    #[error("cannot open database {}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        source: sqlx::Error,
    },
    /// A program of a later version wrote it.
    #[error("database {} has schema {found}; this program knows up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: usize,
    },
    /// Two servers on one database would not see each other's changes.
    #[error("database {} is in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The lock file cannot be made.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file of the database cannot be kept from other users.
    #[error("cannot make {} readable by its owner alone", path.display())]
    Private {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// The database, for reading and for handing in changes. Clones share it.
#[derive(Clone)]
pub(crate) struct Store {
    readers: SqlitePool,
    queue: mpsc::Sender<writer::Request>,
    /// Held as long as anybody uses the database; none in memory.
    _lock: Option<Arc<File>>,
    /// What keeps a database in memory when the pool drops a connection, as it does with one whose
    /// caller gave up while getting it.
    _keeper: Option<SqlitePool>,
}

/// Which part of a list is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Page {
    /// From 1.
    pub(crate) number: u32,
    /// Most items on a page.
    pub(crate) size: u32,
}

/// A part of a list, and how many items the whole has.
#[derive(Debug)]
pub(crate) struct Listed<T> {
    pub(crate) items: Vec<T>,
    pub(crate) total: u32,
}

impl Store {
    /// Opens the database, and makes or migrates it as needed. The writer is to be run.
    ///
    /// # Errors
    /// When it cannot be opened, is somebody else's, or is in use.
    pub(crate) async fn open(
        database: &Database,
        clock: Clock,
        events: Events,
    ) -> Result<(Self, Writer), OpenError> {
        let path = match database {
            Database::Memory => Path::new(":memory:"),
            Database::File(path) => path,
        };
        let lock = match database {
            Database::Memory => None,
            Database::File(path) => Some(Arc::new(lock(path)?)),
        };
        let broken = |source| OpenError::Sqlite {
            path: path.to_owned(),
            source,
        };
        let options = SqliteConnectOptions::new()
            .busy_timeout(BUSY_LIMIT)
            .row_buffer_size(ROWS_AHEAD)
            .disable_statement_logging();
        let (readers, writer, keeper) = match database {
            Database::Memory => {
                let options = options.vfs("memdb").filename(memory_name());
                let keeper = pool(1, options.clone(), None).await.map_err(broken)?;
                // One for all: readers in memory would hold up the writer anyway.
                let one = pool(1, options, Some(READ_LIMIT)).await.map_err(broken)?;
                (one.clone(), one, Some(keeper))
            }
            Database::File(path) => {
                private_file(path).map_err(|error| broken(sqlx::Error::Io(error)))?;
                let options = options.filename(path);
                let writing = options
                    .clone()
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .synchronous(SqliteSynchronous::Normal)
                    .pragma("journal_size_limit", LOG_SIZE);
                // First the writer: it makes the file that the others open.
                let writer = pool(1, writing, None).await.map_err(broken)?;
                let readers = pool(READERS, options.read_only(true), Some(READ_LIMIT)).await;
                (readers.map_err(broken)?, writer, None)
            }
        };
        migrate(&writer, path).await?;
        if let Database::File(path) = database {
            // Not before it has proved to be a database, and no other file that was named by mistake.
            keep_private(path)?;
        }
        let last = last_stamp(&writer).await.map_err(broken)?;
        let (queue, changes) = mpsc::channel(QUEUE);
        let store = Self {
            readers,
            queue,
            _lock: lock,
            _keeper: keeper,
        };
        Ok((store, Writer::new(writer, changes, clock, events, last)))
    }

    /// Whether changes are still taken.
    pub(crate) fn is_open(&self) -> bool {
        !self.queue.is_closed()
    }

    /// One page of a table, and the size of the whole, as of one moment.
    ///
    /// A page is bounded by its number of items alone, as clients count pages by items: 1000
    /// sessions of 256 KiB each, the most there may be, are 250 MiB. Clients for which that is too
    /// much ask for smaller pages.
    ///
    /// # Errors
    /// When the database fails, or takes longer than [`LIST_LIMIT`].
    async fn list<T>(
        &self,
        table: &'static str,
        read: fn(&SqliteRow) -> Result<T, sqlx::Error>,
        filter: &Filter,
        order: &Order,
        page: Page,
    ) -> Result<Listed<T>, Error> {
        let reading = self.read_page(table, read, filter, order, page);
        timeout(LIST_LIMIT, reading)
            .await
            .unwrap_or(Err(Error::Database(sqlx::Error::PoolTimedOut)))
    }

    async fn read_page<T>(
        &self,
        table: &'static str,
        read: fn(&SqliteRow) -> Result<T, sqlx::Error>,
        filter: &Filter,
        order: &Order,
        page: Page,
    ) -> Result<Listed<T>, Error> {
        let mut moment = self.readers.begin().await?;
        // Filter and order are made of our own words, with a place for each value.
        let count = format!("select count(*) from {table}{}", filter.sql());
        let count = with_values(sqlx::query(AssertSqlSafe(count)), filter.values());
        let total: i64 = count
            .persistent(false)
            .fetch_one(&mut *moment)
            .await?
            .try_get(0)?;
        let (filtered, ordered) = (filter.sql(), order.sql());
        let select = format!("select * from {table}{filtered}{ordered} limit ? offset ?");
        let offset = i64::from(page.number.saturating_sub(1)) * i64::from(page.size);
        let rows = with_values(sqlx::query(AssertSqlSafe(select)), filter.values())
            .bind(i64::from(page.size))
            .bind(offset)
            .persistent(false)
            .fetch_all(&mut *moment)
            .await?;
        moment.commit().await?;
        Ok(Listed {
            items: rows.iter().map(read).collect::<Result<_, _>>()?,
            total: u32::try_from(total).unwrap_or(u32::MAX),
        })
    }
}

/// A new name for SQLite's `memdb`: connections of this process share a database whose name begins
/// with a slash, as long as one of them is open (<https://sqlite.org/src/file/src/memdb.c>).
fn memory_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("/ambient-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

fn with_values<'q>(mut query: Query<'q>, values: &[Value]) -> Query<'q> {
    for value in values {
        query = match value {
            Value::Text(text) => query.bind(text.as_str()),
            Value::Integer(number) => query.bind(*number),
            Value::Real(number) => query.bind(*number),
        };
    }
    query
}

/// Connections, each of which works no longer than `limit` for whoever takes it.
async fn pool(
    size: u32,
    options: SqliteConnectOptions,
    limit: Option<Duration>,
) -> Result<SqlitePool, sqlx::Error> {
    SqlitePoolOptions::new()
        // When it is new, and each time that it is taken again: also from somebody who did not wait
        // for the end of a query.
        .after_connect(move |connection, _| Box::pin(limit_work(connection, limit)))
        .before_acquire(move |connection, _| {
            Box::pin(async move { limit_work(connection, limit).await.map(|()| true) })
        })
        .min_connections(1)
        .max_connections(size)
        .acquire_timeout(BUSY_LIMIT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_with(options)
        .await
}

/// Interrupts whatever the connection does longer than `limit` from now.
async fn limit_work(
    connection: &mut SqliteConnection,
    limit: Option<Duration>,
) -> Result<(), sqlx::Error> {
    if let Some(limit) = limit {
        let until = Instant::now() + limit;
        connection
            .lock_handle()
            .await?
            .set_progress_handler(STEPS, move || Instant::now() < until);
    }
    Ok(())
}

/// Brings the schema up to date, each version in a transaction of its own.
async fn migrate(writer: &SqlitePool, path: &Path) -> Result<(), OpenError> {
    let broken = |source| OpenError::Sqlite {
        path: path.to_owned(),
        source,
    };
    let row = sqlx::query("pragma user_version").fetch_one(writer).await;
    let found: i64 = row.and_then(|row| row.try_get(0)).map_err(broken)?;
    let newer = || OpenError::Newer {
        path: path.to_owned(),
        found,
        known: MIGRATIONS.len(),
    };
    let applied = usize::try_from(found).map_err(|_| newer())?;
    let due = MIGRATIONS.get(applied..).ok_or_else(newer)?;
    for (version, migration) in (applied + 1..).zip(due) {
        let mut transaction = writer.begin().await.map_err(broken)?;
        sqlx::raw_sql(*migration)
            .execute(&mut *transaction)
            .await
            .map_err(broken)?;
        sqlx::raw_sql(AssertSqlSafe(format!("pragma user_version = {version}")))
            .execute(&mut *transaction)
            .await
            .map_err(broken)?;
        transaction.commit().await.map_err(broken)?;
    }
    Ok(())
}

/// The latest stamp in use, so that later ones are later even if the clock was set back.
async fn last_stamp(writer: &SqlitePool) -> Result<i64, sqlx::Error> {
    let row = sqlx::query(
        "select max(
            coalesce((select max(updated_at) from sessions), 0),
            coalesce((select max(updated_at) from projects), 0),
            coalesce((select max(updated_at) from project_settings), 0))",
    )
    .fetch_one(writer)
    .await?;
    row.try_get(0)
}

#[cfg(test)]
mod tests;
