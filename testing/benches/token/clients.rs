//! Sessions of a control plane as clients of its token endpoint.

use std::{net::SocketAddr, time::Duration};

use ambient_shared::{
    bearer::PublicKey,
    clock::Clock,
    phase::Phase,
    proof::{self, SessionKey},
    session::SessionId,
};
use ambient_testing::local::{Local, NewSession, Setup};

/// A control plane with running sessions.
pub(crate) struct Town {
    local: Local,
    public: PublicKey,
    sessions: Vec<(SessionId, SessionKey)>,
}

impl Town {
    /// With so many sessions, and rates limited or not.
    pub(crate) async fn start(sessions: usize, rate_limits: &str) -> Self {
        let local = Setup::new(&["--token-ttl", "15m"])
            .env("CP_RATE_LIMITS", rate_limits)
            .start()
            .await;
        let public = PublicKey::from_pem(&local.public_key()).expect("a public key");
        let mut town = Self {
            local,
            public,
            sessions: Vec::new(),
        };
        for _ in 0..sessions {
            let session = NewSession::command(&["sleep", "3600"]).io("none");
            let id = town.local.create(session).await;
            town.local.phase(&id, Phase::Running).await;
            let key = std::fs::read_to_string(town.local.file(&id, "session-key")).expect("a key");
            let key = SessionKey::from_text(&key).expect("a key");
            town.sessions
                .push((SessionId::parse(id).expect("an id"), key));
        }
        town
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.local.addresses().token
    }

    pub(crate) fn pid(&self) -> u32 {
        self.local.program.pid()
    }

    /// Token requests, each with a ciphertext of its own, the sessions taking turns.
    pub(crate) fn requests(&self, count: usize, more_headers: &str) -> Vec<Vec<u8>> {
        let clock = Clock::system();
        let sessions = self.sessions.iter().cycle().take(count);
        sessions
            .map(|(id, key)| {
                let bearer = self.public.encrypt(id).expect("an id can be encrypted");
                let proof = key.sign(bearer.as_str(), clock.now());
                request(bearer.as_str(), &proof, more_headers)
            })
            .collect()
    }

    /// One ciphertext for each session.
    pub(crate) fn one_each(&self, more_headers: &str) -> Vec<Vec<u8>> {
        self.requests(self.sessions.len(), more_headers)
    }
}

/// A token request; the last argument is whole header lines.
pub(crate) fn request(bearer: &str, proof: &str, more_headers: &str) -> Vec<u8> {
    let header = proof::HEADER;
    format!(
        "GET /token HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n\
         authorization: Bearer {bearer}\r\n{header}: {proof}\r\n{more_headers}\r\n"
    )
    .into_bytes()
}

/// Processor time that a process has used, all its threads counted, those that ended too.
pub(crate) fn processor_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    // proc_pid_stat(5): after the name, which may hold anything, `utime` and `stime` are the 12th
    // and 13th fields, in hundredths of a second.
    let fields = stat.rsplit_once(')').expect("a stat line").1;
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum();
    Duration::from_millis(ticks * 10)
}
