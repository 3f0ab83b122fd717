//! What must never be seen: tokens and keys anywhere, session ids in logs.

use std::{fs, path::Path};

use ambient_shared::{phase::Phase, session::SessionHash};
use ambient_testing::local::{NewSession, Setup};

#[tokio::test]
async fn no_secret_is_in_a_log_or_an_argument() {
    let local = Setup::new(&["--token-ttl", "4s", "--runner-log-level", "trace"])
        .env("LOG_LEVEL", "trace")
        .start()
        .await;
    let tokens = local.data().join("tokens-seen");
    let script = format!(
        r#"n=0
        while [ "$n" -lt 8 ]; do
            cat "$AMBIENT_TOKEN_FILE" >>'{0}'; echo >>'{0}'
            echo "step $n"; n=$((n + 1)); sleep 1
        done
        tr '\0' '\n' </proc/self/environ"#,
        tokens.display()
    );
    let id = local.create(NewSession::script(&script).io("lines")).await;
    local.phase(&id, Phase::Running).await;
    let arguments: Vec<String> = local
        .processes()
        .into_iter()
        .flat_map(|process| process.arguments)
        .collect();
    local.phase(&id, Phase::Completed).await;

    let mut secrets: Vec<String> = fs::read_to_string(&tokens)
        .unwrap()
        .lines()
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    assert!(secrets.len() >= 4, "the agent saw {} tokens", secrets.len());
    secrets.push(fs::read_to_string(local.file(&id, "session-key")).unwrap());
    secrets.push(local.operator_token());

    let mut places = vec![
        ("arguments".to_owned(), arguments.join(" ")),
        ("log of local".to_owned(), local.program.log().join("\n")),
        (
            "messages (the agent's environment among them)".to_owned(),
            local.texts(&id, "assistant").await.join("\n"),
        ),
    ];
    collect_logs(local.data(), &mut places);
    assert!(places.len() > 3, "runner and sidecar have logs");
    for (place, text) in &places {
        for secret in &secrets {
            assert!(!text.contains(secret.trim()), "a secret is in {place}");
        }
    }

    let hash = SessionHash::of(&id).to_string();
    // A spool holds messages, and the agent has just said its session's id.
    let is_log = |place: &str| place.contains("log") && !place.contains("/spool/");
    let mut shown: Vec<&str> = places
        .iter()
        .filter(|(place, _)| is_log(place))
        .flat_map(|(_, text)| text.lines().filter(|line| line.contains(&id)))
        .collect();
    shown.truncate(20);
    assert!(shown.is_empty(), "the session's id is in {shown:#?}");
    assert!(
        places.iter().any(|(_, text)| text.contains(&hash)),
        "the session's hash is nowhere"
    );
}

fn collect_logs(folder: &Path, places: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            collect_logs(&path, places);
        } else if path.extension().is_some_and(|it| it == "log") {
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            places.push((format!("log {}", path.display()), text));
        }
    }
}
