use ambient_shared::{bearer::PublicKey, proof::SessionRoot, session::SessionId};
use ambient_testing::keypair::RsaKey;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::join_all;

use super::*;
use crate::keypair::{
    decrypting::DecryptingKey,
    signing::{SigningKey, SigningKeys},
};

const ID: &str = "session-0001";

struct Fixture {
    pool: Pool,
    keys: Arc<Keys>,
    ciphertext: Vec<u8>,
}

impl Fixture {
    fn new(cores: usize, waiting: usize) -> Self {
        let signing = SigningKey::from_pem(&SigningKey::generate().unwrap()).unwrap();
        let keys = Keys::new(
            DecryptingKey::from_pem(&RsaKey::shared().private_pkcs1_pem()).unwrap(),
            SessionRoot::new([1; 32]),
            SigningKeys::new(signing, None, None),
        );
        let public = PublicKey::from_pem(keys.public_pem()).unwrap();
        let sealed = public.encrypt(&SessionId::parse(ID).unwrap()).unwrap();
        Self {
            pool: Pool::new(cores, waiting),
            ciphertext: STANDARD.decode(sealed.as_str()).unwrap(),
            keys: Arc::new(keys),
        }
    }

    fn open(&self) -> Option<oneshot::Receiver<Opened>> {
        self.pool
            .open(self.ciphertext.clone(), Arc::clone(&self.keys))
    }

    fn waiting(&self) -> usize {
        lock(&self.pool.line).waiting.len()
    }
}

#[tokio::test]
async fn all_in_line_are_served_in_turn_and_threads_end() {
    let fixture = Fixture::new(2, 10);
    let all: Vec<_> = (0..6).map(|_| fixture.open().unwrap()).collect();
    for opened in join_all(all).await {
        assert_eq!(opened.unwrap().unwrap().as_slice(), ID.as_bytes());
    }
    // Counted by the thread that saw nothing left, under the same lock.
    while lock(&fixture.pool.line).working > 0 {
        tokio::task::yield_now().await;
    }
    let again = fixture.open().unwrap().await;
    assert_eq!(again.unwrap().unwrap().as_slice(), ID.as_bytes());
}

#[tokio::test]
async fn a_full_line_refuses_at_once_and_who_leaves_it_makes_room() {
    let fixture = Fixture::new(1, 2);
    // A thread that works for as long as this test likes.
    lock(&fixture.pool.line).working = 1;
    let (first, second) = (fixture.open().unwrap(), fixture.open().unwrap());
    assert!(fixture.open().is_none());

    drop(first);
    let third = fixture.open().unwrap();
    assert_eq!(fixture.waiting(), 2);
    assert!(fixture.open().is_none());

    drop(second);
    lock(&fixture.pool.line).working = 0;
    let fourth = fixture.open().unwrap();
    for opened in [third, fourth] {
        assert!(opened.await.unwrap().is_some());
    }
}
