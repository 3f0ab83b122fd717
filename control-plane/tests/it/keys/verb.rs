//! `ambient-control-plane keys`, as an operator runs it.

use std::collections::BTreeMap;

use ambient_control_plane::keypair::{KeypairStore as _, kind::KeyKind};
use ambient_testing::{
    cluster::{CONTROL_PLANE, Cluster},
    programs::Program,
};
use serde_json::json;

use super::{object, put_secret, store};

/// What it says on stdout, and on stderr, with its exit code.
async fn keys(namespace: &str, words: &[&str]) -> (Option<i32>, String, String) {
    let kubeconfig = Cluster::shared().kubeconfig(CONTROL_PLANE);
    let program = Program::new("ambient-control-plane")
        .env("KUBECONFIG", kubeconfig)
        .env("CP_RUNTIME_NAMESPACE", namespace);
    run(program, words).await
}

async fn run(program: Program, words: &[&str]) -> (Option<i32>, String, String) {
    let mut running = program.arg("keys").args(words).start();
    let code = running.wait().await.code();
    (code, running.output().join("\n"), running.log().join("\n"))
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_shown_and_rotated_and_a_second_rotation_is_refused() {
    let (cluster, store) = store("keys-verb").await;
    let (code, table, log) = keys("keys-verb", &["show"]).await;
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(table.matches("made when a control plane starts").count(), 3);
    store.load_or_create().await.unwrap();
    let mut secrets = BTreeMap::new();
    for kind in KeyKind::ALL {
        let before = store.ids(kind).await.unwrap().unwrap().0;

        let (code, said, log) = keys("keys-verb", &["rotate", kind.as_str()]).await;

        assert_eq!(code, Some(0), "{log}");
        assert!(said.contains("the control plane takes it out"), "{said}");
        let after = store.ids(kind).await.unwrap().unwrap().0;
        let (_, table, _) = keys("keys-verb", &["show"]).await;
        assert!(said.contains(&table), "{said}");
        let row = |which: &str, id: &str| format!("{:12}  {which:8}  {id}", kind.as_str());
        assert!(table.contains(&row("current", &after.current)), "{table}");
        let other = if kind == KeyKind::SigningKey {
            row("next", &after.next.unwrap())
        } else {
            row("previous", &before.current)
        };
        assert!(table.contains(&other), "{table}");

        let (code, said, log) = keys("keys-verb", &["rotate", kind.as_str()]).await;
        assert_eq!((code, said.as_str()), (Some(69), ""), "{log}");
        let last = log.lines().last().unwrap();
        assert!(
            last.contains(&format!("the {kind} is being rotated already")),
            "{log}"
        );
        let data = object(cluster, "keys-verb", "secrets", kind.secret());
        secrets.insert(kind.as_str(), data["data"].clone());
    }
    // What it says holds nothing of a key.
    let (_, table, _) = keys("keys-verb", &["show"]).await;
    for (kind, data) in secrets {
        for (key, value) in data.as_object().unwrap() {
            let start = &value.as_str().unwrap()[..16];
            assert!(!table.contains(start), "{kind} {key}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rotated_is_told_in_a_sentence() {
    let (cluster, _) = store("keys-verb-theirs").await;
    let root = [("root", "0123456789abcdef0123456789abcdef")];
    let theirs = json!({"app.kubernetes.io/managed-by": "vault"});
    let name = KeyKind::SessionRoot.secret();
    put_secret(cluster, "keys-verb-theirs", name, &theirs, &root);
    let ours = json!({"ambient-code.io/managed-by": "ambient-control-plane"});
    let junk = [("private.pem", "junk")];
    let name = KeyKind::SigningKey.secret();
    put_secret(cluster, "keys-verb-theirs", name, &ours, &junk);

    let cases = [
        ("session-root", 78, "is somebody else's"),
        ("keypair", 78, "is not there"),
        ("signing-key", 78, "is malformed"),
        ("all", 78, "keypair"),
    ];
    for (what, expected, sentence) in cases {
        let (code, said, log) = keys("keys-verb-theirs", &["rotate", what]).await;
        assert_eq!(code, Some(expected), "{what}: {log}");
        assert_eq!(said, "", "{what}");
        assert!(log.contains(sentence), "{what}: {log}");
        assert!(!log.contains("junk"), "{log}");
    }
    let namespace = with_a_foreign_root(cluster);
    let (code, table, log) = keys(namespace, &["show"]).await;
    assert_eq!(code, Some(0), "{log}");
    let note = "Secret ambient-cp-session-root is kept by somebody else";
    assert!(table.contains(note), "{table}");
}

/// A namespace with a root of somebody else, and nothing that is malformed.
fn with_a_foreign_root(cluster: &Cluster) -> &'static str {
    let namespace = "keys-verb-noted";
    crate::permissions::grant_own(cluster, namespace);
    let root = [("root", "0123456789abcdef0123456789abcdef")];
    let name = KeyKind::SessionRoot.secret();
    put_secret(cluster, namespace, name, &json!({}), &root);
    namespace
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_cluster_or_without_rights_it_says_so() {
    let (_, _) = store("keys-verb-refused").await;
    let program = Program::new("ambient-control-plane").env("KUBECONFIG", "/does/not/exist");
    let (code, _, log) = run(program, &["show"]).await;
    assert_eq!(code, Some(78), "{log}");
    assert!(log.contains("/does/not/exist"), "{log}");

    let (code, _, log) = keys("default", &["rotate", "keypair"]).await;
    assert_eq!(code, Some(69), "{log}");
    assert!(
        log.contains("cannot read Secret default/ambient-cp-token-keypair"),
        "{log}"
    );
    assert!(log.contains("forbidden"), "{log}");
}
