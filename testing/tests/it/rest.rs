//! What a user does with nothing but curl.

use ambient_shared::phase::Phase;
use ambient_testing::local::{Local, NewSession};
use reqwest::{Method, StatusCode};
use serde_json::json;

const ECHO: &str = r#"while read -r line; do echo "you said $line"; done"#;

/// curl on the REST API; what it prints.
async fn curl(local: &Local, arguments: &[&str], path: &str) -> String {
    let url = format!("http://{}/api/ambient/v1{path}", local.addresses().rest);
    let mut program = ambient_testing::programs::Program::at("curl")
        .args(["-sS", "--fail-with-body", "-m", "30", "-H"])
        .arg(format!("Authorization: Bearer {}", local.operator_token()))
        .args(arguments)
        .arg(url)
        .start();
    let status = program.wait().await;
    assert!(status.success(), "curl: {status}");
    program.output().join("\n")
}

#[tokio::test]
async fn curl_alone_creates_reads_posts_and_stops() {
    let local = Local::start(&[]).await;
    curl(&local, &["-d", r#"{"name":"trial"}"#], "/projects").await;
    let command = json!(["sh", "-c", ECHO]).to_string();
    let annotations = json!({
        "ambient-code.io/agent-command": command,
        "ambient-code.io/agent-io": "lines",
    });
    let session = json!({"name": "echo", "annotations": annotations.to_string()}).to_string();
    let created = curl(
        &local,
        &["-H", "X-Ambient-Project: trial", "-d", &session],
        "/sessions",
    )
    .await;
    let created: serde_json::Value = serde_json::from_str(&created).unwrap();
    let id = created["id"].as_str().unwrap();
    assert_eq!(created["project_id"], "trial");

    let messages = format!("/sessions/{id}/messages");
    curl(&local, &["-d", r#"{"payload":"hello"}"#], &messages).await;
    local.message(id, "assistant", "you said hello").await;
    let listed = curl(&local, &[], &messages).await;
    assert!(listed.starts_with('['), "{listed}");
    assert!(listed.contains("you said hello"), "{listed}");

    curl(&local, &["-X", "POST"], &format!("/sessions/{id}/stop")).await;
    local.phase(id, Phase::Stopped).await;
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn a_session_that_ended_runs_again_when_started() {
    let local = Local::start(&[]).await;
    let script = r#"echo "resume ${IS_RESUME:-false}""#;
    let id = local.create(NewSession::script(script).io("lines")).await;
    local.phase(&id, Phase::Completed).await;
    local.act(&id, "start").await;
    local.message(&id, "assistant", "resume true").await;
    local.phase(&id, Phase::Completed).await;
    assert_eq!(
        local.texts(&id, "assistant").await,
        ["resume false", "resume true"]
    );
}

#[tokio::test]
async fn how_an_agent_ends_is_the_sessions_phase() {
    let local = Local::start(&[]).await;
    let not_executable = local.data().join("not-executable");
    std::fs::write(&not_executable, "no program").unwrap();
    let not_executable = not_executable.display().to_string();
    let cases: [(&[&str], Phase, &str); 5] = [
        (&["true"], Phase::Completed, ""),
        (&["sh", "-c", "exit 7"], Phase::Failed, "7"),
        (&["/does/not/exist"], Phase::Failed, "127"),
        (&[&not_executable], Phase::Failed, "126"),
        (&["sh", "-c", "kill -KILL $$"], Phase::Failed, "137"),
    ];
    for (command, phase, code) in cases {
        let id = local.create(NewSession::command(command).io("none")).await;
        let session = local.phase(&id, phase).await;
        let conditions = session.conditions.unwrap_or_default();
        assert!(conditions.contains(code), "{command:?}: {conditions}");
    }
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn mistakes_are_answered_with_a_reason() {
    let local = Local::start(&[]).await;
    let id = local
        .create(NewSession::command(&["sleep", "600"]).io("none"))
        .await;
    local.phase(&id, Phase::Running).await;
    let unknown = "/sessions/01890000-0000-7000-8000-000000000000";
    let start = format!("/sessions/{id}/start");
    let cases = [
        (Method::GET, unknown, 404),
        (Method::POST, &start, 409),
        (Method::GET, "/sessions?page=0", 400),
        (Method::GET, "/sessions?search=nonsense%20%3D%201", 400),
        (Method::GET, "/sessions?size=5000", 200),
    ];
    for (method, path, wanted) in cases {
        let (status, answer) = local.request(method, path, None).await;
        assert_eq!(status.as_u16(), wanted, "{path}: {answer}");
        if wanted >= 400 {
            assert_eq!(answer["kind"], "Error", "{path}: {answer}");
            assert_ne!(answer["reason"], "", "{path}: {answer}");
        }
    }
    let (status, _) = local
        .request(Method::DELETE, &format!("/sessions/{id}"), None)
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    // The deletion ends what ran.
    let gone = async {
        while !local.processes().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    let waited = tokio::time::timeout(ambient_testing::DEADLINE, gone).await;
    assert!(waited.is_ok(), "{:#?}", local.processes());
}
