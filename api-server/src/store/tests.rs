use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    pin::pin,
    time::{Duration, SystemTime},
};

use ambient_shared::rest::Session;
use futures_util::{future::join_all, poll};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    sessions::{CreateSession, EditSession},
    *,
};
use crate::{
    auth::access::{Caller, Who},
    sessions::{Edit, SessionChange, StatusChange},
};

struct Fixture {
    store: Store,
    stop: CancellationToken,
    writer: JoinHandle<()>,
}

#[expect(clippy::disallowed_methods, reason = "the test waits for it itself")]
async fn open(database: &Database, clock: Clock) -> Fixture {
    let (store, writer) = Store::open(database, clock, Events::new()).await.unwrap();
    let stop = CancellationToken::new();
    let writer = tokio::spawn(writer.run(stop.clone()));
    Fixture {
        store,
        stop,
        writer,
    }
}

fn named(name: &str) -> SessionChange {
    SessionChange {
        name: Some(name.to_owned()),
        ..SessionChange::default()
    }
}

fn create(name: &str) -> CreateSession {
    CreateSession {
        change: named(name),
        prompt_is_message: false,
    }
}

fn rename(id: &str, name: &str) -> EditSession {
    EditSession {
        caller: Caller {
            who: Who::Service(None),
            expires_at: None,
        },
        id: id.to_owned(),
        edit: Edit::Fields(named(name)),
    }
}

fn updated_at(session: &Session) -> (i64, i32) {
    let time = session.updated_at.unwrap();
    (time.seconds, time.nanos)
}

/// A change that the database refuses half-way.
struct Broken;

impl Change for Broken {
    type Done = ();

    async fn apply(&self, to: &mut Transaction) -> Result<(), Error> {
        sqlx::query("update sessions set name = 'broken'")
            .execute(to.connection())
            .await?;
        sqlx::query("insert into sessions (id) values ('x')")
            .execute(to.connection())
            .await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_change_that_fails_does_not_fail_its_neighbours() {
    let fixture = open(&Database::Memory, Clock::system()).await;
    let store = &fixture.store;
    // Handed in at once, so that they share a transaction.
    let before = join_all((0..20).map(|number| {
        let name = number.to_string();
        async move { store.change(create(&name)).await }
    }));
    let after = join_all((20..40).map(|number| {
        let name = number.to_string();
        async move { store.change(create(&name)).await }
    }));
    let (before, broken, after) = tokio::join!(before, store.change(Broken), after);
    assert!(matches!(broken, Err(Error::Database(_))));
    for made in before.into_iter().chain(after) {
        let made = made.unwrap();
        assert_eq!(store.session(&made.id).await.unwrap(), made);
    }
}

#[tokio::test]
async fn times_rise_even_when_the_clock_is_set_back() {
    let folder = TempDir::new().unwrap();
    let database = Database::File(folder.path().join("ambient.db"));
    let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock = Clock::manual(noon);
    let fixture = open(&database, clock.clone()).await;
    let made = fixture.store.change(create("a")).await.unwrap();
    clock.set(noon - Duration::from_hours(1));
    let renamed = fixture.store.change(rename(&made.id, "b")).await.unwrap();
    assert!(updated_at(&renamed) > updated_at(&made));
    fixture.stop.cancel();
    fixture.writer.await.unwrap();
    drop(fixture.store);

    // Also after a restart.
    let fixture = open(&database, Clock::manual(noon - Duration::from_hours(2))).await;
    let again = fixture.store.change(rename(&made.id, "c")).await.unwrap();
    assert!(updated_at(&again) > updated_at(&renamed));
}

#[tokio::test]
async fn writing_the_same_status_again_changes_nothing() {
    let fixture = open(&Database::Memory, Clock::system()).await;
    let made = fixture.store.change(create("a")).await.unwrap();
    let running = || EditSession {
        edit: Edit::Status(StatusChange {
            phase: Some("Running".to_owned()),
            // Finer than the database keeps it.
            start_time: Some("2026-01-02T03:04:05.123456789Z".parse().unwrap()),
            ..StatusChange::default()
        }),
        ..rename(&made.id, "")
    };
    let once = fixture.store.change(running()).await.unwrap();
    assert!(updated_at(&once) > updated_at(&made));
    let twice = fixture.store.change(running()).await.unwrap();
    assert_eq!(once, twice);
    assert_eq!(fixture.store.session(&made.id).await.unwrap(), twice);
}

#[tokio::test]
async fn what_was_handed_in_before_the_end_is_committed() {
    let folder = TempDir::new().unwrap();
    let database = Database::File(folder.path().join("ambient.db"));
    let fixture = open(&database, Clock::system()).await;
    let store = &fixture.store;
    let (made, ()) = tokio::join!(store.change(create("last")), async {
        fixture.stop.cancel();
    });
    fixture.writer.await.unwrap();
    let late = store.change(create("late")).await;
    assert!(matches!(late, Err(Error::Unavailable(_))));
    assert!(!store.is_open());
    drop(fixture.store);

    let fixture = open(&database, Clock::system()).await;
    fixture.store.session(&made.unwrap().id).await.unwrap();
}

#[tokio::test]
async fn a_database_of_a_later_version_is_left_alone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ambient.db");
    let fixture = open(&Database::File(path.clone()), Clock::system()).await;
    fixture.stop.cancel();
    fixture.writer.await.unwrap();
    drop(fixture.store);
    let options = SqliteConnectOptions::new().filename(&path);
    let later = pool(1, options, None).await.unwrap();
    sqlx::raw_sql("pragma user_version = 99")
        .execute(&later)
        .await
        .unwrap();
    later.close().await;
    let refused = Store::open(&Database::File(path), Clock::system(), Events::new()).await;
    assert!(matches!(refused, Err(OpenError::Newer { found: 99, .. })));
}

fn modes(folder: &Path) -> Vec<(String, u32)> {
    let mut modes: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            (entry.file_name().into_string().unwrap(), mode)
        })
        .collect();
    modes.sort();
    modes
}

#[tokio::test]
async fn all_files_are_their_owners_alone_also_those_that_were_not() {
    let folder = TempDir::new().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let database = Database::File(folder.path().join("ambient.db"));
    let private: Vec<_> = ["", "-shm", "-wal", ".lock"]
        .map(|suffix| (format!("ambient.db{suffix}"), 0o600))
        .into();
    let fixture = open(&database, Clock::system()).await;
    fixture.store.change(create("a")).await.unwrap();
    assert_eq!(modes(folder.path()), private);

    // As they were made once; the log of a server that was killed among them.
    let copies = TempDir::new().unwrap();
    fs::set_permissions(copies.path(), Permissions::from_mode(0o755)).unwrap();
    for (name, _) in &private {
        let copy = copies.path().join(name);
        fs::copy(folder.path().join(name), &copy).unwrap();
        fs::set_permissions(&copy, Permissions::from_mode(0o644)).unwrap();
    }
    let database = Database::File(copies.path().join("ambient.db"));
    let fixture = open(&database, Clock::system()).await;
    fixture.store.change(create("b")).await.unwrap();
    assert_eq!(modes(copies.path()), private);
}

#[tokio::test]
async fn a_file_that_is_no_database_keeps_its_mode() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("precious.txt");
    fs::write(&path, "precious".repeat(1000)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let database = Database::File(path.clone());
    let refused = Store::open(&database, Clock::system(), Events::new()).await;
    assert!(matches!(refused, Err(OpenError::Sqlite { .. })));
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o644
    );
}

/// A query that would never end.
const ENDLESS: &str =
    "with recursive n (x) as (select 1 union all select x + 1 from n) select count(*) from n";

#[tokio::test]
async fn a_query_that_takes_too_long_is_interrupted_and_frees_its_connection() {
    let options = SqliteConnectOptions::new().in_memory(true);
    let limit = Duration::from_millis(200);
    let readers = pool(1, options, Some(limit)).await.unwrap();
    for _ in 0..2 {
        let interrupted = sqlx::query(ENDLESS).fetch_one(&readers).await;
        let error = Error::from(interrupted.unwrap_err());
        assert_eq!(error.rest_status(), 503, "{error:?}");
        assert_eq!(error.grpc_code(), Code::Unavailable);
        assert!(error.to_string().contains("in time"), "{error}");
    }
    // Also when nobody waits for its end; the next one has all of its own time. On a machine that
    // stands still for the whole limit, this one is interrupted too.
    let _ = timeout(limit / 4, sqlx::query(ENDLESS).fetch_one(&readers)).await;
    let row = sqlx::query("select 1").fetch_one(&readers).await.unwrap();
    assert_eq!(row.try_get::<i64, _>(0).unwrap(), 1);
}

#[tokio::test]
async fn waiting_for_a_busy_database_has_an_end() {
    let fixture = open(&Database::Memory, Clock::system()).await;
    let store = &fixture.store;
    let _busy = store.readers.acquire().await.unwrap();
    tokio::time::pause();
    let filter = Filter::default();
    let page = Page { number: 1, size: 1 };
    for error in [
        store.session("x").await.unwrap_err(),
        store
            .sessions(&filter, &Order::default(), page)
            .await
            .unwrap_err(),
    ] {
        assert_eq!(error.rest_status(), 503, "{error:?}");
        assert_eq!(error.grpc_code(), Code::Unavailable);
    }
}

#[tokio::test]
async fn a_database_in_memory_outlives_callers_that_give_up() {
    let fixture = open(&Database::Memory, Clock::system()).await;
    let store = &fixture.store;
    let made = store.change(create("kept")).await.unwrap();
    for polls in 0..300 {
        let mut reading = pin!(store.session(&made.id));
        for _ in 0..polls % 10 {
            if poll!(reading.as_mut()).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(store.session(&made.id).await.unwrap().id, made.id);
}
