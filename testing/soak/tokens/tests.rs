use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde_json::json;

use super::*;

const SESSION: &str = "session-0001";
const LIFE: Duration = Duration::from_secs(120);

fn tokens() -> Tokens {
    let tokens = Tokens {
        state: Mutex::default(),
        findings: Findings::new(),
        clock: Clock::system(),
    };
    tokens.expect(SESSION, 1);
    tokens
}

/// A token of the session, until so long from now.
fn token(session: &str, generation: u32, life: Duration) -> Token {
    let expiry = Clock::system().unix_seconds() + life.as_secs();
    let sub = format!("session:{session}");
    let claims = json!({"sub": sub, "gen": generation, "exp": expiry}).to_string();
    Token::new(&format!("a.{}.b", URL_SAFE_NO_PAD.encode(claims)), None).unwrap()
}

/// All Secrets, with this in the session's.
fn secrets(token: Option<&Token>) -> Value {
    let token = token.map(|it| STANDARD.encode(it.expose()));
    json!({"items": [{
        "metadata": {"labels": {"ambient-code.io/session-id": SESSION}},
        "data": {"api-token": token},
    }]})
}

fn found(tokens: &Tokens) -> String {
    tokens.findings.to_string()
}

#[test]
fn a_session_that_never_had_a_token_is_found() {
    for secrets in [json!({"items": []}), secrets(None)] {
        let tokens = tokens();
        for _ in 1..NO_TOKEN {
            tokens.mounted(&secrets);
            tokens.look(Clock::system().now());
        }
        assert!(!found(&tokens).contains("never had a token"));
        tokens.mounted(&secrets);
        assert!(found(&tokens).contains("never had a token"));
        tokens.mounted(&secrets);
        assert!(found(&tokens).contains("a running session never had a token: 1\n"));
    }
}

#[test]
fn a_session_that_only_fetches_is_found_later() {
    let tokens = tokens();
    tokens.pulled(SESSION, &token(SESSION, 1, LIFE));
    for _ in 1..NO_MOUNTED {
        tokens.mounted(&json!({"items": []}));
    }
    assert_eq!(found(&tokens), "");
    tokens.mounted(&json!({"items": []}));
    assert!(found(&tokens).contains("never had a mounted token"));
}

#[test]
fn a_mounted_token_of_another_session_or_run_is_found_if_it_stays() {
    for wrong in [token("session-0002", 1, LIFE), token(SESSION, 0, LIFE)] {
        let tokens = tokens();
        tokens.mounted(&secrets(Some(&wrong)));
        tokens.mounted(&secrets(Some(&token(SESSION, 1, LIFE))));
        for _ in 1..NOT_ITS_OWN {
            tokens.mounted(&secrets(Some(&wrong)));
        }
        assert_eq!(found(&tokens), "");
        assert_eq!(tokens.lock().mounted, 1);
        tokens.mounted(&secrets(Some(&wrong)));
        assert!(found(&tokens).contains("a mounted token is not the run's"));
    }
    let opaque = Token::new("opaque", None).unwrap();
    let tokens = tokens();
    for _ in 0..NOT_ITS_OWN {
        tokens.mounted(&secrets(Some(&opaque)));
    }
    assert!(found(&tokens).contains("it is no JWT"));
}

#[test]
fn only_expired_tokens_are_found_with_session_and_time() {
    let tokens = tokens();
    tokens.mounted(&secrets(Some(&token(SESSION, 1, LIFE))));
    tokens.pulled(SESSION, &token(SESSION, 1, LIFE / 2));
    tokens.taken();
    let now = Clock::system().now();
    tokens.look(now + LIFE / 2);
    tokens.judge();
    assert_eq!(found(&tokens), "");

    tokens.look(now + LIFE * 2);
    tokens.judge();
    let hash = SessionHash::of(SESSION).to_string();
    for kind in [
        "a running session held only expired tokens",
        "a session's better token had no life left",
    ] {
        let all = found(&tokens);
        let mut lines = all.lines().skip_while(|line| !line.starts_with(kind));
        assert!(lines.nth(1).unwrap().contains(&hash), "{all}");
    }
}

#[test]
fn that_nothing_was_judged_is_found() {
    let tokens = tokens();
    tokens.judge();
    assert!(found(&tokens).contains("nothing was judged: 2\n"));
}
