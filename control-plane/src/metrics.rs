//! The names of all metrics of the control plane.
//!
//! Prometheus conventions: base units, `_total` for counters, moments rather than ages, so that a
//! stuck task shows. Labels come from enums, never from ids.

// Leadership.

/// Gauge: 1 while this replica leads, else 0.
pub const LEADER: &str = "ambient_control_plane_leader";
/// Gauge: when this replica, as the leader, last renewed its Lease, in Unix seconds.
pub const LEASE_RENEWED: &str = "ambient_control_plane_lease_renewed_timestamp_seconds";
/// Counter, label `to` (`leader`, `standby`): times this replica began or ceased to lead.
pub const LEADERSHIP_CHANGES: &str = "ambient_control_plane_leadership_changes_total";

// Token endpoint.

/// Counter, label `result`: answers to `GET /token`.
pub const EXCHANGES: &str = "ambient_control_plane_token_exchanges_total";
/// Histogram, label `result` (`ok`, `refused`): how long an answer to `GET /token` took, in seconds.
pub const EXCHANGE_SECONDS: &str = "ambient_control_plane_token_exchange_duration_seconds";
/// Counter, label `result` (`hit`, `miss`): ciphertexts found in the cache or not.
pub const CIPHERTEXT_CACHE: &str = "ambient_control_plane_ciphertext_cache_total";
/// Counter, label `result` (`ok`, `failed`, `overloaded`): decryptions asked for.
pub const DECRYPTIONS: &str = "ambient_control_plane_decryptions_total";
/// Gauge: connections of the token endpoint that are open.
pub const CONNECTIONS: &str = "ambient_control_plane_token_endpoint_connections";
/// Counter, label `cause`: connections of the token endpoint that ended: `done` in order, `broken`
/// by the client, `malformed`, no `handshake`, `head_late`, `idle`, over their whole `life`,
/// `made_room` for others, `no_descriptor` left for it, `shutdown`, or a `panic` of ours.
pub const CONNECTIONS_CLOSED: &str =
    "ambient_control_plane_token_endpoint_connections_closed_total";
/// Counter, label `cause` (`descriptors`, `other`): connections that could not be accepted.
pub const ACCEPT_FAILURES: &str = "ambient_control_plane_token_endpoint_accept_failures_total";
/// Gauge: when the token port's certificate expires, in Unix seconds.
pub const CERTIFICATE_EXPIRY: &str =
    "ambient_control_plane_token_endpoint_certificate_expiry_timestamp_seconds";
/// Gauge: when the token port's certificate in use was loaded, in Unix seconds.
pub const CERTIFICATE_LOADED: &str =
    "ambient_control_plane_token_endpoint_certificate_loaded_timestamp_seconds";
/// Counter, label `result` (`ok`, `failed`): changes of the token port's certificate files, and of
/// the CA certificates that sessions are given for it.
pub const CERTIFICATE_RELOADS: &str =
    "ambient_control_plane_token_endpoint_certificate_reloads_total";
/// Counter, label `result` (`found`, `missing`, `failed`): sessions that the cache did not know
/// and that the API server was asked for.
pub const SESSION_LOOKUPS: &str = "ambient_control_plane_session_lookups_total";

// Issuers.

/// Counter, label `issuer` (`minted`, `oidc`): tokens that were made or fetched.
pub const TOKENS_ISSUED: &str = "ambient_control_plane_tokens_issued_total";
/// Counter, label `result` (`ok`, `unreachable`, `refused`, `malformed`): requests to the identity
/// provider.
pub const OIDC_REQUESTS: &str = "ambient_control_plane_oidc_requests_total";
/// Histogram, label `result`: how long the identity provider took for a request, in seconds.
pub const OIDC_SECONDS: &str = "ambient_control_plane_oidc_request_duration_seconds";
/// Gauge: when the identity provider last gave a token, in Unix seconds.
pub const OIDC_LAST_SUCCESS: &str = "ambient_control_plane_oidc_last_success_timestamp_seconds";
/// Gauge: when the identity provider's token expires, in Unix seconds.
pub const OIDC_EXPIRY: &str = "ambient_control_plane_oidc_token_expiry_timestamp_seconds";

// Keys.

/// Gauge, label `key` (`keypair`, `session-root`, `signing-key`): when this replica last read them,
/// in Unix seconds.
pub const KEYS_READ: &str = "ambient_control_plane_keys_read_timestamp_seconds";
/// Counter, labels `key` and `result` (`ok`, `failed`): times that they were read again.
pub const KEY_READS: &str = "ambient_control_plane_key_reads_total";
/// Gauge, labels `key` and `which` (`previous`, `next`): 1 while there is such a key beside the one
/// in use, as during a rotation, else 0.
pub const KEYS_HELD: &str = "ambient_control_plane_keys_held";
/// Counter, labels `key` and `step` (`promoted`, `dropped`): steps of rotations that this replica
/// took, as the leader.
pub const ROTATION_STEPS: &str = "ambient_control_plane_key_rotation_steps_total";

// Sessions, queue and worker.

/// Gauge, label `phase`: sessions in the cache.
pub const SESSIONS: &str = "ambient_control_plane_sessions";
/// Gauge: when all sessions were last listed, in Unix seconds.
pub const LAST_LIST: &str = "ambient_control_plane_last_list_timestamp_seconds";
/// Counter, label `result`: lists of all sessions.
pub const LISTS: &str = "ambient_control_plane_lists_total";
/// Counter, label `reason`: times the watch of sessions ended and was opened again.
pub const WATCH_RECONNECTS: &str = "ambient_control_plane_watch_reconnects_total";
/// Gauge, label `handler` (`refresh`: tokens to be replaced; `project`, `repair`): entries of the
/// work queue, whether due, backing off or running.
pub const QUEUE_LENGTH: &str = "ambient_control_plane_queue_length";
/// Gauge, label `handler`: since when the oldest entry has been due and not begun, in Unix seconds;
/// the moment of the report when none is.
pub const QUEUE_OLDEST: &str = "ambient_control_plane_queue_oldest_due_timestamp_seconds";
/// Counter, labels `handler` and `result`: runs of a handler.
pub const HANDLER_RUNS: &str = "ambient_control_plane_handler_runs_total";
/// Histogram, label `handler`: how long a run of a handler took, in seconds.
pub const HANDLER_SECONDS: &str = "ambient_control_plane_handler_duration_seconds";

/// Histogram: from a session's being seen to wait for a run until that was made (its pod was
/// created, its process started), in seconds.
pub const START_DELAY: &str = "ambient_control_plane_session_start_delay_seconds";

// Refresh.

/// Gauge: when the refresh last looked at all sessions, in Unix seconds; before that, when this
/// replica began to lead.
pub const LAST_REFRESH: &str = "ambient_control_plane_refresh_last_tick_timestamp_seconds";
/// Counter, label `result`: token Secrets written by the refresh.
pub const REFRESHES: &str = "ambient_control_plane_refresh_writes_total";
/// Gauge: token Secrets that were due at the last tick.
pub const REFRESH_DUE: &str = "ambient_control_plane_refresh_due";
/// Histogram: from a token's being found due until another was written in its place, in seconds.
pub const REFRESH_LAG: &str = "ambient_control_plane_refresh_lag_seconds";
/// Gauge: time between two looks at all sessions, in seconds.
pub const REFRESH_INTERVAL: &str = "ambient_control_plane_refresh_interval_seconds";
/// Gauge: when the oldest of the tokens that expire, in Secrets of running sessions, was issued, in
/// Unix seconds; infinite when there is none.
pub const OLDEST_ISSUE: &str = "ambient_control_plane_refresh_oldest_issue_timestamp_seconds";
/// Gauge: the earliest expiry among the token Secrets of running sessions, in Unix seconds; infinite
/// when none expires.
pub const EARLIEST_EXPIRY: &str = "ambient_control_plane_refresh_earliest_expiry_timestamp_seconds";

/// Gauge: how much of its life the token in a running session's Secret has used that has used the
/// most, 1 for one that has expired; 0 when none expires.
pub const LIFE_USED: &str = "ambient_control_plane_refresh_token_life_used_ratio";

// Local processes.

/// Counter, label `result`: sessions' processes started.
pub const PROCESS_STARTS: &str = "ambient_control_plane_process_starts_total";
/// Gauge: sessions whose shim runs.
pub const PROCESSES: &str = "ambient_control_plane_processes";

// Kubernetes.

/// Counter, label `result` (`ok`, `failed`, `impossible`): looks at a project's namespace and access.
pub const PROJECT_RECONCILES: &str = "ambient_control_plane_project_reconciles_total";

/// Counter, labels `verb` and `code`: requests to the Kubernetes API, by HTTP status; `none` when
/// there was no answer.
pub const KUBERNETES_REQUESTS: &str = "ambient_control_plane_kubernetes_requests_total";
/// Histogram, label `verb`: how long an answer took, in seconds; of a watch, until it began.
pub const KUBERNETES_SECONDS: &str = "ambient_control_plane_kubernetes_request_duration_seconds";
/// Counter, label `kind`: times a watch could not be had, or was interrupted.
pub const WATCH_FAILURES: &str = "ambient_control_plane_kubernetes_watch_failures_total";
/// Counter, label `what`: objects of running sessions that somebody had changed and that were put
/// right.
pub const REPAIRS: &str = "ambient_control_plane_kubernetes_repairs_total";
