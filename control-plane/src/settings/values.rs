//! Values of settings: each parsed once, with an error that says what it should be. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ambient_shared::settings::parse_duration;

use crate::{keypair::rotation::Waits, leader::LeaseTimes, refresh::Interval};

/// Shortest life of minted tokens: their times are whole seconds, and two must pass.
pub const MIN_TOKEN_TTL: Duration = Duration::from_secs(2);

/// Longest life of minted tokens: a month is no longer short-lived.
pub const MAX_TOKEN_TTL: Duration = Duration::from_hours(24 * 31);

/// Variables of this process that sessions' processes get too, when set. Nothing else is passed
/// on: the environment of a control plane may hold secrets.
const PASSED_ON: [&str; 20] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TERM",
    "TMPDIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "RUST_BACKTRACE",
];

/// Addresses that a session reaches without any proxy.
pub(super) const LOOPBACK: &str = "127.0.0.1,localhost,::1";

/// `ADDR:PORT`; `:PORT` and a bare port mean loopback, as nobody asked for more.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let loopback = |port: &str| {
        port.parse()
            .ok()
            .map(|port: u16| SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port))
    };
    text.parse()
        .ok()
        .or_else(|| loopback(text.strip_prefix(':').unwrap_or(text)))
        .or_else(|| loopback(text.strip_prefix("localhost:")?))
        .ok_or_else(|| format!("{text:?} is not an address such as 127.0.0.1:8080"))
}

/// `ADDR:PORT`; `:PORT` means all addresses, as in Go programs.
pub(super) fn parse_listen_anywhere(text: &str) -> Result<SocketAddr, String> {
    let everywhere = |port: &str| {
        let port = port.parse().ok()?;
        // Both families, where the system has both.
        Some(SocketAddr::new(IpAddr::from([0_u16; 8]), port))
    };
    match text.strip_prefix(':') {
        Some(port) => everywhere(port),
        None => text.parse().ok(),
    }
    .ok_or_else(|| format!("{text:?} is not an address such as :8080 or 127.0.0.1:8080"))
}

pub(super) fn parse_ttl(text: &str) -> Result<Duration, String> {
    let life = parse_duration(text)?;
    if life < MIN_TOKEN_TTL {
        return Err(format!(
            "{text} is too short; tokens live at least {} s",
            MIN_TOKEN_TTL.as_secs()
        ));
    }
    if life > MAX_TOKEN_TTL {
        return Err(format!("{text} is too long; tokens live at most 31 days"));
    }
    if life.subsec_nanos() != 0 {
        return Err(format!("{text} is not a number of whole seconds"));
    }
    Ok(life)
}

pub(super) fn parse_lease(text: &str) -> Result<LeaseTimes, String> {
    let lease = parse_duration(text)?;
    if (LeaseTimes::MIN..=LeaseTimes::MAX).contains(&lease) {
        return Ok(LeaseTimes::new(lease));
    }
    Err(format!(
        "{text} is not between {} and {} s",
        LeaseTimes::MIN.as_secs(),
        LeaseTimes::MAX.as_secs()
    ))
}

pub(super) fn parse_rotation(text: &str) -> Result<Waits, String> {
    let unit = parse_duration(text)?;
    if (Waits::MIN..=Waits::MAX).contains(&unit) {
        return Ok(Waits::of(unit));
    }
    Err(format!("{text} is not between 1s and 1d"))
}

pub(super) fn parse_interval(text: &str) -> Result<Interval, String> {
    if text.eq_ignore_ascii_case("off") {
        return Ok(Interval::Off);
    }
    match parse_duration(text) {
        Ok(interval) if interval.is_zero() => {
            Err("must be more than 0; off turns it off".to_owned())
        }
        Ok(interval) => Ok(Interval::Every(interval)),
        Err(_) => Err(format!(
            "{text:?} is neither a duration such as 20s nor off"
        )),
    }
}

pub(super) fn parse_command(text: &str) -> Result<Vec<String>, String> {
    match serde_json::from_str::<Vec<String>>(text) {
        Ok(command) if command.first().is_some_and(|program| !program.is_empty()) => Ok(command),
        Ok(_) => Err("names no program".to_owned()),
        Err(_) => Err(r#"not a JSON array of strings such as ["my-agent","--flag"]"#.to_owned()),
    }
}

/// Where programs of a user keep their state (XDG Base Directory Specification).
pub(super) fn default_data_dir(
    environment: &impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, String> {
    let absolute = |name: &str| {
        environment(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".local/state")))
        .map(|state| state.join("ambient"))
        .ok_or_else(|| "missing, and neither XDG_STATE_HOME nor HOME is set".to_owned())
}

pub(super) fn passed_on(environment: &impl Fn(&str) -> Option<String>) -> BTreeMap<String, String> {
    let mut passed: BTreeMap<String, String> = PASSED_ON
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), environment(name)?)))
        .collect();
    // All our servers are on loopback, which no proxy reaches.
    for name in ["NO_PROXY", "no_proxy"] {
        let value = match environment(name) {
            Some(hosts) => format!("{hosts},{LOOPBACK}"),
            None => LOOPBACK.to_owned(),
        };
        passed.insert(name.to_owned(), value);
    }
    passed
}
