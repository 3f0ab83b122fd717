//! Names of all metrics, and how they are counted.

use std::time::Duration;

use metrics::{Gauge, SharedString, counter, gauge, histogram};

const REQUESTS: &str = "ambient_api_server_requests_total";
const REQUEST_SECONDS: &str = "ambient_api_server_request_duration_seconds";
const CHANGES: &str = "ambient_api_server_changes_committed_total";
const COMMITS: &str = "ambient_api_server_commits_total";
const COMMIT_SECONDS: &str = "ambient_api_server_commit_duration_seconds";
const MESSAGES: &str = "ambient_api_server_messages_stored_total";
const WATCHERS: &str = "ambient_api_server_watchers";
const SLOW_WATCHERS: &str = "ambient_api_server_slow_watchers_ended_total";
const KEY_FETCHES: &str = "ambient_api_server_jwks_fetches_total";
const KEY_FETCHED: &str = "ambient_api_server_jwks_last_success_timestamp_seconds";
const REFUSED: &str = "ambient_api_server_sign_ins_refused_total";

/// Has the counters of failures from the start: a rate sees no first failure that makes its series.
pub(crate) fn begin() {
    for counter in [
        counter!(COMMITS, "result" => "error"),
        counter!(KEY_FETCHES, "result" => "error"),
        counter!(SLOW_WATCHERS),
        counter!(REFUSED),
    ] {
        counter.increment(0);
    }
}

/// A transaction was committed.
pub(crate) fn committed(changes: usize, took: Duration) {
    counter!(COMMITS, "result" => "ok").increment(1);
    counter!(CHANGES).increment(changes as u64);
    histogram!(COMMIT_SECONDS).record(took);
}

/// A transaction was rolled back.
pub(crate) fn commit_failed() {
    counter!(COMMITS, "result" => "error").increment(1);
}

/// A message was stored.
pub(crate) fn message_stored() {
    counter!(MESSAGES).increment(1);
}

/// What a watcher watches.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Watched {
    /// Sessions, projects or settings.
    Objects,
    /// The messages of a session.
    Messages,
}

/// Counts a watcher until dropped.
pub(crate) fn watcher(what: Watched) -> Watcher {
    let gauge = match what {
        Watched::Objects => gauge!(WATCHERS, "of" => "objects"),
        Watched::Messages => gauge!(WATCHERS, "of" => "messages"),
    };
    gauge.increment(1.0);
    Watcher(gauge)
}

/// A watcher that is counted.
pub(crate) struct Watcher(Gauge);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// A watcher of objects was ended because it did not keep up.
pub(crate) fn watcher_too_slow() {
    counter!(SLOW_WATCHERS).increment(1);
}

/// There are keys to be fetched, and none was yet.
pub(crate) fn keys_unread() {
    gauge!(KEY_FETCHED).set(0.0);
}

/// A JWKS was fetched at this time, or could not be.
pub(crate) fn keys_fetched(at: Option<u64>) {
    match at {
        #[expect(
            clippy::cast_precision_loss,
            reason = "seconds since the epoch fit into 52 bits"
        )]
        Some(at) => {
            counter!(KEY_FETCHES, "result" => "ok").increment(1);
            gauge!(KEY_FETCHED).set(at as f64);
        }
        None => counter!(KEY_FETCHES, "result" => "error").increment(1),
    }
}

/// A caller was not signed in.
pub(crate) fn sign_in_refused() {
    counter!(REFUSED).increment(1);
}

/// A call was answered; of a stream, its beginning was. `status` is a gRPC code, or the class of a
/// status of REST.
pub(crate) fn answered(face: &'static str, status: impl Into<SharedString>, took: Duration) {
    counter!(REQUESTS, "face" => face, "status" => status.into()).increment(1);
    histogram!(REQUEST_SECONDS, "face" => face).record(took);
}

/// The class of a status of REST.
pub(crate) fn class(status: http::StatusCode) -> &'static str {
    match status.as_u16() {
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    }
}
