//! The machine's bare RSA-4096 decryptions.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use ambient_shared::{bearer::PublicKey, session::SessionId};
use ambient_testing::keypair::RsaKey;
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Decryptions a second with nothing else to do, by one thread and by as many as there are cores.
pub(crate) fn rsa(duration: Duration) -> (f64, f64) {
    let key = PrivateDecryptingKey::from_pkcs8(&RsaKey::shared().private_pkcs8_der());
    let key = OaepPrivateDecryptingKey::new(key.expect("a key")).expect("a key");
    let public = PublicKey::from_pem(&RsaKey::shared().public_pem()).expect("a key");
    let id = SessionId::parse(uuid::Uuid::now_v7().to_string()).expect("an id");
    let bearer = public.encrypt(&id).expect("an id can be encrypted");
    let ciphertext = STANDARD.decode(bearer.as_str()).expect("base64");
    let rate = |threads: usize| {
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut plain = vec![0; key.min_output_size()];
                    while !stop.load(Ordering::Relaxed) {
                        let clear =
                            key.decrypt(&OAEP_SHA256_MGF1SHA256, &ciphertext, &mut plain, None);
                        assert_eq!(clear.expect("our own ciphertext"), id.as_str().as_bytes());
                        done.fetch_add(1, Ordering::Relaxed);
                        if begin.elapsed() > duration {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let done = done.into_inner() as f64;
        done / begin.elapsed().as_secs_f64()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (rate(1), rate(cores))
}
