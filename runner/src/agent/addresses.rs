//! Where the sidecar listens: read from its address file, handed to the agent.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::AgentEnvironment;

/// Longest wait for the sidecar, which starts beside the runner.
const LIMIT: Duration = Duration::from_secs(30);

/// How often the file is looked for.
const POLL: Duration = Duration::from_millis(50);

/// Largest address file: three addresses.
const MAX_LENGTH: usize = 4096;

/// The addresses that an agent needs; a sidecar may write more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct SidecarAddresses {
    endpoint: SocketAddr,
    proxy: SocketAddr,
}

/// The sidecar did not say where it listens.
#[derive(Debug, thiserror::Error)]
#[error("no sidecar addresses in {} (AMBIENT_SIDECAR_ADDRESSES) within {}; does the sidecar run?",
    path.display(), humantime::format_duration(LIMIT))]
pub(crate) struct NoSidecar {
    path: PathBuf,
    source: io::Error,
}

impl SidecarAddresses {
    /// Waits for the sidecar's address file, at most 30 s.
    ///
    /// # Errors
    /// When it is not there by then, or is no address file.
    pub(crate) async fn wait(path: PathBuf) -> Result<Self, NoSidecar> {
        let until = Instant::now() + LIMIT;
        loop {
            let read = tokio::fs::read(&path).await;
            match read.and_then(|content| Self::parse(&content)) {
                Ok(addresses) => return Ok(addresses),
                Err(source) if Instant::now() >= until => return Err(NoSidecar { path, source }),
                Err(_) => sleep(POLL).await,
            }
        }
    }

    fn parse(content: &[u8]) -> io::Result<Self> {
        if content.len() > MAX_LENGTH {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(serde_json::from_slice(content)?)
    }

    /// Contract section 3, environment of the agent.
    pub(crate) fn add_to(&self, environment: &mut AgentEnvironment) {
        let Self { endpoint, proxy } = self;
        environment.set("AMBIENT_TOKEN_ENDPOINT", format!("http://{endpoint}/token"));
        environment.set("AMBIENT_PROXY_URL", format!("http://{proxy}"));
        environment.set("AMBIENT_PROXY_GRPC", proxy.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_file_is_json_with_addresses() {
        let file = br#"{"endpoint":"127.0.0.1:1","proxy":"127.0.0.1:2","admin":"127.0.0.1:3"}"#;
        let addresses = SidecarAddresses::parse(file).unwrap();
        assert_eq!(addresses.proxy.port(), 2);
        for broken in [&b""[..], b"{}", br#"{"endpoint":"x","proxy":"y"}"#] {
            assert!(SidecarAddresses::parse(broken).is_err());
        }
        assert!(SidecarAddresses::parse(&[b' '; MAX_LENGTH + 1]).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_sidecar_that_never_comes_is_an_error_that_names_the_file() {
        let error = SidecarAddresses::wait("/nonexistent/addresses".into())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/addresses") && error.contains("30s"));
    }
}
