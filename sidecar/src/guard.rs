//! Who may ask. Loopback is reachable from a browser's pages and from tricked tools too.
//!
//! A page that had its own name resolve to 127.0.0.1 shows that name as `Host`; a page that asks
//! across origins shows `Origin`; and no page can send a header of its own without asking first,
//! which needs `Origin`. So `Host` must be a loopback name, `Origin` is refused, and an operator may
//! demand a header.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::{HeaderName, Method, StatusCode, header, request::Parts};

/// The header that an operator may demand, with the value `true`.
pub(crate) const REQUIRED_HEADER: HeaderName = HeaderName::from_static("x-ambient-request");

/// The checks at the door of both ports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    require_header: bool,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It was sent to a name that is not this machine's own.
    #[error("the host of a request must be a loopback name such as 127.0.0.1 or localhost")]
    Host,
    /// It comes from a browser's page.
    #[error("requests with an Origin header are refused: this port is not for web pages")]
    Origin,
    /// The demanded header is not there.
    #[error("the header X-Ambient-Request: true is missing, which is required here")]
    Header,
    /// CONNECT asks for a tunnel to anywhere, TRACE for an answer with the token in it.
    #[error("the methods CONNECT and TRACE are not served")]
    Method,
}

impl Refusal {
    /// A word for metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Origin => "origin",
            Self::Header => "header",
            Self::Method => "method",
        }
    }

    /// What HTTP says: 501 for methods that we do not know on purpose.
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Host | Self::Origin | Self::Header => StatusCode::FORBIDDEN,
            Self::Method => StatusCode::NOT_IMPLEMENTED,
        }
    }
}

impl Guard {
    /// Checks `Host` and `Origin` always, [`REQUIRED_HEADER`] when told to.
    pub(crate) fn new(require_header: bool) -> Self {
        Self { require_header }
    }

    /// Whether this request may go on.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check(self, request: &Parts) -> Result<(), Refusal> {
        if matches!(request.method, Method::CONNECT | Method::TRACE) {
            return Err(Refusal::Method);
        }
        // HTTP/2 has the name in the target, HTTP/1.1 in `Host` and maybe in the target too.
        let in_target = request.uri.authority().map(|host| host.as_str().as_bytes());
        let in_headers = request.headers.get_all(header::HOST);
        let mut hosts = in_target
            .into_iter()
            .chain(in_headers.iter().map(http::HeaderValue::as_bytes))
            .peekable();
        if hosts.peek().is_none() || !hosts.all(is_loopback_host) {
            return Err(Refusal::Host);
        }
        if request.headers.contains_key(header::ORIGIN) {
            return Err(Refusal::Origin);
        }
        let mut shown = request.headers.get_all(REQUIRED_HEADER).iter();
        if self.require_header && !shown.any(|value| value.as_bytes() == b"true") {
            return Err(Refusal::Header);
        }
        Ok(())
    }
}

/// Whether the text of a `Host` header is a loopback name, with or without a port: `localhost` and
/// names below it (RFC 6761, section 6.3), 127.0.0.0/8, `[::1]`.
fn is_loopback_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else {
        return false;
    };
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return is_port(port)
            && address
                .parse::<Ipv6Addr>()
                .is_ok_and(|address| address.is_loopback());
    }
    let end = host.find(':').unwrap_or(host.len());
    let (name, port) = host.split_at(end);
    if !is_port(port) {
        return false;
    }
    if let Ok(address) = name.parse::<Ipv4Addr>() {
        return address.is_loopback();
    }
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let labels = match name.strip_suffix("localhost") {
        Some("") => return true,
        Some(labels) => labels,
        None => return false,
    };
    labels.strip_suffix('.').is_some_and(|labels| {
        labels.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        })
    })
}

/// Empty, or `:` and a port.
fn is_port(text: &str) -> bool {
    text.is_empty()
        || text.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|byte| byte.is_ascii_digit())
                && (port.is_empty() || port.parse::<u16>().is_ok())
        })
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;

    use super::*;

    fn check(guard: Guard, uri: &str, headers: &[(&str, &str)]) -> Result<(), Refusal> {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        guard.check(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn hosts_are_told_apart() {
        for host in [
            "localhost",
            "LOCALHOST:80",
            "localhost.",
            "agent.localhost:8080",
            "127.0.0.1",
            "127.1.2.3:65535",
            "[::1]",
            "[0:0:0:0:0:0:0:1]:80",
            "127.0.0.1:",
        ] {
            assert!(is_loopback_host(host.as_bytes()), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "evillocalhost",
            "-evil/.localhost",
            ".localhost",
            "a..localhost",
            "127.0.0.1.evil.example",
            "128.0.0.1",
            "127.1",
            "0177.0.0.1",
            "2130706433",
            "0.0.0.0",
            "[::]",
            "[::ffff:127.0.0.1]",
            "::1",
            "[::1",
            "[::1]x",
            "localhost:80@evil.example",
            "localhost@evil.example",
            "evil.example#localhost",
            "localhost:99999",
            "localhost:http",
            "local\u{212a}host",
            " localhost",
        ] {
            assert!(!is_loopback_host(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn every_name_in_a_request_counts() {
        let guard = Guard::new(false);
        let local = ("host", "127.0.0.1:1");
        assert_eq!(check(guard, "/", &[local]), Ok(()));
        assert_eq!(check(guard, "http://localhost/", &[]), Ok(()));
        assert_eq!(check(guard, "/", &[]), Err(Refusal::Host));
        assert_eq!(
            check(guard, "http://evil.example/", &[local]),
            Err(Refusal::Host)
        );
        let two = [local, ("host", "evil.example")];
        assert_eq!(check(guard, "/", &two), Err(Refusal::Host));
        let page = [local, ("origin", "null")];
        assert_eq!(check(guard, "/", &page), Err(Refusal::Origin));
    }

    #[test]
    fn the_header_is_demanded_only_when_told() {
        let local = ("host", "localhost");
        let with = |value| {
            check(
                Guard::new(true),
                "/",
                &[local, ("x-ambient-request", value)],
            )
        };
        assert_eq!(check(Guard::new(true), "/", &[local]), Err(Refusal::Header));
        assert_eq!(with("1"), Err(Refusal::Header));
        assert_eq!(with("true"), Ok(()));
        assert_eq!(check(Guard::new(false), "/", &[local]), Ok(()));
    }

    #[test]
    fn tunnels_and_echoes_are_refused() {
        for method in [Method::CONNECT, Method::TRACE] {
            let request = Request::builder().method(method).uri("localhost:80");
            let refused = Guard::new(false).check(&request.body(()).unwrap().into_parts().0);
            assert_eq!(refused, Err(Refusal::Method));
        }
    }

    proptest! {
        /// Whatever is accepted, a URL library takes for a loopback host too: nobody who reads
        /// the same text is led elsewhere.
        #[test]
        fn what_is_accepted_is_loopback_for_others_too(host in prop_oneof![
            "[ -~]{0,30}",
            "(localhost|127\\.0\\.0\\.1|\\[::1\\]|a\\.localhost)[.:@/#?0-9a-z\\\\\\[\\]]{0,8}",
            "[.:@/#?0-9a-z\\[\\]]{0,8}(localhost|127\\.0\\.0\\.1|\\[::1\\])(:[0-9]{1,6})?",
        ]) {
            if is_loopback_host(host.as_bytes()) {
                let url = url::Url::parse(&format!("http://{host}/"));
                prop_assert!(url.is_ok(), "{host:?}");
                let url = url.unwrap();
                prop_assert!(url.username().is_empty() && url.path() == "/");
                let loopback = match url.host().unwrap() {
                    url::Host::Ipv4(address) => address.is_loopback(),
                    url::Host::Ipv6(address) => address.is_loopback(),
                    url::Host::Domain(name) => {
                        let name = name.trim_end_matches('.');
                        name == "localhost" || name.ends_with(".localhost")
                    }
                };
                prop_assert!(loopback, "{host:?}");
            }
        }

        /// No bytes make it panic, and a name that does not end in `localhost` is never accepted.
        #[test]
        fn any_bytes_are_judged(host in prop::collection::vec(any::<u8>(), 0..40)) {
            let accepted = is_loopback_host(&host);
            prop_assert!(!accepted || host.is_ascii());
        }
    }
}
