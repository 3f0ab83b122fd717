//! An endpoint with sessions that a test decides on, and clients that speak bytes.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, SystemTime},
};

use ambient_control_plane::{
    endpoint::{ConnectionLimits, Endpoint, EndpointSettings, Parts, Standing, tls::TlsSettings},
    issuer::{IssueError, Issuer, Subject, minted::MintedIssuer},
    keypair::{
        Keyring, Keys,
        decrypting::DecryptingKey,
        signing::{SigningKey, SigningKeys},
    },
};
use ambient_shared::{
    bearer::PublicKey, clock, clock::Clock, proof::SessionRoot, session::SessionId, token::Token,
};
use ambient_testing::{DEADLINE, keypair::RsaKey};
use aws_lc_rs::rsa::KeySize;
use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// A session that may have tokens, started three times before.
pub const ACTIVE: &str = "0198c7a2-active";
/// One that has ended.
pub const ENDED: &str = "0198c7a2-ended";
/// One that nobody knows.
pub const UNKNOWN: &str = "0198c7a2-unknown";
/// One that cannot be told yet.
pub const UNSYNCED: &str = "0198c7a2-unsynced";

/// The life of minted tokens.
pub const LIFE: Duration = Duration::from_secs(900);

/// A running endpoint; ends when dropped.
pub struct Scene {
    pub address: SocketAddr,
    pub keys: Arc<Keys>,
    pub keyring: Keyring,
    pub clock: Clock,
    pub shutdown: CancellationToken,
    pub sessions: Arc<Mutex<HashMap<String, Standing>>>,
    pub running: JoinSet<()>,
    public: PublicKey,
}

/// How the endpoint of a scene differs from one with all checks and no rate limits.
#[derive(Default)]
pub struct Setup {
    pub allow_unproven: bool,
    pub rate_limits: bool,
    pub connections: ConnectionLimits,
    pub tls: Option<TlsSettings>,
    pub issuer: Option<Arc<dyn Issuer>>,
}

impl Setup {
    pub async fn start(self) -> Scene {
        let clock = Clock::manual(clock::from_unix_seconds(2_000_000_000).unwrap());
        let keyring = keyring([5; 32]);
        let keys = keyring.current();
        let minted = MintedIssuer::new(
            keyring.clone(),
            "https://cp.example".to_owned(),
            "ambient-api".to_owned(),
            LIFE,
            clock.clone(),
        );
        let sessions = Arc::new(Mutex::new(HashMap::from([
            (ACTIVE.to_owned(), Standing::Active { generation: 3 }),
            (ENDED.to_owned(), Standing::Inactive),
            (UNSYNCED.to_owned(), Standing::NotSynced),
        ])));
        let known = Arc::clone(&sessions);
        let parts = Parts {
            keys: keyring.clone(),
            issuer: self.issuer.unwrap_or_else(|| Arc::new(minted)),
            standing: Arc::new(move |id: SessionId| {
                let standing = known.lock().unwrap().get(id.as_str()).copied();
                Box::pin(std::future::ready(standing.unwrap_or(Standing::Unknown)))
            }),
            clock: clock.clone(),
        };
        let settings = EndpointSettings {
            listen: "127.0.0.1:0".parse().unwrap(),
            allow_unproven: self.allow_unproven,
            rate_limits: self.rate_limits,
            connections: self.connections,
            tls: self.tls,
        };
        let endpoint = Endpoint::bind(settings, parts).await.unwrap();
        let address = endpoint.address();
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let ends = shutdown.clone();
        running.spawn(async move { endpoint.run(ends).await.unwrap() });
        Scene {
            address,
            public: PublicKey::from_pem(keys.public_pem()).unwrap(),
            keys,
            keyring,
            clock,
            shutdown,
            sessions,
            running,
        }
    }
}

/// Keys of this root.
pub fn keyring(root: [u8; 32]) -> Keyring {
    static SIGNING: OnceLock<String> = OnceLock::new();
    let signing = SIGNING.get_or_init(|| RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem());
    Keyring::new(Keys::new(
        DecryptingKey::from_pem(&RsaKey::shared().private_pkcs1_pem()).unwrap(),
        SessionRoot::new(root),
        SigningKeys::new(SigningKey::from_pem(signing).unwrap(), None, None),
    ))
}

pub fn id(id: &str) -> SessionId {
    SessionId::parse(id).unwrap()
}

impl Scene {
    /// A new ciphertext of this id.
    pub fn bearer(&self, id: &str) -> String {
        let bearer = self.public.encrypt(&self::id(id)).unwrap();
        bearer.as_str().to_owned()
    }

    /// Lines of the two headers for a session's request.
    pub fn headers(&self, id: &str, bearer: &str) -> String {
        self.headers_at(id, bearer, self.clock.now())
    }

    pub fn headers_at(&self, id: &str, bearer: &str, now: SystemTime) -> String {
        let proof = self.keys.session_key(&self::id(id)).sign(bearer, now);
        format!("Authorization: Bearer {bearer}\r\nX-Ambient-Session-Proof: {proof}\r\n")
    }

    /// Asks as this session does, with a new ciphertext.
    pub async fn ask(&self, id: &str) -> Answer {
        let bearer = self.bearer(id);
        self.get(&self.headers(id, &bearer)).await
    }

    /// `GET /token` with these header lines.
    pub async fn get(&self, headers: impl AsRef<[u8]>) -> Answer {
        self.send("GET /token", headers).await
    }

    /// A request with these header lines, on a connection of its own.
    pub async fn send(&self, method_and_path: &str, headers: impl AsRef<[u8]>) -> Answer {
        let mut request = format!("{method_and_path} HTTP/1.1\r\nHost: cp\r\n").into_bytes();
        request.extend(b"Connection: close\r\n");
        request.extend(headers.as_ref());
        request.extend(b"\r\n");
        raw(self.address, &request)
            .await
            .expect("an answer in full")
    }
}

/// A connection that a test keeps.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.expect("connect"))
    }

    pub fn over(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    pub async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.expect("send");
    }

    /// Sends a request with these header lines, and gives the status of the answer.
    pub async fn ask(&mut self, method_and_path: &str, headers: &str) -> u16 {
        self.send(&format!(
            "{method_and_path} HTTP/1.1\r\nHost: cp\r\n{headers}\r\n"
        ))
        .await;
        self.answer().await.expect("an answer in full")
    }

    /// Like [`Client::ask`]; none when the connection is closed, before the request or after it.
    pub async fn try_ask(&mut self, method_and_path: &str) -> Option<u16> {
        let request = format!("{method_and_path} HTTP/1.1\r\nHost: cp\r\n\r\n");
        self.0.write_all(request.as_bytes()).await.ok()?;
        self.answer().await
    }

    /// Reads one answer off the connection; none when it ends before that is complete.
    pub async fn answer(&mut self) -> Option<u16> {
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            let read = timeout(DEADLINE, self.0.read_line(&mut line)).await;
            if read.expect("a line in time").ok()? == 0 {
                return None;
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest.get(..3)?.parse().ok()?;
            } else if let Some(rest) = line.strip_prefix("content-length: ") {
                length = rest.parse().ok()?;
            } else if line.is_empty() {
                break;
            }
        }
        self.0.read_exact(&mut vec![0; length]).await.ok()?;
        Some(status)
    }

    /// Waits until the server closes it without an answer, but for 408.
    pub async fn closed(&mut self) {
        let mut rest = Vec::new();
        let read = timeout(DEADLINE, self.0.read_to_end(&mut rest)).await;
        // A reset closes it too.
        let _ = read.expect("the server closes it");
        let rest = String::from_utf8_lossy(&rest);
        assert!(
            rest.is_empty() || rest.starts_with("HTTP/1.1 408"),
            "{rest}"
        );
    }

    /// Whether the server has not closed it yet; nothing must have been sent on it.
    pub async fn is_open(&mut self) -> bool {
        let read = self.0.fill_buf();
        timeout(Duration::from_millis(1), read).await.is_err()
    }
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(header, _)| header == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON in {self:?}"))
    }
}

/// Sends bytes and reads to the end; none when the connection was closed without an answer.
pub async fn raw(address: SocketAddr, request: &[u8]) -> Option<Answer> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        // The server may answer, and close, before it has read everything.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let answer = timeout(DEADLINE, exchange)
        .await
        .expect("an answer in time");
    parse(&answer)
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(answer).into_owned();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    Some(Answer {
        status,
        headers,
        body: body.to_owned(),
    })
}

/// An issuer that never has a token.
pub struct NoIssuer;

impl Issuer for NoIssuer {
    fn issue<'a>(
        &'a self,
        _: &'a Subject,
        _: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        Box::pin(async {
            Err(IssueError::Unreachable {
                url: "https://idp.example/token".parse().unwrap(),
                source: "down".into(),
            })
        })
    }

    fn life(&self) -> Option<Duration> {
        None
    }
}
