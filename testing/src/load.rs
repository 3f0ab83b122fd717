//! A load generator for HTTP/1.1 on loopback that costs little itself, as it shares its cores with
//! the server.
//!
//! Requests are whole byte strings that were made before; each connection sends one and reads its
//! answer before the next. With a rate it is open-loop: a request has a time at which it is due,
//! and when all connections are busy then, the wait counts as latency, as it would for a real
//! client. Without a rate it sends as fast as answers come.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use crate::siege::connect;

/// Longest wait for one answer; longer counts as broken.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;

/// What to send, and how fast.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The server.
    pub address: SocketAddr,
    /// The clients' own address; none: as the system chooses.
    pub from: Option<IpAddr>,
    /// The requests, sent in turn. When `again` is false, each is sent once at most.
    pub requests: Arc<Vec<Vec<u8>>>,
    /// Whether to start with the first request again after the last.
    pub again: bool,
    /// Connections, each with one request under way at most.
    pub connections: usize,
    /// Requests a second; none: as fast as answers come.
    pub rate: Option<f64>,
    /// How long to send.
    pub duration: Duration,
}

/// What came of it.
#[derive(Default)]
pub struct Outcome {
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Requests whose connection broke or whose answer was malformed or too late.
    pub broken: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Of all answers, in no order.
    latencies: Vec<Duration>,
}

impl Outcome {
    /// Answers a second.
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let answers = self.latencies.len() as f64;
        answers / self.elapsed.as_secs_f64()
    }

    /// Whether every request was answered with 200.
    pub fn all_ok(&self) -> bool {
        self.broken == 0 && self.statuses.keys().all(|status| *status == 200)
    }

    /// The latency that this part of the answers did not exceed, such as 0.99; zero when there is
    /// no answer.
    pub fn percentile(&mut self, part: f64) -> Duration {
        percentile(&mut self.latencies, part)
    }

    fn merge(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.broken += other.broken;
        self.latencies.extend(other.latencies);
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcome")
            .field("statuses", &self.statuses)
            .field("broken", &self.broken)
            .field("elapsed", &self.elapsed)
            .finish_non_exhaustive()
    }
}

/// The value that this part of the values does not exceed (nearest rank); zero of none.
pub fn percentile(values: &mut [Duration], part: f64) -> Duration {
    values.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "counts far below 2^52, and a part from 0 to 1"
    )]
    let rank = (values.len() as f64 * part).ceil() as usize;
    let index = rank.clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or_default()
}

/// Carries out a plan.
pub async fn run(plan: Plan) -> Outcome {
    let begin = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..plan.connections {
        workers.spawn(work(plan.clone(), begin, Arc::clone(&next)));
    }
    let mut outcome = Outcome::default();
    while let Some(done) = workers.join_next().await {
        outcome.merge(done.expect("a worker does not panic"));
    }
    outcome.elapsed = begin.elapsed();
    outcome
}

async fn work(plan: Plan, begin: Instant, next: Arc<AtomicU64>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut connection = None;
    let mut buffer = Vec::with_capacity(16 * 1024);
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let index = usize::try_from(number).expect("a 64-bit machine");
        if !plan.again && index >= plan.requests.len() {
            return outcome;
        }
        let Some(started) = start_of(number, &plan, begin).await else {
            return outcome;
        };
        let request = &plan.requests[index % plan.requests.len()];
        let answer = timeout(
            ANSWER_TIMEOUT,
            exchange(&mut connection, &plan, request, &mut buffer),
        );
        if let Ok(Ok(status)) = answer.await {
            outcome.latencies.push(started.elapsed());
            *outcome.statuses.entry(status).or_default() += 1;
        } else {
            outcome.broken += 1;
            connection = None;
        }
    }
}

/// Waits until a request is due and gives the moment from which its latency counts; none when the
/// time is over.
async fn start_of(number: u64, plan: &Plan, begin: Instant) -> Option<Instant> {
    let now = Instant::now();
    let Some(rate) = plan.rate else {
        return (now < begin + plan.duration).then_some(now);
    };
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    let due = begin + Duration::from_secs_f64(number as f64 / rate);
    if due >= begin + plan.duration {
        return None;
    }
    if due <= now {
        // All connections were busy: the wait is the server's.
        return Some(due);
    }
    tokio::time::sleep_until(due.into()).await;
    // A timer that fires late is not.
    Some(Instant::now())
}

/// Sends a request and reads its answer, over the connection that is there or a new one.
async fn exchange(
    connection: &mut Option<TcpStream>,
    plan: &Plan,
    request: &[u8],
    buffer: &mut Vec<u8>,
) -> io::Result<u16> {
    if connection.is_none() {
        let new = match plan.from {
            Some(from) => connect(plan.address, from).await?,
            None => TcpStream::connect(plan.address).await?,
        };
        new.set_nodelay(true)?;
        *connection = Some(new);
    }
    let stream = connection.as_mut().ok_or(io::ErrorKind::NotConnected)?;
    stream.write_all(request).await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 || buffer.len() > MAX_ANSWER {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(answer) = Answer::parse(buffer)? {
            if answer.closes {
                *connection = None;
            }
            return Ok(answer.status);
        }
    }
}

struct Answer {
    status: u16,
    closes: bool,
}

impl Answer {
    /// None while it is not complete. Only answers with a `Content-Length`: our servers' all have
    /// one.
    fn parse(bytes: &[u8]) -> io::Result<Option<Self>> {
        let Some(head_end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            return Ok(None);
        };
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        let head = std::str::from_utf8(&bytes[..head_end]).map_err(|_| malformed())?;
        let status = head.get(9..12).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(malformed)?;
        let header = |name: &str| {
            head.split("\r\n").skip(1).find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let length = header("content-length").and_then(|length| length.parse::<usize>().ok());
        let length = length.ok_or_else(malformed)?;
        if bytes.len() < head_end + 4 + length {
            return Ok(None);
        }
        let closes = header("connection").is_some_and(|it| it.eq_ignore_ascii_case("close"));
        Ok(Some(Self { status, closes }))
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, http::StatusCode, routing::get};
    use tokio::net::TcpListener;

    use super::*;

    async fn server(answer: StatusCode, after: Duration) -> (SocketAddr, JoinSet<()>) {
        let app = Router::new().route(
            "/",
            get(move || async move {
                tokio::time::sleep(after).await;
                (answer, "body")
            }),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        (address, tasks)
    }

    fn plan(address: SocketAddr, requests: usize) -> Plan {
        Plan {
            address,
            from: None,
            requests: Arc::new(vec![
                b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
                requests
            ]),
            again: false,
            connections: 4,
            rate: None,
            duration: Duration::from_secs(20),
        }
    }

    #[tokio::test]
    async fn each_request_is_sent_once_and_its_status_counted() {
        let (address, _tasks) = server(StatusCode::IM_A_TEAPOT, Duration::ZERO).await;
        let outcome = run(plan(address, 100)).await;
        assert_eq!(outcome.statuses, BTreeMap::from([(418, 100)]));
        assert_eq!(outcome.broken, 0);
        assert!(!outcome.all_ok());
    }

    #[tokio::test]
    async fn waiting_for_a_busy_connection_counts_as_latency() {
        let (address, _tasks) = server(StatusCode::OK, Duration::from_millis(50)).await;
        let mut outcome = run(Plan {
            connections: 1,
            rate: Some(100.0),
            ..plan(address, 10)
        })
        .await;
        assert!(outcome.all_ok());
        // The last was due after 90 ms, and answered after 500 ms.
        assert!(outcome.percentile(1.0) >= Duration::from_millis(300));
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut values: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&mut values, 0.5), Duration::from_millis(50));
        assert_eq!(percentile(&mut values, 0.99), Duration::from_millis(99));
        assert_eq!(percentile(&mut values, 1.0), Duration::from_millis(100));
        assert_eq!(percentile(&mut [], 0.5), Duration::ZERO);
    }
}
