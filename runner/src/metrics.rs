//! Names of all metrics of the runner.

use metrics::{Unit, describe_counter, describe_gauge};

/// Tries to get a token, by `source` and `result`.
pub(crate) const TOKEN_FETCHES: &str = "ambient_runner_token_fetches_total";
/// When the current token expires; 0 when nobody said so.
pub(crate) const TOKEN_EXPIRY: &str = "ambient_runner_token_expiry_timestamp_seconds";
/// When the current token came.
pub(crate) const TOKEN_REFRESH: &str = "ambient_runner_token_refresh_timestamp_seconds";
/// Token files written for the agent, by `result`.
pub(crate) const HANDOVERS: &str = "ambient_runner_token_handovers_total";
/// Times the agent was started.
pub(crate) const AGENT_STARTS: &str = "ambient_runner_agent_starts_total";
/// When the agent was last started.
pub(crate) const AGENT_START: &str = "ambient_runner_agent_start_timestamp_seconds";
/// Processes whose end was collected, the agent included.
pub(crate) const REAPED: &str = "ambient_runner_reaped_processes_total";
/// Signals passed on to the agent.
pub(crate) const SIGNALS: &str = "ambient_runner_forwarded_signals_total";
/// User messages handed to the agent.
pub(crate) const MESSAGES_IN: &str = "ambient_runner_messages_in_total";
/// Messages that the API server took from the runner.
pub(crate) const MESSAGES_OUT: &str = "ambient_runner_messages_out_total";
/// When the API server last took one.
pub(crate) const LAST_PUSH: &str = "ambient_runner_last_push_timestamp_seconds";
/// Failed calls for messages, by `call` and `failure`.
pub(crate) const MESSAGE_FAILURES: &str = "ambient_runner_message_failures_total";
/// Messages replaced by an error, as the API server cannot store them.
pub(crate) const MESSAGES_REFUSED: &str = "ambient_runner_messages_refused_total";

/// Says once what each means.
pub(crate) fn describe() {
    describe_counter!(TOKEN_FETCHES, Unit::Count, "tries to get a token");
    describe_gauge!(
        TOKEN_EXPIRY,
        Unit::Seconds,
        "when the current token expires"
    );
    describe_gauge!(TOKEN_REFRESH, Unit::Seconds, "when the current token came");
    describe_counter!(HANDOVERS, Unit::Count, "token files written for the agent");
    describe_counter!(AGENT_STARTS, Unit::Count, "times the agent was started");
    describe_gauge!(
        AGENT_START,
        Unit::Seconds,
        "when the agent was last started"
    );
    describe_counter!(REAPED, Unit::Count, "processes whose end was collected");
    describe_counter!(SIGNALS, Unit::Count, "signals passed on to the agent");
    describe_counter!(
        MESSAGES_IN,
        Unit::Count,
        "user messages handed to the agent"
    );
    describe_counter!(
        MESSAGES_OUT,
        Unit::Count,
        "messages that the API server took"
    );
    describe_gauge!(
        LAST_PUSH,
        Unit::Seconds,
        "when the API server last took a message"
    );
    describe_counter!(MESSAGE_FAILURES, Unit::Count, "failed calls for messages");
    describe_counter!(
        MESSAGES_REFUSED,
        Unit::Count,
        "messages replaced by an error"
    );
}
