//! The three ports, and the file that tells others where they are.
//!
//! In: wanted addresses, where port 0 means any, and what an earlier run wrote. Out: listeners on
//! the same ports as before, so that an agent's environment stays true when the sidecar restarts.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use ambient_shared::swap;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::settings::Settings;

/// Largest address file that is read: three addresses, with room.
const MAX_FILE: u64 = 4096;

/// Addresses are no secret.
const FILE_MODE: u32 = 0o644;

/// Open ports.
#[derive(Debug)]
pub(crate) struct Ports {
    /// `GET /token`.
    pub(crate) endpoint: TcpListener,
    /// The proxy.
    pub(crate) proxy: TcpListener,
    /// Health and metrics.
    pub(crate) admin: TcpListener,
}

/// What the address file says.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Addresses {
    endpoint: Option<SocketAddr>,
    proxy: Option<SocketAddr>,
    admin: Option<SocketAddr>,
}

/// Why there is no port, or nobody can find it.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken or not this machine's.
    #[error("{variable}: cannot listen on {address}")]
    Bind {
        /// The setting that asks for it.
        variable: &'static str,
        /// As wanted.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The address file cannot be written.
    #[error("AMBIENT_SIDECAR_ADDRESSES: cannot write {}", path.display())]
    AddressFile {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Opens the ports, then writes the address file, then logs a line for each port. A file that says so
/// already is left alone: a sidecar that starts again needs no room on a full disk.
///
/// # Errors
/// When a port cannot be had or the file not be written.
pub(crate) async fn bind(settings: &Settings) -> Result<Ports, ListenError> {
    let file = settings.address_file.as_deref();
    let kept = file.map(read_kept).unwrap_or_default();
    let named = |variable| {
        move |(address, source)| ListenError::Bind {
            variable,
            address,
            source,
        }
    };
    let ports = Ports {
        endpoint: bind_one("endpoint", settings.endpoint_listen, kept.endpoint)
            .await
            .map_err(named("AMBIENT_ENDPOINT_LISTEN"))?,
        proxy: bind_one("proxy", settings.proxy_listen, kept.proxy)
            .await
            .map_err(named("AMBIENT_PROXY_LISTEN"))?,
        admin: bind_one("admin", settings.admin_listen, kept.admin)
            .await
            .map_err(named("AMBIENT_ADMIN_LISTEN"))?,
    };
    let addresses = Addresses {
        endpoint: ports.endpoint.local_addr().ok(),
        proxy: ports.proxy.local_addr().ok(),
        admin: ports.admin.local_addr().ok(),
    };
    if let Some(path) = file
        && kept != addresses
    {
        write(path, &addresses).map_err(|source| ListenError::AddressFile {
            path: path.to_owned(),
            source,
        })?;
    }
    for (port_of, address) in [
        ("endpoint", addresses.endpoint),
        ("proxy", addresses.proxy),
        ("admin", addresses.admin),
    ] {
        if let Some(address) = address {
            info!(%address, port_of, "listening");
        }
    }
    Ok(ports)
}

/// The error comes with the address that was asked for.
async fn bind_one(
    port_of: &'static str,
    wanted: SocketAddr,
    kept: Option<SocketAddr>,
) -> Result<TcpListener, (SocketAddr, io::Error)> {
    let again =
        kept.filter(|kept| wanted.port() == 0 && kept.port() != 0 && kept.ip() == wanted.ip());
    if let Some(again) = again {
        match TcpListener::bind(again).await {
            Ok(listener) => return Ok(listener),
            Err(error) => warn!(
                address = %again,
                port_of,
                reason = %error,
                "address of the last run is taken; taking another"
            ),
        }
    }
    TcpListener::bind(wanted)
        .await
        .map_err(|source| (wanted, source))
}

/// What an earlier run wrote. Anything else counts as nothing: the file is written anew anyway.
fn read_kept(path: &Path) -> Addresses {
    let small = fs::metadata(path).is_ok_and(|about| about.is_file() && about.len() <= MAX_FILE);
    small
        .then(|| fs::read(path).ok())
        .flatten()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

fn write(path: &Path, addresses: &Addresses) -> io::Result<()> {
    let json = serde_json::to_vec(addresses)?;
    swap::write_atomic(path, &json, FILE_MODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_address_file_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("addresses");
        for junk in ["", "{", "[1]", r#"{"proxy":"here"}"#, &"x".repeat(5000)] {
            fs::write(&path, junk).unwrap();
            assert!(read_kept(&path).proxy.is_none(), "{junk}");
        }
        assert!(read_kept(dir.path()).proxy.is_none());
        fs::write(&path, r#"{"proxy":"127.0.0.1:7"}"#).unwrap();
        assert_eq!(read_kept(&path).proxy, Some("127.0.0.1:7".parse().unwrap()));
    }

    #[tokio::test]
    async fn a_kept_port_that_is_taken_is_given_up() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let kept = taken.local_addr().unwrap();
        let other = bind_one("proxy", any, Some(kept)).await.unwrap();
        assert_ne!(other.local_addr().unwrap(), kept);
        drop(taken);
        let again = bind_one("proxy", any, Some(kept)).await.unwrap();
        assert_eq!(again.local_addr().unwrap(), kept);
    }
}
