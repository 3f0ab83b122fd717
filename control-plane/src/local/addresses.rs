//! Where the servers of local mode listen: sessions that run know the addresses, so they stay.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{
    LocalError,
    folder::{Addresses, DataDir},
};
use crate::{backend::process::folder::SessionFolder, settings::LocalSettings};

/// How long addresses that sessions know are tried, when somebody else has them at the moment.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(5);

/// Where to listen: where asked, and where nothing is asked, where the last `local` on this folder
/// listened, since running sessions know those addresses.
pub(super) async fn asked(
    settings: &LocalSettings,
    data: &DataDir,
) -> Result<Addresses, LocalError> {
    let mut asked = Addresses {
        rest: settings.api_listen.address,
        grpc: settings.grpc_listen.address,
        token: settings.token_listen.address,
    };
    let Some(kept) = data.addresses()? else {
        return Ok(asked);
    };
    let needed = sessions_run(data);
    for (listen, asked, kept) in [
        (settings.api_listen, &mut asked.rest, kept.rest),
        (settings.grpc_listen, &mut asked.grpc, kept.grpc),
        (settings.token_listen, &mut asked.token, kept.token),
    ] {
        let any_port = asked.port() == 0 && asked.ip() == kept.ip();
        if any_port || !listen.asked {
            match free(kept, needed).await {
                Ok(()) => *asked = kept,
                Err(source) if needed => {
                    return Err(LocalError::AddressTaken {
                        address: kept,
                        source,
                    });
                }
                Err(_) => {
                    info!(address = %kept, "address of the last start is in use; another one is taken");
                }
            }
        } else if *asked != kept && needed {
            warn!(
                address = %asked,
                before = %kept,
                "sessions that run were told the address before; they cannot reach this one"
            );
        }
    }
    Ok(asked)
}

/// Whether an address can be bound; waits a little for one that is needed.
async fn free(address: SocketAddr, needed: bool) -> io::Result<()> {
    let patience = if needed {
        ADDRESS_PATIENCE
    } else {
        Duration::ZERO
    };
    let until = Instant::now() + patience;
    loop {
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

fn sessions_run(data: &DataDir) -> bool {
    SessionFolder::all(&data.sessions())
        .unwrap_or_default()
        .iter()
        .any(|folder| folder.is_locked().unwrap_or(true))
}

/// The address under which this machine reaches a listener: one on all addresses is reached over
/// loopback.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = address.ip();
    if !ip.is_unspecified() {
        return address;
    }
    let loopback = if ip.is_ipv4() {
        std::net::Ipv4Addr::LOCALHOST.into()
    } else {
        std::net::Ipv6Addr::LOCALHOST.into()
    };
    SocketAddr::new(loopback, address.port())
}
