//! Host names to addresses, the same way in every client.
//!
//! The hosts file is asked first and its answer is final, so that a name which it has for IPv4
//! only costs no AAAA query (seconds, while DNS is dead). Then the name servers that the system is
//! configured with. Without a configuration the name is refused: never is a public resolver asked.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use hickory_resolver::{TokioResolver, net::NetError};
use hyper_util::client::legacy::connect::dns::Name;
use tower::Service;

/// Longest wait for name servers.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Says which name servers to ask (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Resolves names for `reqwest`, `tonic` and `hyper` alike. Clones share the configuration.
#[derive(Clone)]
pub struct Resolver(Arc<Shared>);

struct Shared {
    hosts: PathBuf,
    /// Made when the first name needs it, as many programs only talk to loopback, and again when
    /// the system's configuration has changed.
    system: Mutex<Option<(Option<SystemTime>, TokioResolver)>>,
}

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The system says of no name server.
    #[error("cannot resolve {name:?}: no usable name server in /etc/resolv.conf ({reason})")]
    NotConfigured {
        /// The host name.
        name: String,
        /// What is wrong with the configuration.
        reason: String,
    },
    /// The name servers know of no address, or did not answer.
    #[error("cannot resolve {name:?}")]
    Lookup {
        /// The host name.
        name: String,
        /// What the resolver said.
        source: NetError,
    },
    /// The name servers were silent.
    #[error(
        "cannot resolve {name:?}: no answer within {}",
        humantime::format_duration(LOOKUP_TIMEOUT)
    )]
    Timeout {
        /// The host name.
        name: String,
    },
}

impl Resolver {
    /// The machine's hosts file and name servers.
    pub fn system() -> Self {
        Self::with_hosts("/etc/hosts")
    }

    /// With another hosts file.
    pub fn with_hosts(hosts: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Shared {
            hosts: hosts.into(),
            system: Mutex::new(None),
        }))
    }

    /// All addresses of a host name or IP literal.
    ///
    /// # Errors
    /// When neither the hosts file nor a name server knows it.
    pub async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>, ResolveError> {
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse() {
            return Ok(vec![address]);
        }
        // Read each time: kubelets and people edit it while programs run.
        let hosts = tokio::fs::read_to_string(&self.0.hosts)
            .await
            .unwrap_or_default();
        let known = in_hosts(&hosts, bare);
        if !known.is_empty() {
            return Ok(known);
        }
        if is_localhost(bare) {
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        self.ask_name_servers(bare).await
    }

    /// The system's name servers, as it is configured now: laptops change networks.
    fn name_servers(&self) -> Result<TokioResolver, NetError> {
        let changed = std::fs::metadata(RESOLV_CONF)
            .and_then(|file| file.modified())
            .ok();
        let mut system = self.0.system.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, resolver)) = &*system
            && *known == changed
        {
            return Ok(resolver.clone());
        }
        let resolver =
            TokioResolver::builder_tokio().and_then(hickory_resolver::ResolverBuilder::build)?;
        *system = Some((changed, resolver.clone()));
        Ok(resolver)
    }

    async fn ask_name_servers(&self, name: &str) -> Result<Vec<IpAddr>, ResolveError> {
        let system = self
            .name_servers()
            .map_err(|error| ResolveError::NotConfigured {
                name: name.to_owned(),
                reason: error.to_string(),
            })?;
        match tokio::time::timeout(LOOKUP_TIMEOUT, system.lookup_ip(name)).await {
            Ok(Ok(found)) => Ok(found.iter().collect()),
            Ok(Err(source)) => Err(ResolveError::Lookup {
                name: name.to_owned(),
                source,
            }),
            Err(_) => Err(ResolveError::Timeout {
                name: name.to_owned(),
            }),
        }
    }
}

impl Default for Resolver {
    fn default() -> Self {
        Self::system()
    }
}

/// RFC 6761, section 6.3: `localhost` and names below it are loopback.
pub(crate) fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// The addresses that a hosts file (hosts(5)) gives a name, in the file's order.
fn in_hosts(hosts: &str, name: &str) -> Vec<IpAddr> {
    let name = name.trim_end_matches('.');
    hosts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('#').next()?.split_whitespace();
            let address = fields.next()?.parse().ok()?;
            fields
                .any(|alias| alias.eq_ignore_ascii_case(name))
                .then_some(address)
        })
        .collect()
}

type Addresses = Box<dyn Iterator<Item = SocketAddr> + Send>;
type Resolving<A, E> = Pin<Box<dyn Future<Output = Result<A, E>> + Send>>;

impl reqwest::dns::Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let found = Resolver::resolve(&resolver, name.as_str()).await?;
            // Port 0: the client puts in that of the URL.
            let addresses: Addresses =
                Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Resolving<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolver = self.clone();
        Box::pin(async move {
            let found = Resolver::resolve(&resolver, name.as_str())
                .await
                .map_err(io::Error::other)?;
            let addresses: Vec<_> = found
                .into_iter()
                .map(|address| SocketAddr::new(address, 0))
                .collect();
            Ok(addresses.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_file_is_read_as_documented() {
        let hosts = "# comment\n127.0.0.1 localhost\n10.0.0.7\tapi.example  API # 10.0.0.8 api\n\
                     bad line\nfd00::7 api.example\n";
        let addresses: Vec<IpAddr> = vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        assert_eq!(in_hosts(hosts, "api.example."), addresses);
        assert_eq!(in_hosts(hosts, "Api"), addresses[..1]);
        assert!(in_hosts(hosts, "line").is_empty());
        assert!(in_hosts(hosts, "10.0.0.7").is_empty());
    }

    #[tokio::test]
    async fn hosts_file_answers_without_dns_and_localhost_always() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        std::fs::write(&hosts, "192.0.2.5 only-v4.test\n").unwrap();
        let resolver = Resolver::with_hosts(&hosts);
        let only_v4: Vec<IpAddr> = vec!["192.0.2.5".parse().unwrap()];
        assert_eq!(resolver.resolve("only-v4.test").await.unwrap(), only_v4);
        assert!(
            resolver
                .resolve("localhost")
                .await
                .unwrap()
                .iter()
                .all(IpAddr::is_loopback)
        );
        let v6: Vec<IpAddr> = vec!["::1".parse().unwrap()];
        assert_eq!(resolver.resolve("[::1]").await.unwrap(), v6);
    }
}
