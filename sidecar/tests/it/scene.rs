//! A sidecar with a mounted token, and clients of it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ambient_shared::swap::SecretVolume;
use ambient_testing::{
    DEADLINE,
    programs::{Program, Running},
};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// A running sidecar and what it stands on.
pub struct Scene {
    pub dir: TempDir,
    pub sidecar: Running,
    pub endpoint: SocketAddr,
    pub proxy: SocketAddr,
    pub admin: SocketAddr,
    pub client: Client,
}

/// An upstream where nobody listens.
pub const NOWHERE: &str = "http://127.0.0.1:9";

/// A client that sends what it is told and follows nothing.
pub fn client() -> Client {
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .timeout(DEADLINE)
        .build()
        .unwrap()
}

/// The sidecar with a token file in `dir/secret`, not started yet.
pub fn program(dir: &TempDir, upstream: &str) -> Program {
    Program::new("ambient-sidecar")
        .arg("--token-file")
        .arg(token_file(dir))
        .args(["--upstream", upstream])
}

pub fn token_file(dir: &TempDir) -> PathBuf {
    dir.path().join("secret/bot-token")
}

pub fn volume(dir: &TempDir) -> SecretVolume {
    SecretVolume::new(dir.path().join("secret"))
}

pub fn mount(dir: &TempDir, token: &str) {
    volume(dir)
        .write(&[("bot-token", token.as_bytes()), ("session-key", b"k")])
        .unwrap();
}

impl Scene {
    /// With this token mounted before the start.
    pub async fn with_token(token: &str, upstream: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount(&dir, token);
        let scene = Self::start(program(&dir, upstream), dir).await;
        scene.ready().await;
        scene
    }

    /// Starts a program, whatever is mounted.
    pub async fn start(program: Program, dir: TempDir) -> Self {
        let mut sidecar = program.start();
        Self {
            endpoint: sidecar.listening("endpoint").await,
            proxy: sidecar.listening("proxy").await,
            admin: sidecar.listening("admin").await,
            dir,
            sidecar,
            client: client(),
        }
    }

    pub fn mount(&self, token: &str) {
        mount(&self.dir, token);
    }

    pub fn token(&self, query: &str) -> RequestBuilder {
        self.client
            .get(format!("http://{}/token{query}", self.endpoint))
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("http://{}{path}", self.proxy))
    }

    pub fn post(&self, path: &str) -> RequestBuilder {
        self.client.post(format!("http://{}{path}", self.proxy))
    }

    /// The token that the endpoint gives now.
    pub async fn bare_token(&self) -> (u16, String) {
        let request = self.token("").header("accept", "text/plain");
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Waits until the endpoint gives this token, asking again and again.
    pub async fn serves(&self, token: &str) {
        let started = Instant::now();
        loop {
            let seen = self.bare_token().await;
            if seen.1 == token {
                return;
            }
            assert!(
                started.elapsed() < DEADLINE,
                "serves {seen:?} and not {token}"
            );
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn readiness(&self) -> (u16, String) {
        let url = format!("http://{}/readyz", self.admin);
        let answer = self.client.get(url).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    pub async fn ready(&self) {
        let ready = async {
            while self.readiness().await.0 != 200 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(DEADLINE, ready).await.unwrap();
    }

    /// The value of a metric, labels as the page writes them.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let url = format!("http://{}/metrics", self.admin);
        let page = self.client.get(url).send().await.unwrap();
        let page = page.text().await.unwrap();
        page.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Waits until a metric has this value.
    pub async fn shows(&self, name: &str, value: f64) {
        let shown = async {
            while self.metric(name).await != Some(value) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let in_time = timeout(DEADLINE, shown).await.is_ok();
        assert!(in_time, "{name} never was {value}");
    }

    /// Waits until so many requests are under way on this port.
    pub async fn in_flight(&self, port: &str, requests: u8) {
        let name = format!("ambient_sidecar_requests_in_flight{{port=\"{port}\"}}");
        self.shows(&name, requests.into()).await;
    }

    /// Waits until the file was read so many times more with this result.
    pub async fn reads(&self, result: &str, more: u32) {
        let name = format!("ambient_sidecar_token_reads_total{{result=\"{result}\"}}");
        let before = self.metric(&name).await.unwrap_or_default();
        let read = async {
            while self.metric(&name).await.unwrap_or_default() < before + f64::from(more) {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(DEADLINE, read).await.unwrap();
    }

    /// Log lines so far with this message.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        self.sidecar
            .log()
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| {
                line["message"]
                    .as_str()
                    .is_some_and(|text| text.contains(message))
            })
            .collect()
    }
}

/// Status and text of an answer.
pub async fn read(answer: Response) -> (u16, String) {
    (answer.status().as_u16(), answer.text().await.unwrap())
}
