#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a measurement that cannot be made is a failure that shows the scene"
)]
//! Token exchanges per second and their latency, against the real control plane.
//!
//! In the same run, on the same cores: a server of the same kind that answers a constant, which is
//! what HTTP alone costs, and the machine's bare RSA-4096 decryptions.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ambient_shared::{
    bearer::PublicKey, clock::Clock, proof, proof::SessionKey, session::SessionId, telemetry,
};
use ambient_testing::{
    keypair::RsaKey,
    load::{self, Outcome, Plan},
    local::{NewSession, Setup},
    programs::{Program, Running},
    table::{Table, machine, milliseconds},
};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey};
use axum::{Json, Router, routing::get};
use clap::Parser;
use serde_json::json;
use tokio::net::TcpListener;

/// Measures token exchanges.
#[derive(Debug, Parser)]
struct Settings {
    /// How long each load runs; below a minute, as proofs are made before it.
    #[arg(long, default_value = "10s", value_parser = ambient_shared::settings::parse_duration)]
    duration: Duration,
    /// Connections at once.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Sessions that exchange.
    #[arg(long, default_value_t = 8)]
    sessions: usize,
    /// Only serve the constant answer; how this program starts itself.
    #[arg(long, hide = true)]
    constant: bool,
}

/// One session as a client of the token endpoint.
struct Client {
    id: SessionId,
    key: SessionKey,
}

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    if settings.constant {
        serve_constant().await;
        return;
    }
    println!("machine: {}\n", machine());
    let mut table = Table::new(&[
        "load", "offered", "answered", "p50", "p99", "p99.9", "not 200",
    ]);

    let (one, all) = tokio::task::spawn_blocking(bare_rsa).await.expect("RSA");
    for (threads, rate) in [("1 thread", one), ("all cores", all)] {
        let name = format!("bare RSA-4096 decryption, {threads}");
        let rate = format!("{rate:.0}/s");
        let none = String::new;
        table.row(&[name, none(), rate, none(), none(), none(), none()]);
    }

    let (server, address) = constant().await;
    let request = vec![request("constant", "v1 0 none")];
    measure(
        &mut table,
        "constant answer",
        &settings,
        address,
        true,
        || request.clone(),
    )
    .await;
    drop(server);

    let local = Setup::new(&["--token-ttl", "15m"])
        .env("CP_RATE_LIMITS", "off")
        .start()
        .await;
    let key = PublicKey::from_pem(&local.public_key()).expect("a public key");
    let mut clients = Vec::new();
    for _ in 0..settings.sessions {
        let session = NewSession::command(&["sleep", "3600"]).io("none");
        let id = local.create(session).await;
        local
            .phase(&id, ambient_shared::phase::Phase::Running)
            .await;
        let text = std::fs::read_to_string(local.file(&id, "session-key")).expect("a key");
        clients.push(Client {
            key: SessionKey::from_text(&text).expect("a key"),
            id: SessionId::parse(id).expect("an id"),
        });
    }

    let address = local.addresses().token;
    let repeated = || requests(&key, &clients, clients.len());
    measure(
        &mut table,
        "repeated ciphertexts",
        &settings,
        address,
        true,
        repeated,
    )
    .await;
    // Twice what bare RSA could do: more than can be used up.
    let enough = (all * settings.duration.as_secs_f64() * 2.0).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of some ten thousand"
    )]
    let fresh = || requests(&key, &clients, enough as usize);
    measure(
        &mut table,
        "new ciphertexts",
        &settings,
        address,
        false,
        fresh,
    )
    .await;
    println!("{table}");
}

/// As fast as answers come, then open-loop at 70 % of that.
async fn measure(
    table: &mut Table,
    name: &str,
    settings: &Settings,
    address: SocketAddr,
    again: bool,
    requests: impl Fn() -> Vec<Vec<u8>>,
) {
    let plan = |duration, rate| Plan {
        address,
        requests: Arc::new(requests()),
        again,
        connections: settings.connections,
        rate,
        duration,
    };
    if again {
        load::run(plan(Duration::from_secs(2), None)).await;
    }
    let mut most = load::run(plan(settings.duration, None)).await;
    row(table, name, "most", &mut most);
    let rate = most.rate() * 0.7;
    let mut steady = load::run(plan(settings.duration, Some(rate))).await;
    row(table, name, &format!("{rate:.0}/s"), &mut steady);
}

fn row(table: &mut Table, name: &str, offered: &str, outcome: &mut Outcome) {
    let other: u64 = outcome
        .statuses
        .iter()
        .filter(|(status, _)| **status != 200)
        .map(|(_, count)| count)
        .sum();
    table.row(&[
        name.to_owned(),
        offered.to_owned(),
        format!("{:.0}/s", outcome.rate()),
        milliseconds(outcome.percentile(0.5)),
        milliseconds(outcome.percentile(0.99)),
        milliseconds(outcome.percentile(0.999)),
        (other + outcome.broken).to_string(),
    ]);
}

/// Token requests, each with a ciphertext of its own, the sessions taking turns.
fn requests(key: &PublicKey, clients: &[Client], count: usize) -> Vec<Vec<u8>> {
    let clock = Clock::system();
    clients
        .iter()
        .cycle()
        .take(count)
        .map(|client| {
            let bearer = key.encrypt(&client.id).expect("an id can be encrypted");
            let proof = client.key.sign(bearer.as_str(), clock.now());
            request(bearer.as_str(), &proof)
        })
        .collect()
}

fn request(bearer: &str, proof: &str) -> Vec<u8> {
    let header = proof::HEADER;
    format!(
        "GET /token HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n\
         authorization: Bearer {bearer}\r\n{header}: {proof}\r\n\r\n"
    )
    .into_bytes()
}

/// Decryptions a second, by one thread and by as many as there are cores.
fn bare_rsa() -> (f64, f64) {
    let key = PrivateDecryptingKey::from_pkcs8(&RsaKey::shared().private_pkcs8_der());
    let key = OaepPrivateDecryptingKey::new(key.expect("a key")).expect("a key");
    let public = PublicKey::from_pem(&RsaKey::shared().public_pem()).expect("a key");
    let id = SessionId::parse(uuid::Uuid::now_v7().to_string()).expect("an id");
    let bearer = public.encrypt(&id).expect("an id can be encrypted");
    let ciphertext =
        base64::Engine::decode(&base64::engine::general_purpose::STANDARD, bearer.as_str())
            .expect("base64");
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
                        if begin.elapsed() > Duration::from_secs(3) {
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

async fn constant() -> (Running, SocketAddr) {
    let exe = std::env::current_exe().expect("a program knows its own path");
    let mut server = Program::at(exe).arg("--constant").start();
    let address = server.listening("constant").await;
    (server, address)
}

/// A token of the length that `minted` has, from the server library that the control plane uses.
async fn serve_constant() {
    telemetry::init_logs(telemetry::LogFormat::Json, "info").expect("logs");
    let token = "x".repeat(700);
    let answer = json!({"token": token, "expires_at": "2030-01-01T00:00:00Z"});
    let app = Router::new().route("/token", get(move || async move { Json(answer.clone()) }));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
    let address = listener.local_addr().expect("an address");
    tracing::info!(%address, port_of = "constant", "listening");
    axum::serve(listener, app).await.expect("serve");
}
