use std::{collections::BTreeMap, fs, path::Path, process::Stdio, time::SystemTime};

use ambient_shared::{proof::SessionKey, token::Token};
use tokio::sync::mpsc;

use super::*;
use crate::{
    backend::{Agent, ResourceOverrides},
    keypair::id::KeyId,
};
use folder::{Exit, ExitRecord, ProgramRecord, RunRecord, ShimRecord};
use identity::ProcessIdentity;

const LONG: Duration = ambient_testing::DEADLINE;

fn id() -> SessionId {
    SessionId::parse("session-0001").unwrap()
}

fn made(sessions: &Path, generation: u32) -> SessionFolder {
    let folder = SessionFolder::of(sessions, &id());
    folder.create(&id()).unwrap();
    folder.prepare(&record(generation)).unwrap();
    folder
}

fn record(generation: u32) -> RunRecord {
    let program = ProgramRecord {
        program: "true".into(),
        arguments: Vec::new(),
        environment: BTreeMap::new(),
    };
    RunRecord {
        generation,
        mark: format!("no process has the mark {generation}"),
        tied_to: None,
        runner: program.clone(),
        sidecar: program,
    }
}

fn shim(generation: u32, shim: ProcessIdentity) -> ShimRecord {
    ShimRecord {
        generation,
        mark: record(generation).mark,
        shim,
        runner: None,
        sidecar: None,
    }
}

fn desired(generation: u32) -> DesiredRun {
    DesiredRun {
        id: id(),
        generation,
        name: "a session".to_owned(),
        project: String::new(),
        agent: Agent::Command {
            command: vec!["true".to_owned()],
            image: None,
        },
        environment: BTreeMap::new(),
        resources: ResourceOverrides::default(),
        keypair: KeyId::from_bytes([1; 8]),
    }
}

fn credentials() -> Credentials {
    Credentials {
        token: Token::new("token", None).unwrap(),
        session_key: SessionKey::from_text("key").unwrap(),
        root: KeyId::from_bytes([2; 8]),
        generation: 0,
    }
}

/// The backend, and a word for each change it sees.
async fn open(sessions: &Path) -> (ProcessBackend, mpsc::Receiver<()>) {
    let (changes, seen) = mpsc::channel(64);
    let settings = ProcessSettings {
        sessions: sessions.to_owned(),
        programs: Programs {
            control_plane: sessions.join("no such program"),
            runner: "runner".into(),
            sidecar: "sidecar".into(),
        },
        environment: BTreeMap::new(),
        upstream: "http://127.0.0.1:1".to_owned(),
        grpc_upstream: "http://127.0.0.1:1".to_owned(),
        tied: false,
    };
    let observer: Observer = Arc::new(move |_| {
        let _ = changes.try_send(());
    });
    let backend = ProcessBackend::open(settings, observer, Clock::system());
    (backend.await.unwrap(), seen)
}

async fn until(
    backend: &ProcessBackend,
    seen: &mut mpsc::Receiver<()>,
    wanted: impl Fn(Option<RunState>) -> bool,
) {
    let waited = tokio::time::timeout(LONG, async {
        while !wanted(backend.run_state(&id())) {
            seen.recv().await.unwrap();
        }
    });
    let state = backend.run_state(&id());
    assert!(waited.await.is_ok(), "it was {state:?}");
}

/// A file that is there but cannot be read, whoever we are.
fn hide(file: &Path) -> Vec<u8> {
    let content = fs::read(file).unwrap();
    fs::remove_file(file).unwrap();
    fs::create_dir(file).unwrap();
    content
}

fn restore(file: &Path, content: &[u8]) {
    fs::remove_dir(file).unwrap();
    fs::write(file, content).unwrap();
}

#[tokio::test]
async fn a_run_that_nobody_saw_start_is_neither_deleted_nor_started_twice() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path(), 0);
    let ended = ExitRecord {
        generation: 0,
        at: SystemTime::UNIX_EPOCH,
        how: Exit::Code(0),
        message: None,
    };
    folder.write_exit(&ended).unwrap();
    let (backend, _seen) = open(dir.path()).await;
    assert_eq!(backend.run_state(&id()).unwrap().generation, 0);
    // As a launch that was cut off leaves it.
    let mut child = std::process::Command::new("sleep")
        .arg("300")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let lock = folder.claim(&record(1)).unwrap().unwrap();
    let identity = ProcessIdentity::of(child.id()).unwrap();
    folder.write_shim(&shim(1, identity)).unwrap();
    fs::write(folder.started(), "").unwrap();

    backend.start(&desired(1), &credentials()).await.unwrap();
    let state = backend.run_state(&id()).unwrap();
    assert_eq!(state.generation, 1);
    assert!(matches!(state.status, RunStatus::Running { .. }));
    assert_eq!(folder.run().unwrap(), Some(record(1)));

    // A later run waits for its end, which it asks for, and leaves it alone until then.
    let later = backend.start(&desired(2), &credentials()).await;
    assert!(matches!(later, Err(BackendError::StillEnding)), "{later:?}");
    assert_eq!(folder.run().unwrap(), Some(record(1)));
    assert!(folder.shim(1).unwrap().is_some() && folder.started().exists());
    let status = tokio::task::spawn_blocking(move || child.wait());
    assert!(!status.await.unwrap().unwrap().success());
    drop(lock);
}

#[tokio::test]
async fn a_launch_that_fails_leaves_nothing_that_seems_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let (backend, _seen) = open(dir.path()).await;
    let started = backend.start(&desired(0), &credentials()).await;
    assert!(
        matches!(started, Err(BackendError::Failed { .. })),
        "{started:?}"
    );
    assert_eq!(backend.run_state(&id()), None);
}

#[tokio::test]
async fn a_folder_that_cannot_be_read_for_a_while_says_nothing_until_it_can() {
    for file in ["run.json", "session.json"] {
        let dir = tempfile::tempdir().unwrap();
        let folder = made(dir.path(), 3);
        let lock = folder.open_lock().unwrap();
        lock.try_lock().unwrap();
        let file = folder.path().join(file);
        let content = hide(&file);

        let (backend, mut seen) = open(dir.path()).await;
        assert_eq!(backend.run_state(&id()), Some(UNKNOWN), "{file:?}");
        assert_eq!(backend.sessions(), [id()]);

        restore(&file, &content);
        until(&backend, &mut seen, |state| state == Some(starting(3))).await;
    }
}

#[tokio::test]
async fn a_folder_named_by_a_hash_is_known_by_the_id_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let id = SessionId::parse("SESSION/0001").unwrap();
    let folder = SessionFolder::of(dir.path(), &id);
    folder.create(&id).unwrap();
    hide(&folder.path().join("session.json"));
    let (backend, _seen) = open(dir.path()).await;
    assert_eq!(backend.run_state(&id), Some(UNKNOWN));
    let other = SessionId::parse("SESSION/0002").unwrap();
    assert_eq!(backend.run_state(&other), None);
    // It can be removed, though its record cannot be read.
    backend.remove(&id).await.unwrap();
    assert_eq!(backend.run_state(&id), None);
    assert!(!folder.path().exists());
}
