use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _, time::Duration};

use ambient_shared::{proof::SessionKey, token::Token};
use proptest::prelude::*;

use super::*;
use crate::keypair::id::KeyId;

fn id(text: &str) -> SessionId {
    SessionId::parse(text).unwrap()
}

fn record(generation: u32) -> RunRecord {
    let program = |name: &str| ProgramRecord {
        program: name.into(),
        arguments: Vec::new(),
        environment: BTreeMap::new(),
    };
    RunRecord {
        generation,
        mark: "mark".to_owned(),
        tied_to: None,
        runner: program("runner"),
        sidecar: program("sidecar"),
    }
}

fn exit(generation: u32, how: Exit) -> ExitRecord {
    ExitRecord {
        generation,
        at: SystemTime::UNIX_EPOCH + Duration::new(1_000, 5),
        how,
        message: None,
    }
}

fn made(sessions: &Path) -> SessionFolder {
    let folder = SessionFolder::of(sessions, &id("session-0001"));
    folder.create(&id("session-0001")).unwrap();
    folder
}

#[test]
fn ids_that_are_no_plain_names_stay_inside() {
    let sessions = Path::new("/s");
    for (text, plain) in [
        ("0199aabb-ccdd-7eef-8001-223344556677", true),
        ("../../etc/passwd", false),
        (".new-something", false),
        ("UPPER-CASE", false),
        ("-rf-something", false),
        ("ünïcödé8", false),
    ] {
        let folder = SessionFolder::of(sessions, &id(text));
        assert_eq!(folder.path().parent(), Some(sessions), "{text}");
        assert_eq!(folder.path().ends_with(text), plain, "{text}");
    }
}

proptest! {
    #[test]
    fn folder_names_differ_as_ids_do(one in "[^ \t\r\n]{8,70}", two in "[^ \t\r\n]{8,70}") {
        let (Ok(one), Ok(two)) = (SessionId::parse(one), SessionId::parse(two)) else {
            return Ok(());
        };
        prop_assert_eq!(one == two, folder_name(&one) == folder_name(&two));
        prop_assert!(!folder_name(&one).contains('/') && !folder_name(&one).starts_with('.'));
    }
}

#[test]
fn records_of_another_generation_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    for how in [Exit::Code(3), Exit::Signal(9), Exit::Lost(true)] {
        folder.write_exit(&exit(1, how)).unwrap();
        assert_eq!(folder.exit(1).unwrap(), Some(exit(1, how)));
        assert_eq!(folder.exit(2).unwrap(), None);
    }
}

#[test]
fn a_new_run_forgets_the_last_but_keeps_spool_and_workspace() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    folder.prepare(&record(0)).unwrap();
    folder.write_exit(&exit(0, Exit::Code(0))).unwrap();
    for file in [
        folder.started(),
        folder.spool().join("m"),
        folder.workspace().join("w"),
    ] {
        fs::write(file, "x").unwrap();
    }
    fs::write(folder.termination_log(), "went wrong\n").unwrap();
    assert!(folder.started_at().is_some());
    assert_eq!(folder.last_words().as_deref(), Some("went wrong"));

    folder.prepare(&record(1)).unwrap();

    assert_eq!(folder.run().unwrap(), Some(record(1)));
    assert_eq!(folder.exit(0).unwrap(), None);
    assert_eq!(folder.started_at(), None);
    assert_eq!(folder.last_words(), None);
    assert!(folder.spool().join("m").exists() && folder.workspace().join("w").exists());
}

#[test]
fn nobody_else_may_read_any_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    folder.prepare(&record(0)).unwrap();
    let credentials = Credentials {
        token: Token::new("token", None).unwrap(),
        session_key: SessionKey::from_text("key").unwrap(),
        root: KeyId::from_bytes([2; 8]),
        generation: 0,
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
    let times = folder.write_credentials(&credentials, now).unwrap();
    assert_eq!(folder.token_times().unwrap(), Some(times));
    open_log(&folder.runner_log()).unwrap();
    folder.open_lock().unwrap();

    let mut unseen = vec![folder.path().to_owned()];
    while let Some(path) = unseen.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_symlink() {
            continue;
        }
        let mode = metadata.permissions().mode() & 0o777;
        assert_eq!(
            mode,
            if metadata.is_dir() { 0o700 } else { 0o600 },
            "{}",
            path.display()
        );
        if metadata.is_dir() {
            unseen.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
}

#[test]
fn a_deleted_secret_has_no_times() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    let credentials = Credentials {
        token: Token::new("token", None).unwrap(),
        session_key: SessionKey::from_text("key").unwrap(),
        root: KeyId::from_bytes([2; 8]),
        generation: 0,
    };
    folder
        .write_credentials(&credentials, SystemTime::UNIX_EPOCH)
        .unwrap();
    fs::remove_dir_all(folder.secret().folder()).unwrap();
    assert_eq!(folder.token_times().unwrap(), None);
}

#[test]
fn half_made_and_half_removed_folders_go() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    for name in [".new-1", ".gone-1"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let found = SessionFolder::all(dir.path()).unwrap();
    assert_eq!(found, std::slice::from_ref(&folder));
    assert!(!dir.path().join(".gone-1").exists());
    folder.remove().unwrap();
    folder.remove().unwrap();
    assert_eq!(SessionFolder::all(dir.path()).unwrap(), []);
}

#[test]
fn a_lock_is_seen_while_it_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    assert!(!folder.is_locked().unwrap());
    let lock = folder.open_lock().unwrap();
    lock.try_lock().unwrap();
    assert!(folder.is_locked().unwrap());
    drop(lock);
    assert!(!folder.is_locked().unwrap());
}

#[test]
fn a_claim_touches_nothing_of_a_run_that_lives_or_lived() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    let lock = folder.claim(&record(1)).unwrap().unwrap();
    fs::write(folder.started(), "x").unwrap();
    for generation in [1, 2] {
        assert!(folder.claim(&record(generation)).unwrap().is_none());
    }
    assert_eq!(folder.run().unwrap(), Some(record(1)));
    assert!(folder.started().exists());
    drop(lock);

    folder.write_exit(&exit(1, Exit::Code(0))).unwrap();
    assert!(folder.claim(&record(1)).unwrap().is_none());
    assert_eq!(folder.exit(1).unwrap(), Some(exit(1, Exit::Code(0))));
    assert!(folder.claim(&record(2)).unwrap().is_some());
    assert_eq!(folder.run().unwrap(), Some(record(2)));
}

#[test]
fn no_error_about_a_record_tells_the_id() {
    let dir = tempfile::tempdir().unwrap();
    let folder = made(dir.path());
    let malformed = r#"{"generation": "session-0001"}"#;
    for file in ["run.json", "shim.json", "exit.json", "session.json"] {
        fs::write(folder.path().join(file), malformed).unwrap();
    }
    let errors = [
        folder.run().unwrap_err(),
        folder.shim(0).unwrap_err(),
        folder.exit(0).unwrap_err(),
        folder.session().unwrap_err(),
    ];
    for error in errors {
        assert!(is_malformed(&error));
        let text = format!("{error} {error:?}");
        assert!(!text.contains("session-0001"), "{text}");
        assert!(text.contains(".json is malformed at line 1"), "{text}");
    }
    assert_eq!(
        folder.hash().to_string(),
        id("session-0001").hash().to_string()
    );
}
