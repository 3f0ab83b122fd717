//! Keys in Secrets of a real cluster, with the rights of production.

use ambient_control_plane::{
    cluster::{ClusterSettings, Fence, connect},
    keypair::{
        KeypairError, KeypairStore as _,
        secret::{Found, SECRETS, SecretKeypairStore},
    },
};
use ambient_shared::{exit::report, session::SessionId};
use ambient_testing::{
    cluster::{CONTROL_PLANE, Cluster},
    keypair::RsaKey,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::permissions;

mod rotation;
mod verb;

/// A namespace in which the control plane may keep keys, and a store there.
async fn store(namespace: &str) -> (&'static Cluster, SecretKeypairStore) {
    let of = namespace.to_owned();
    let cluster = tokio::task::spawn_blocking(move || {
        let cluster = Cluster::shared();
        permissions::grant(cluster);
        permissions::grant_own(cluster, &of);
        cluster
    });
    let cluster = cluster.await.unwrap();
    let settings = ClusterSettings {
        kubeconfig: Some(cluster.kubeconfig(CONTROL_PLANE)),
        project_token_file: None,
    };
    let store = SecretKeypairStore {
        client: connect(&settings, Fence::open()).await.unwrap().own,
        namespace: namespace.to_owned(),
    };
    (cluster, store)
}

fn object(cluster: &Cluster, namespace: &str, kind: &str, name: &str) -> Value {
    let path = format!("/api/v1/namespaces/{namespace}/{kind}/{name}");
    cluster
        .get(&path)
        .unwrap_or_else(|| panic!("there is no {path}"))
}

fn put_secret(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    labels: &Value,
    data: &[(&str, &str)],
) {
    let data: serde_json::Map<_, _> = data
        .iter()
        .map(|(key, value)| ((*key).to_owned(), json!(STANDARD.encode(value))))
        .collect();
    let body = json!({"metadata": {"name": name, "labels": labels}, "data": data});
    let path = format!("/api/v1/namespaces/{namespace}/secrets");
    let (status, answer) = cluster.request("POST", &path, Some(&body));
    assert_eq!(status, 201, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_replicas_that_start_together_get_the_same_keys() {
    let (cluster, store) = store("keys-ten").await;
    for (name, found) in store.look().await.unwrap() {
        assert_eq!(found, Found::Missing, "{name}");
    }

    let all = join_all((0..10).map(|_| store.load_or_create())).await;

    let all: Vec<_> = all.into_iter().map(|keys| keys.unwrap()).collect();
    let id = SessionId::parse("session-0001").unwrap();
    for keys in &all {
        assert_eq!(keys.public_pem(), all[0].public_pem());
        assert_eq!(
            keys.session_key(&id).expose(),
            all[0].session_key(&id).expose()
        );
        assert_eq!(keys.signing().jwks(), all[0].signing().jwks());
    }
    let map = object(cluster, "keys-ten", "configmaps", "ambient-cp-keys");
    for name in SECRETS {
        let secret = object(cluster, "keys-ten", "secrets", name);
        assert_eq!(secret["type"], "Opaque");
        let metadata = &secret["metadata"];
        assert_eq!(metadata["labels"]["app"], "ambient-control-plane");
        let managed_by = &metadata["labels"]["ambient-code.io/managed-by"];
        assert_eq!(managed_by, "ambient-control-plane");
        let owner = &metadata["ownerReferences"][0];
        assert_eq!(owner["kind"], "ConfigMap");
        assert_eq!(owner["uid"], map["metadata"]["uid"]);
    }
    let keypair = object(cluster, "keys-ten", "secrets", "ambient-cp-token-keypair");
    let decoded = |key: &str| {
        let text = keypair["data"][key].as_str().unwrap();
        String::from_utf8(STANDARD.decode(text).unwrap()).unwrap()
    };
    assert!(decoded("private.pem").starts_with("-----BEGIN RSA PRIVATE KEY-----"));
    assert_eq!(decoded("public.pem"), all[0].public_pem());
    for (name, found) in store.look().await.unwrap() {
        assert_eq!(found, Found::Usable, "{name}");
    }

    // Deleting the owner collects them all; the next start makes new ones.
    let owner = "/api/v1/namespaces/keys-ten/configmaps/ambient-cp-keys";
    cluster.request("DELETE", owner, None);
    for name in SECRETS {
        cluster.wait_gone(&format!("/api/v1/namespaces/keys-ten/secrets/{name}"));
    }
    let new = store.load_or_create().await.unwrap();
    assert_ne!(new.public_pem(), all[0].public_pem());
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_secret_is_used_and_ours_gets_its_owner() {
    let (cluster, store) = store("keys-theirs").await;
    let key = RsaKey::shared();
    let pair = [
        ("private.pem", &*key.private_pkcs8_pem()),
        ("public.pem", &*key.public_pem()),
    ];
    let theirs = json!({"app.kubernetes.io/managed-by": "vault"});
    put_secret(
        cluster,
        "keys-theirs",
        "ambient-cp-token-keypair",
        &theirs,
        &pair,
    );
    // As an existing control plane leaves it: ours, without an owner.
    let ours = json!({"app": "ambient-control-plane",
        "ambient-code.io/managed-by": "ambient-control-plane"});
    let root = [("root", "0123456789abcdef0123456789abcdef")];
    put_secret(
        cluster,
        "keys-theirs",
        "ambient-cp-session-root",
        &ours,
        &root,
    );
    let before = object(
        cluster,
        "keys-theirs",
        "secrets",
        "ambient-cp-token-keypair",
    );

    let keys = store.load_or_create().await.unwrap();

    assert_eq!(keys.public_pem(), key.public_pem());
    let after = object(
        cluster,
        "keys-theirs",
        "secrets",
        "ambient-cp-token-keypair",
    );
    assert_eq!(before, after);
    let root = object(cluster, "keys-theirs", "secrets", "ambient-cp-session-root");
    assert_eq!(
        root["metadata"]["ownerReferences"][0]["name"],
        "ambient-cp-keys"
    );
    assert_eq!(
        root["data"],
        json!({"root": STANDARD.encode("0123456789abcdef0123456789abcdef")})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_secret_is_named_and_left_alone() {
    let (cluster, store) = store("keys-malformed").await;
    let data = [("private.pem", "junk"), ("public.pem", "junk")];
    let labels = json!({"ambient-code.io/managed-by": "ambient-control-plane"});
    put_secret(
        cluster,
        "keys-malformed",
        "ambient-cp-token-keypair",
        &labels,
        &data,
    );

    let error = store.load_or_create().await.unwrap_err();

    let told = report(&error);
    assert!(matches!(error, KeypairError::Malformed { .. }), "{told}");
    assert!(
        told.contains("Secret keys-malformed/ambient-cp-token-keypair"),
        "{told}"
    );
    assert!(told.contains("private.pem"), "{told}");
    assert_eq!(report(&store.look().await.unwrap_err()), told);
    let secret = object(
        cluster,
        "keys-malformed",
        "secrets",
        "ambient-cp-token-keypair",
    );
    assert_eq!(secret["data"]["private.pem"], STANDARD.encode("junk"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_without_rights_is_named() {
    let (_, store) = store("keys-refused").await;
    let elsewhere = SecretKeypairStore {
        namespace: "default".to_owned(),
        ..store
    };

    let told = report(&elsewhere.load_or_create().await.unwrap_err());

    assert!(told.contains("ConfigMap default/ambient-cp-keys"), "{told}");
    assert!(told.contains("forbidden"), "{told}");
}
