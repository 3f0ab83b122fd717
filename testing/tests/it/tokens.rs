//! Tokens stay fresh by pull and by push, and by either alone.

use std::collections::BTreeSet;

use ambient_shared::phase::Phase;
use ambient_testing::{
    faults::{Mode, Relay},
    local::{Local, NewSession, Setup},
};

/// Life of the tokens in these tests: several pass in a minute, and each is renewed two seconds
/// before its end, which a slow machine may need.
const TTL: [&str; 2] = ["--token-ttl", "10s"];

/// Reads the `exp` of the token file each second for a minute, and says `exp NOW EXP`: what time it
/// was before it read.
const WATCH_EXP: &str = r#"
    second=0
    while [ "$second" -lt 60 ]; do
        now=$(date +%s)
        payload=$(cut -d. -f2 "$AMBIENT_TOKEN_FILE" | tr '_-' '/+')
        while [ $((${#payload} % 4)) -ne 0 ]; do payload="$payload="; done
        exp=$(printf %s "$payload" | base64 -d | sed -E 's/.*"exp":([0-9]+).*/\1/')
        echo "exp $now $exp"
        second=$((second + 1))
        sleep 1
    done"#;

/// Waits for the session's end and checks each second of its minute.
async fn assert_always_fresh(local: &Local, id: &str, ways: &str) {
    local.message(id, "assistant", "exp ").await;
    // The agent's minute, in two halves, as each wait has a deadline of its own.
    while local.texts(id, "assistant").await.len() < 50 {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let session = local.session(id).await;
        assert_eq!(
            session.phase.as_deref(),
            Some("Running"),
            "{ways}: {session:?}"
        );
    }
    local.phase(id, Phase::Completed).await;

    let seen: Vec<(u64, u64)> = local
        .texts(id, "assistant")
        .await
        .iter()
        .map(|line| {
            let mut words = line.split(' ').skip(1).map(str::parse);
            match (words.next(), words.next()) {
                (Some(Ok(now)), Some(Ok(exp))) => (now, exp),
                _ => panic!("{ways}: not a line of the agent: {line:?}"),
            }
        })
        .collect();
    assert_eq!(seen.len(), 60, "{ways}: each second is seen once");
    for (now, exp) in &seen {
        assert!(
            now < exp,
            "{ways}: expired at {exp}, read at {now}: {seen:?}"
        );
    }
    let different: BTreeSet<_> = seen.iter().map(|(_, exp)| exp).collect();
    assert!(different.len() >= 5, "{ways}: hardly renewed: {seen:?}");
}

#[tokio::test]
async fn token_file_never_holds_an_expired_token() {
    let both = async {
        let local = Local::start(&TTL).await;
        let id = local
            .create(NewSession::script(WATCH_EXP).io("lines"))
            .await;
        assert_always_fresh(&local, &id, "both ways").await;
    };
    let pull = async {
        let local = Local::start(&[TTL[0], TTL[1], "--refresh-interval", "off"]).await;
        let id = local
            .create(NewSession::script(WATCH_EXP).io("lines"))
            .await;
        assert_always_fresh(&local, &id, "pull alone").await;
    };
    let push = async {
        let relay = Relay::start(([127, 0, 0, 1], 9).into()).await;
        relay.set(Mode::Refuse).await;
        let local = Setup::new(&TTL)
            .runner_env(
                "AMBIENT_CP_TOKEN_URL",
                &format!("http://{}/token", relay.address()),
            )
            .start()
            .await;
        let id = local
            .create(NewSession::script(WATCH_EXP).io("lines"))
            .await;
        assert_always_fresh(&local, &id, "push alone").await;
        assert_eq!(relay.accepted(), 0);
    };
    tokio::join!(both, pull, push);
}

#[tokio::test]
async fn endpoint_that_goes_silent_and_comes_back_costs_no_token() {
    let relay = Relay::start(([127, 0, 0, 1], 9).into()).await;
    let local = Setup::new(&["--token-ttl", "8s"])
        .runner_env(
            "AMBIENT_CP_TOKEN_URL",
            &format!("http://{}/token", relay.address()),
        )
        .start()
        .await;
    relay.set_server(local.addresses().token);
    let agent = WATCH_EXP.replace("-lt 60", "-lt 24");
    let id = local.create(NewSession::script(&agent).io("lines")).await;
    local.message(&id, "assistant", "exp ").await;

    // Connections hang rather than fail: the worst kind of silence.
    relay.set(Mode::HalfOpen).await;
    while local.texts(&id, "assistant").await.len() < 14 {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        local.phase(&id, Phase::Running).await;
    }
    relay.set(Mode::Pass).await;
    local.phase(&id, Phase::Completed).await;
    for line in local.texts(&id, "assistant").await {
        let words: Vec<u64> = line
            .split(' ')
            .skip(1)
            .map(|word| word.parse().unwrap())
            .collect();
        assert!(words[0] < words[1], "expired: {line}");
    }
}
