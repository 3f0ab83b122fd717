//! The server that the proxy reaches, and no other.

use std::fmt;

use ambient_shared::exchange::{self, InvalidEndpoint};
use http::uri::{Authority, Parts, PathAndQuery, Scheme, Uri};

/// A server that the proxy may reach: scheme, host, port and, rarely, a path before all paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    scheme: Scheme,
    authority: Authority,
    /// Empty, or starts with `/` and does not end with it.
    prefix: String,
}

/// Why a URL cannot be an upstream's. The URL is left out: it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUpstream {
    /// Not http or https with a host, or with user name and password.
    #[error(transparent)]
    Url(#[from] InvalidEndpoint),
    /// A query or fragment would be lost.
    #[error("a query or fragment is not allowed in it")]
    Query,
}

impl Upstream {
    /// Reads `http://host[:port][/path]`, or https.
    ///
    /// # Errors
    /// [`InvalidUpstream`] says which rule it breaks.
    pub fn parse(text: &str) -> Result<Self, InvalidUpstream> {
        let url = exchange::parse_endpoint(text)?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(InvalidUpstream::Query);
        }
        let host = url.host_str().unwrap_or_default();
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        Ok(Self {
            scheme: if url.scheme() == "https" {
                Scheme::HTTPS
            } else {
                Scheme::HTTP
            },
            authority: authority.parse().map_err(|_| InvalidEndpoint::NotAUrl)?,
            prefix: url.path().trim_end_matches('/').to_owned(),
        })
    }

    /// This server's URI of a path that a client asked for; none when the path is no path, or
    /// would lead out of the prefix.
    pub(crate) fn uri(&self, asked: Option<&PathAndQuery>) -> Option<Uri> {
        let asked = asked.map_or("/", PathAndQuery::as_str);
        if !asked.starts_with('/') {
            return None;
        }
        let path = if self.prefix.is_empty() {
            asked.parse().ok()?
        } else {
            if has_dot_segment(asked) {
                return None;
            }
            format!("{}{asked}", self.prefix).parse().ok()?
        };
        let mut parts = Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).ok()
    }
}

/// `.` and `..`, plain or percent-encoded.
fn has_dot_segment(path_and_query: &str) -> bool {
    let path = path_and_query.split('?').next().unwrap_or_default();
    path.split(['/', '\\']).any(|segment| {
        let plain = segment.to_ascii_lowercase().replace("%2e", ".");
        plain == "." || plain == ".." || plain.contains("%2f") || plain.contains("%5c")
    })
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_upstream_is_reachable() {
        let uri = |upstream: &str, asked: &'static str| {
            let upstream = Upstream::parse(upstream).unwrap();
            upstream
                .uri(Some(&PathAndQuery::from_static(asked)))
                .map(|uri| uri.to_string())
        };
        let some = |uri: &str| Some(uri.to_owned());

        assert_eq!(uri("http://a:1", "/x?y=z"), some("http://a:1/x?y=z"));
        assert_eq!(uri("https://a/base/", "/x"), some("https://a/base/x"));
        assert_eq!(uri("http://a", "//evil/x"), some("http://a//evil/x"));
        assert_eq!(uri("http://a", "*"), None);
        for out in ["/../x", "/a/%2e%2E/x", "/a/.%2e/x", "/..%2fx", "/..\\x"] {
            assert_eq!(uri("https://a/base", out), None, "{out}");
        }
        assert_eq!(
            uri("https://a/base", "/v1..2/x"),
            some("https://a/base/v1..2/x")
        );
    }
}
