//! All metrics of the sidecar.

use metrics::{describe_counter, describe_gauge};

/// When the token expires; 0 when there is none or nobody knows.
pub(crate) const TOKEN_EXPIRY: &str = "ambient_sidecar_token_expiry_timestamp_seconds";
/// When the token last changed.
pub(crate) const TOKEN_CHANGED: &str = "ambient_sidecar_token_change_timestamp_seconds";
/// How often the token changed, the first one included.
pub(crate) const TOKEN_CHANGES: &str = "ambient_sidecar_token_changes_total";
/// When the token was last read or fetched with success.
pub(crate) const TOKEN_SUCCESS: &str = "ambient_sidecar_token_success_timestamp_seconds";
/// Reads of the token file, by `result`.
pub(crate) const TOKEN_READS: &str = "ambient_sidecar_token_reads_total";
/// Exchanges with the token endpoint, by `result`.
pub(crate) const TOKEN_FETCHES: &str = "ambient_sidecar_token_fetches_total";
/// 1 while changes of the folder are announced by the system, 0 while it is only read each second.
pub(crate) const FOLDER_WATCHED: &str = "ambient_sidecar_folder_watched";
/// Requests that arrived, by `port`.
pub(crate) const REQUESTS: &str = "ambient_sidecar_requests_total";
/// Requests that were refused before anything was done for them, by `port` and `reason`.
pub(crate) const REFUSED: &str = "ambient_sidecar_requests_refused_total";
/// Requests under way, by `port`.
pub(crate) const IN_FLIGHT: &str = "ambient_sidecar_requests_in_flight";
/// Open connections, by `port`.
pub(crate) const CONNECTIONS: &str = "ambient_sidecar_connections";
/// Proxied requests, by `protocol` and `result`.
pub(crate) const PROXIED: &str = "ambient_sidecar_proxied_requests_total";
/// Requests sent a second time with a fresher token.
pub(crate) const REPLAYS: &str = "ambient_sidecar_replays_total";

/// Tells the recorder what each name means.
pub(crate) fn describe() {
    describe_gauge!(TOKEN_EXPIRY, "When the token expires; 0 when unknown.");
    describe_gauge!(TOKEN_CHANGED, "When the token last changed.");
    describe_counter!(TOKEN_CHANGES, "Changes of the token, the first included.");
    describe_gauge!(
        TOKEN_SUCCESS,
        "When a valid token was last read or fetched."
    );
    describe_counter!(TOKEN_READS, "Reads of the token file.");
    describe_counter!(TOKEN_FETCHES, "Exchanges with the token endpoint.");
    describe_gauge!(
        FOLDER_WATCHED,
        "1 while the system announces changes of the token's folder, else 0."
    );
    describe_counter!(REQUESTS, "Requests that arrived.");
    describe_counter!(REFUSED, "Requests refused at the door.");
    describe_gauge!(IN_FLIGHT, "Requests under way.");
    describe_gauge!(CONNECTIONS, "Open connections.");
    describe_counter!(PROXIED, "Requests for the API server.");
    describe_counter!(REPLAYS, "Requests sent again with a fresher token.");
}
