//! `local`: its data folder, its addresses, and what it refuses to start with.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use ambient_shared::phase::Phase;
use ambient_testing::{
    idp::Idp,
    local::{Local, NewSession, Setup},
    ports::Port,
    programs::{Program, Running},
};
use nix::sys::signal::Signal;

const ECHO: &str = r#"while read -r line; do echo "got $line"; done"#;

/// `local` on this folder with any ports.
fn local_on(data: &Path) -> Program {
    Program::new("ambient-control-plane")
        .args(["local", "--api-listen", ":0", "--grpc-listen", ":0"])
        .args(["--token-listen", ":0", "--data-dir"])
        .arg(data)
}

/// Waits until it refuses to start; gives its exit code and the one line that says why.
async fn refused(mut program: Running) -> (i32, String) {
    let status = program.wait().await;
    let log = program.log();
    let why: Vec<_> = log
        .iter()
        .filter(|line| line.starts_with("ambient-control-plane: "))
        .collect();
    assert_eq!(why.len(), 1, "{log:?}");
    assert!(program.output().is_empty(), "{:?}", program.output());
    (status.code().unwrap(), why[0].clone())
}

#[tokio::test]
async fn says_how_to_talk_with_it() {
    let mut local = Local::start(&[]).await;
    let rest = local.addresses().rest;
    local
        .program
        .output_line(&format!("http://{rest}/api/ambient/v1"))
        .await;
    let file = local.data().join("operator-token").display().to_string();
    let line = local.program.output_line("Authorization: Bearer").await;
    assert!(line.contains(&file), "{line}");
    assert!(
        !local
            .program
            .output()
            .concat()
            .contains(&local.operator_token())
    );
}

#[tokio::test]
async fn a_second_local_on_the_folder_is_refused_and_the_first_goes_on() {
    let local = Local::start(&[]).await;
    let (code, why) = refused(local_on(local.data()).start()).await;
    assert_eq!(code, 69, "{why}");
    assert!(why.contains("in use by another local"), "{why}");
    assert!(why.contains(&local.data().display().to_string()), "{why}");
    let id = local
        .create(NewSession::command(&["true"]).io("none"))
        .await;
    local.phase(&id, Phase::Completed).await;
}

#[tokio::test]
async fn keys_token_and_addresses_are_the_same_after_a_restart() {
    let data = tempfile::tempdir().unwrap();
    let mut known = None;
    let mut ports = Vec::new();
    for _ in 0..2 {
        let mut local = local_on(data.path()).start();
        local.output_line("Talk with it").await;
        let seen = (
            local.listening("rest").await,
            local.listening("grpc").await,
            local.listening("endpoint").await,
            fs::read_to_string(data.path().join("operator-token")).unwrap(),
            fs::read_to_string(data.path().join("keypair/public.pem")).unwrap(),
        );
        assert_eq!(*known.get_or_insert(seen.clone()), seen);
        local.kill().await;
        ports.extend([seen.0, seen.1, seen.2].map(Port::keep));
    }
}

#[tokio::test]
async fn nobody_else_can_read_the_data_folder() {
    let local = Local::start(&["--token-ttl", "4s"]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.say(&id, "hello").await;
    local.message(&id, "assistant", "got hello").await;
    let mut unseen = vec![local.data().to_owned()];
    let mut files = 0;
    while let Some(folder) = unseen.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            // Temporary files come and go while we look.
            let Ok(metadata) = fs::symlink_metadata(entry.path()) else {
                continue;
            };
            let mode = metadata.permissions().mode() & 0o777;
            if metadata.is_dir() {
                assert_eq!(mode, 0o700, "{}", entry.path().display());
                unseen.push(entry.path());
            } else if metadata.is_file() {
                files += 1;
                let is_public = ["public.pem", "jwks.json", "sidecar.json", "started"]
                    .iter()
                    .any(|name| entry.file_name() == **name);
                assert!(
                    is_public || mode == 0o600,
                    "{}: {mode:o}",
                    entry.path().display()
                );
            }
        }
    }
    assert!(files > 10, "{files} files");

    let mount = local.file(&id, "bot-token");
    assert_eq!(
        fs::read_link(&mount).unwrap(),
        Path::new("..data/bot-token")
    );
    for secret in ["bot-token", "session-key"] {
        let mode = fs::metadata(local.file(&id, secret))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
}

#[tokio::test]
async fn a_malformed_keypair_is_named_and_kept() {
    let data = tempfile::tempdir().unwrap();
    fs::create_dir(data.path().join("keypair")).unwrap();
    let key = data.path().join("keypair/private.pem");
    fs::write(&key, "not a key").unwrap();
    let (code, why) = refused(local_on(data.path()).start()).await;
    assert_eq!(code, 78, "{why}");
    assert!(why.contains("keypair/private.pem"), "{why}");
    assert_eq!(fs::read_to_string(key).unwrap(), "not a key");
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let data = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--api-listen", "--grpc-listen", "--token-listen"] {
        let mut program = Program::new("ambient-control-plane").args(["local", "--data-dir"]);
        program = program.arg(data.path());
        for each in ["--api-listen", "--grpc-listen", "--token-listen"] {
            program = program.args([each, if each == flag { &address } else { ":0" }]);
        }
        let (code, why) = refused(program.start()).await;
        assert_eq!(code, 69, "{flag}: {why}");
        assert!(why.contains(&address), "{flag}: {why}");
    }
}

#[tokio::test]
async fn a_data_folder_that_cannot_be_made_is_named() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("file");
    fs::write(&file, "").unwrap();
    let (code, why) = refused(local_on(&file.join("data")).start()).await;
    assert_eq!(code, 70, "{why}");
    assert!(why.contains(&file.display().to_string()), "{why}");
}

#[tokio::test]
async fn a_runner_that_is_missing_is_named() {
    // A control plane that lies alone in its folder.
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("ambient-control-plane");
    let binary = ambient_testing::programs::binary("ambient-control-plane");
    if fs::hard_link(&binary, &own).is_err() {
        fs::copy(&binary, &own).unwrap();
    }
    let data = folder.path().join("data");
    let program = Program::at(&own).args(["local", "--data-dir"]).arg(&data);
    let (code, why) = refused(program.start()).await;
    assert_eq!(code, 78, "{why}");
    assert!(why.contains("ambient-runner is missing"), "{why}");
    assert!(!data.exists(), "nothing was started");
}

#[tokio::test]
async fn the_folder_may_be_reached_by_a_link() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("real")).unwrap();
    symlink("real", folder.path().join("link")).unwrap();
    let mut local = local_on(Path::new("link")).folder(folder.path()).start();
    local.listening("endpoint").await;
    assert!(folder.path().join("real/operator-token").exists());
    local.signal(Signal::SIGTERM);
    assert!(local.wait().await.success());
}

#[tokio::test]
async fn a_static_token_serves_sessions_too() {
    let local = Setup::new(&["--cp-token-issuer", "static"])
        .env("AMBIENT_API_TOKEN", "a-static-token")
        .start()
        .await;
    let script =
        r#"read -r line; [ "$(cat "$AMBIENT_TOKEN_FILE")" = a-static-token ] && echo "got $line""#;
    let id = local.create(NewSession::script(script).io("lines")).await;
    local.say(&id, "hello").await;
    // The token itself must not show in messages.
    local.message(&id, "assistant", "got hello").await;
    local.phase(&id, Phase::Completed).await;
}

#[tokio::test]
async fn ctrl_c_ends_local_in_order() {
    let mut local = Local::start(&[]).await;
    local.program.signal(Signal::SIGINT);
    assert_eq!(local.program.wait().await.code(), Some(0));
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn hash_shows_what_logs_show() {
    let mut hash = Program::new("ambient-control-plane")
        .args(["hash", "abc"])
        .start();
    assert!(hash.wait().await.success());
    // printf abc | sha256sum
    assert_eq!(hash.output(), ["ba7816bf8f01"]);
}

#[tokio::test]
async fn an_identity_provider_of_the_user_serves_sessions_and_people() {
    let idp = Idp::start().await;
    let local = Setup::new(&["--cp-token-issuer", "oidc", "--admins", "alice"])
        .env("OIDC_TOKEN_URL", &idp.token_url())
        .env("OIDC_CLIENT_ID", ambient_testing::idp::CLIENT_ID)
        .env("OIDC_CLIENT_SECRET", ambient_testing::idp::CLIENT_SECRET)
        .env("AMBIENT_JWKS", &idp.jwks_url())
        .env("AMBIENT_JWT_ISSUER", &idp.issuer())
        .env("GRPC_SERVICE_ACCOUNT", ambient_testing::idp::CLIENT_ID)
        .start()
        .await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.say(&id, "hello").await;
    local.message(&id, "assistant", "got hello").await;
    assert!(idp.requests() > 0);

    let url = format!(
        "http://{}/api/ambient/v1/sessions/{id}",
        local.addresses().rest
    );
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for (user, status) in [("alice", 200), ("mallory", 404)] {
        let answer = client
            .get(&url)
            .bearer_auth(idp.token_of(user))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status().as_u16(), status, "{user}");
    }
}

#[tokio::test]
async fn an_address_that_sessions_know_is_not_given_up() {
    let data = tempfile::tempdir().unwrap();
    let mut local = local_on(data.path()).start();
    local.output_line("Talk with it").await;
    let rest = local.listening("rest").await;
    let token = fs::read_to_string(data.path().join("operator-token")).unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let session = r#"{"name":"stays","annotations":"{\"ambient-code.io/agent-command\":\"[\\\"sleep\\\",\\\"600\\\"]\"}"}"#;
    let made = client
        .post(format!("http://{rest}/api/ambient/v1/sessions"))
        .bearer_auth(token.trim())
        .body(session)
        .send()
        .await
        .unwrap();
    assert_eq!(made.status(), 201);
    local
        .log_line("the session is started", |line| {
            line["message"] == "session started"
        })
        .await;
    local.kill().await;
    let taken = TcpListener::bind(rest).unwrap();

    let (code, why) = refused(local_on(data.path()).start()).await;

    assert_eq!(code, 69, "{why}");
    assert!(
        why.contains(&rest.to_string()) && why.contains("sessions"),
        "{why}"
    );
    drop(taken);
    let mut again = local_on(data.path()).start();
    assert_eq!(again.listening("rest").await, rest);
    again.kill().await;
    ambient_testing::processes::kill_all(&data.path().display().to_string());
}

#[tokio::test]
async fn metrics_of_the_whole_process_are_served() {
    let local = Local::start(&[]).await;
    let id = local
        .create(NewSession::command(&["true"]).io("none"))
        .await;
    local.phase(&id, Phase::Completed).await;
    let url = format!("http://{}/metrics", local.addresses().rest);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let page = client.get(url).send().await.unwrap().text().await.unwrap();
    assert!(
        page.contains(r#"ambient_control_plane_process_starts_total{result="ok"} 1"#),
        "{page}"
    );
    assert!(!page.contains(&id));
}
