//! Exchanges a second and their latency, with new and with repeated ciphertexts.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ambient_testing::{
    load::{self, Outcome, Plan},
    table::{Table, milliseconds},
};

use crate::{
    Settings, bare,
    clients::{self, Town, processor_time},
    constant,
};

const CONNECTIONS: [usize; 3] = [1, 16, 256];

/// Rates and processor times of one load, by connections.
struct Measured {
    by_connections: Vec<(f64, Duration)>,
}

pub(crate) async fn measure(settings: &Settings) {
    let mut table = Table::new(&[
        "load",
        "connections",
        "answered",
        "p50",
        "p99",
        "p99.9",
        "server's processor time each",
        "not 200",
    ]);
    let duration = settings.duration;
    let rsa = tokio::task::spawn_blocking(move || bare::rsa(duration / 2));
    let (one, all) = rsa.await.expect("RSA");
    for (threads, rate) in [("1 thread", one), ("all cores", all)] {
        let name = format!("bare RSA-4096 decryption, {threads}");
        let none = String::new;
        let rate = format!("{rate:.0}/s");
        table.row(&[name, none(), rate, none(), none(), none(), none(), none()]);
    }

    let (server, address) = constant::start().await;
    let request = vec![clients::request(&"x".repeat(684), &"x".repeat(58), "")];
    let constant = Load {
        name: "constant answer",
        address,
        pid: server.pid(),
        again: true,
    };
    let constant = constant.measure(&mut table, settings, || request.clone());
    let constant = constant.await;
    drop(server);

    let town = Town::start(settings.sessions, "off").await;
    let load = |name, again| Load {
        name,
        address: town.address(),
        pid: town.pid(),
        again,
    };
    let repeated = load("repeated ciphertexts", true);
    let repeated = repeated.measure(&mut table, settings, || town.one_each(""));
    let repeated = repeated.await;
    // Twice what bare RSA could do: more than can be used up.
    let enough = whole(all * settings.duration.as_secs_f64() * 2.0);
    let new = load("new ciphertexts", false);
    let new = new.measure(&mut table, settings, || town.requests(enough, ""));
    let new = new.await;

    println!("{table}");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    #[expect(clippy::cast_precision_loss, reason = "a count of cores")]
    let bare_time = Duration::from_secs_f64(cores as f64 / all);
    for (index, connections) in CONNECTIONS.into_iter().enumerate() {
        let (rate, time) = repeated.by_connections[index];
        let (base, base_time) = constant.by_connections[index];
        println!(
            "{connections} connections: repeated {} of the constant's rate, its processor time {} \
             of ours",
            percent(rate / base),
            percent(base_time.as_secs_f64() / time.as_secs_f64()),
        );
        let (rate, time) = new.by_connections[index];
        let (base, base_name) = if connections == 1 {
            (one, "1 thread")
        } else {
            (all, "all cores")
        };
        println!(
            "{connections} connections: new {} of the bare rate ({base_name}), its processor time \
             {} of ours",
            percent(rate / base),
            percent(bare_time.as_secs_f64() / time.as_secs_f64()),
        );
    }
    println!();
}

/// One kind of request to one server.
struct Load {
    name: &'static str,
    address: SocketAddr,
    pid: u32,
    again: bool,
}

impl Load {
    /// As fast as answers come, with more and more connections.
    async fn measure(
        self,
        table: &mut Table,
        settings: &Settings,
        requests: impl Fn() -> Vec<Vec<u8>>,
    ) -> Measured {
        let mut by_connections = Vec::new();
        for connections in CONNECTIONS {
            let plan = |duration| Plan {
                address: self.address,
                from: None,
                requests: Arc::new(requests()),
                again: self.again,
                connections,
                rate: None,
                duration,
            };
            if self.again {
                load::run(plan(Duration::from_secs(1))).await;
            }
            let plan = plan(settings.duration);
            let before = processor_time(self.pid);
            let mut outcome = load::run(plan).await;
            let time = processor_time(self.pid).saturating_sub(before);
            let answers: u64 = outcome.statuses.values().sum();
            let each = time / u32::try_from(answers.max(1)).expect("fewer than four billion");
            row(table, self.name, connections, each, &mut outcome);
            by_connections.push((outcome.rate(), each));
        }
        Measured { by_connections }
    }
}

fn row(table: &mut Table, name: &str, connections: usize, each: Duration, outcome: &mut Outcome) {
    let other: u64 = outcome
        .statuses
        .iter()
        .filter(|(status, _)| **status != 200)
        .map(|(_, count)| count)
        .sum();
    table.row(&[
        name.to_owned(),
        connections.to_string(),
        format!("{:.0}/s", outcome.rate()),
        milliseconds(outcome.percentile(0.5)),
        milliseconds(outcome.percentile(0.99)),
        milliseconds(outcome.percentile(0.999)),
        format!("{:.1} µs", each.as_secs_f64() * 1e6),
        (other + outcome.broken).to_string(),
    ]);
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of some ten thousand"
)]
fn whole(number: f64) -> usize {
    number.ceil() as usize
}
