//! Whether a session's tokens stay fresh.

use std::{net::SocketAddr, time::Duration};

use ambient_shared::{clock::Clock, token::Token};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio::time::{Instant, sleep};

use super::site::{Session, Site};

/// How often is looked.
pub const LOOK: Duration = Duration::from_millis(100);

/// A session that runs.
pub async fn running(site: &Site) -> Session<'_> {
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;
    session
}

/// The token in a session's Secret.
pub async fn pushed(session: &Session<'_>) -> Token {
    let secret = session.site.get(&session.secret()).await.unwrap();
    let token = secret["data"]["api-token"].as_str().unwrap();
    let token = String::from_utf8(STANDARD.decode(token).unwrap()).unwrap();
    Token::new(&token, None).unwrap()
}

/// The session holds a token that is valid, by pull and by push, all the while. Both are looked at
/// once at least.
pub async fn stay_fresh(session: &Session<'_>, endpoint: SocketAddr, all_the_while: Duration) {
    let clock = Clock::system();
    let exchange = session.exchange(endpoint).await;
    let began = Instant::now();
    loop {
        let asked_at = clock.now();
        let pulled = exchange.fetch().await.expect("a token");
        assert!(!pulled.is_expired(asked_at), "pulled: {pulled:?}");
        let asked_at = clock.now();
        let pushed = pushed(session).await;
        assert!(!pushed.is_expired(asked_at), "pushed: {pushed:?}");
        if began.elapsed() >= all_the_while {
            return;
        }
        sleep(LOOK).await;
    }
}
