//! Rotations of keys in Secrets of a real cluster, step by step.

use std::{sync::Arc, time::Duration};

use ambient_control_plane::{
    backend::{Backend, RunStatus},
    keypair::{
        Ids, KeypairError, KeypairStore as _, Keyring,
        kind::KeyKind,
        reload::Reload,
        rotation::{Rotation, Waits},
        secret::{SecretKeypairStore, change::ChangeError},
    },
};
use ambient_shared::clock::Clock;
use ambient_testing::{DEADLINE, cluster::Cluster};
use futures_util::future::join_all;
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{object, put_secret, store};
use crate::scene::{Changes, Recording};

async fn ids(store: &SecretKeypairStore, kind: KeyKind) -> Ids<String> {
    store.ids(kind).await.unwrap().unwrap().0
}

async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// A replica: its keys, which it reads again until this is dropped.
struct Replica {
    keyring: Keyring,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Replica {
    async fn start(store: &SecretKeypairStore) -> Self {
        let keyring = Keyring::new(store.load_or_create().await.unwrap());
        let replica = uuid::Uuid::new_v4().to_string();
        let reload = Reload::new(store.clone(), keyring.clone(), Clock::system(), &replica);
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(reload.run(shutdown.clone()));
        Self {
            keyring,
            shutdown,
            running,
        }
    }

    /// Completes rotations by what this backend says, with short waits.
    fn lead(&mut self, store: &SecretKeypairStore, backend: &Arc<Recording>) {
        let rotation = Rotation {
            store: store.clone(),
            keyring: self.keyring.clone(),
            backend: Arc::clone(backend) as Arc<dyn Backend>,
            token_life: Some(Duration::from_secs(1)),
            clock: Clock::system(),
            waits: Waits::of(Duration::from_secs(1)),
        };
        let shutdown = self.shutdown.clone();
        self.running
            .spawn(async move { rotation.run(shutdown).await });
    }
}

fn backend() -> Arc<Recording> {
    let observer = Arc::new(|_: &_| {});
    Arc::new(Recording::new(
        observer,
        Duration::from_secs(1),
        Changes::default(),
    ))
}

/// Waits until the rotation of the signing key is complete, which does not depend on runs.
async fn signing_key_is_rotated(store: &SecretKeypairStore) {
    until("the signing key is rotated", || async {
        let now = ids(store, KeyKind::SigningKey).await;
        now.next.is_none() && now.previous.is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_keeps_the_key_before_and_is_not_begun_twice() {
    let (_, store) = store("keys-rotate").await;
    store.load_or_create().await.unwrap();
    for kind in KeyKind::ALL {
        let before = ids(&store, kind).await;
        store.rotate(kind).await.unwrap();
        let after = ids(&store, kind).await;
        if kind == KeyKind::SigningKey {
            assert_eq!(after.current, before.current);
            assert!(after.next.is_some_and(|next| next != before.current));
        } else {
            assert_eq!(after.previous, Some(before.current.clone()));
            assert_ne!(after.current, before.current);
        }

        let again = store.rotate(kind).await.unwrap_err();

        assert!(matches!(again, ChangeError::Underway { .. }), "{again}");
        assert!(again.to_string().contains("being rotated already"));
        // What is there is as it was, and a control plane starts with it.
        assert_eq!(ids(&store, kind).await.previous, after.previous);
    }
    let keys = store.load_or_create().await.unwrap().ids();
    assert!(keys.keypair.previous.is_some() && keys.root.previous.is_some());
    assert!(keys.signing.next.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_who_rotate_at_once_one_does() {
    let (_, store) = store("keys-rotate-race").await;
    store.load_or_create().await.unwrap();
    let before = ids(&store, KeyKind::SessionRoot).await;

    let all = join_all((0..8).map(|_| store.rotate(KeyKind::SessionRoot))).await;

    let done = all.iter().filter(|it| it.is_ok()).count();
    assert_eq!(done, 1, "{all:?}");
    for refused in all.iter().filter_map(|it| it.as_ref().err()) {
        assert!(matches!(refused, ChangeError::Underway { .. }), "{refused}");
    }
    let after = ids(&store, KeyKind::SessionRoot).await;
    assert_eq!(after.previous, Some(before.current));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_somebody_else_or_none_is_not_rotated() {
    let (cluster, store) = store("keys-rotate-theirs").await;
    let missing = store.rotate(KeyKind::Keypair).await.unwrap_err();
    assert!(
        matches!(missing, ChangeError::Keypair(KeypairError::Missing { .. })),
        "{missing}"
    );
    let root = [("root", "0123456789abcdef0123456789abcdef")];
    let theirs = json!({"app.kubernetes.io/managed-by": "vault"});
    let (namespace, name) = ("keys-rotate-theirs", KeyKind::SessionRoot.secret());
    put_secret(cluster, namespace, name, &theirs, &root);
    let before = object(cluster, namespace, "secrets", name);

    let refused = store.rotate(KeyKind::SessionRoot).await.unwrap_err();

    let told = refused.to_string();
    assert!(matches!(refused, ChangeError::Foreign { .. }), "{told}");
    assert!(told.contains("Secret keys-rotate-theirs/ambient-cp-session-root"));
    assert_eq!(object(cluster, namespace, "secrets", name), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_or_malformed_later_leaves_the_keys_in_use() {
    let (cluster, store) = store("keys-later").await;
    let replica = Replica::start(&store).await;
    let before = replica.keyring.current().ids();
    let secret = |name: &str| format!("/api/v1/namespaces/keys-later/secrets/{name}");
    let junk = json!({"data": {"private.pem": "anVuaw=="}});
    let keypair = secret(KeyKind::Keypair.secret());
    let (status, answer) = cluster.request("PATCH", &keypair, Some(&junk));
    assert_eq!(status, 200, "{answer}");
    let signing = secret(KeyKind::SigningKey.secret());
    cluster.request("DELETE", &signing, None);

    // A rotation of the third shows that the others have been read, too.
    store.rotate(KeyKind::SessionRoot).await.unwrap();
    until("the new root is in use", || async {
        replica.keyring.current().ids().root.previous == Some(before.root.current)
    })
    .await;

    let now = replica.keyring.current().ids();
    assert_eq!(now.keypair, before.keypair);
    assert_eq!(now.signing, before.signing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keypair_and_a_root_go_once_no_run_has_them() {
    let (_, store) = store("keys-unused").await;
    let (mut leader, other) = (Replica::start(&store).await, Replica::start(&store).await);
    let backend = backend();
    // As what was started before it was noted with which keys.
    backend.runs("session-0001", 0);
    backend.has_token("session-0001", Duration::ZERO, Duration::from_secs(900));
    let before = leader.keyring.current().ids();
    store.rotate(KeyKind::Keypair).await.unwrap();
    store.rotate(KeyKind::SessionRoot).await.unwrap();
    leader.lead(&store, &backend);
    for replica in [&leader, &other] {
        until("the new keys are in use", || async {
            let now = replica.keyring.current().ids();
            now.keypair.previous == Some(before.keypair.current)
                && now.root.previous == Some(before.root.current)
        })
        .await;
    }
    // That of the signing key waits for longer than these would: it shows that time has passed.
    store.rotate(KeyKind::SigningKey).await.unwrap();
    signing_key_is_rotated(&store).await;
    assert!(ids(&store, KeyKind::Keypair).await.previous.is_some());
    assert!(ids(&store, KeyKind::SessionRoot).await.previous.is_some());

    backend.ends("session-0001", 0);

    for replica in [&leader, &other] {
        until("the old keys are gone", || async {
            let now = replica.keyring.current().ids();
            now.keypair.previous.is_none() && now.root.previous.is_none()
        })
        .await;
    }
    let now = leader.keyring.current().ids();
    assert_ne!(now.keypair.current, before.keypair.current);
    assert_ne!(now.root.current, before.root.current);
    // And now it can be done again.
    store.rotate(KeyKind::SessionRoot).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_while_a_run_cannot_be_seen() {
    let (_, store) = store("keys-unseen").await;
    let mut leader = Replica::start(&store).await;
    let backend = backend();
    backend.set("session-0001", 0, RunStatus::Unknown);
    store.rotate(KeyKind::SessionRoot).await.unwrap();
    store.rotate(KeyKind::SigningKey).await.unwrap();
    leader.lead(&store, &backend);

    // It shows that steps are taken.
    signing_key_is_rotated(&store).await;

    assert!(ids(&store, KeyKind::SessionRoot).await.previous.is_some());
    backend.forget("session-0001");
    until("the old root is gone", || async {
        ids(&store, KeyKind::SessionRoot).await.previous.is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_think_that_they_lead_none_does_harm() {
    let (_, store) = store("keys-two-leaders").await;
    let (mut first, mut second) = (Replica::start(&store).await, Replica::start(&store).await);
    let backend = backend();
    first.lead(&store, &backend);
    second.lead(&store, &backend);
    let before = ids(&store, KeyKind::SigningKey).await;
    for kind in KeyKind::ALL {
        store.rotate(kind).await.unwrap();
    }
    let next = ids(&store, KeyKind::SigningKey).await.next;
    until("all rotations are complete", || async {
        for kind in KeyKind::ALL {
            let now = ids(&store, kind).await;
            if now.previous.is_some() || now.next.is_some() {
                return false;
            }
        }
        true
    })
    .await;
    let now = ids(&store, KeyKind::SigningKey).await;
    assert_eq!(Some(&now.current), next.as_ref());
    assert_ne!(now.current, before.current);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_key_of_a_foreign_secret_is_left_to_who_keeps_it() {
    let (cluster, store): (&Cluster, _) = store("keys-foreign-previous").await;
    let namespace = "keys-foreign-previous";
    let (root, old) = (
        "0123456789abcdef0123456789abcdef",
        "fedcba9876543210fedcba9876543210",
    );
    let theirs = json!({"app.kubernetes.io/managed-by": "vault"});
    let name = KeyKind::SessionRoot.secret();
    let data = [("root", root), ("previous-root", old)];
    put_secret(cluster, namespace, name, &theirs, &data);
    let mut leader = Replica::start(&store).await;
    let before = object(cluster, namespace, "secrets", name);
    store.rotate(KeyKind::SigningKey).await.unwrap();
    leader.lead(&store, &backend());
    signing_key_is_rotated(&store).await;
    assert_eq!(object(cluster, namespace, "secrets", name), before);
}
