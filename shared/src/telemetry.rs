//! Logs on stderr, metrics, and (feature `otlp`) traces.

use std::io::IsTerminal as _;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _};

mod recorder;
#[cfg(feature = "otlp")]
mod traces;

pub use recorder::MetricsPage;
#[cfg(feature = "otlp")]
pub use traces::{LAST_EXPORT, SPANS, Traces, follow, init_logs_and_traces, is_told, tell};

/// Gauge, labels `program` and `version`: always 1.
pub const BUILD: &str = "ambient_build_info";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people when stderr is a terminal, else JSON.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl LogFormat {
    fn is_json(self) -> bool {
        match self {
            Self::Auto => !std::io::stderr().is_terminal(),
            Self::Json => true,
            Self::Text => false,
        }
    }
}

/// Why telemetry cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is neither a level nor a list of `module=level`.
    #[error("{0:?} is not a log level such as info, or module=debug,info")]
    Level(String),
    /// Somebody set up logging before.
    #[error("logging is set up already")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// Somebody set up metrics before.
    #[error("metrics are set up already")]
    Metrics,
}

/// kube logs the whole text of an answer that it cannot read, which may be a Secret's.
const ANSWERS: &str = ",kube_client::client=off";

/// Checks a log level as settings give it. Existing settings say `WARNING` and `CRITICAL` too.
///
/// # Errors
/// When it is neither a level nor a list of `module=level`.
pub fn parse_level(level: &str) -> Result<EnvFilter, TelemetryError> {
    let known = match level.to_ascii_lowercase().as_str() {
        "" => "info",
        "warning" => "warn",
        "critical" | "fatal" => "error",
        _ => level,
    };
    // EnvFilter itself would take any word for a module's name, and show everything of it.
    let levels_are_named = known.split(',').all(|directive| {
        let level = directive.rsplit('=').next().unwrap_or_default();
        !level.is_empty() && level.parse::<LevelFilter>().is_ok()
    });
    let broken = || TelemetryError::Level(level.to_owned());
    if !levels_are_named {
        return Err(broken());
    }
    // notify traces whole paths, and local mode's folders are named by session ids.
    let lower = known.to_ascii_lowercase();
    let verbose = lower.contains("trace") || lower.contains("debug");
    let quiet = if verbose && !lower.contains("notify") {
        ",notify=info"
    } else {
        ""
    };
    EnvFilter::try_new(format!("{known}{quiet}{ANSWERS}")).map_err(|_| broken())
}

/// Sets up logging for the process.
///
/// # Errors
/// When the level is malformed, or logging was set up before.
pub fn init_logs(format: LogFormat, level: &str) -> Result<(), TelemetryError> {
    let filter = parse_level(level)?;
    let registry = tracing_subscriber::registry().with(filter);
    let writer = std::io::stderr;
    if format.is_json() {
        let layer = fmt::layer().json().flatten_event(true).with_writer(writer);
        registry.with(layer).try_init()?;
    } else {
        let ansi = std::io::stderr().is_terminal();
        let layer = fmt::layer()
            .compact()
            .with_target(false)
            .with_ansi(ansi)
            .with_writer(writer);
        registry.with(layer).try_init()?;
    }
    Ok(())
}

/// Says what metrics mean, by the rows of a Markdown table: name, type, labels, what it is for. Other
/// lines are passed over.
pub fn describe(table: &'static str) {
    for line in table.lines() {
        let cells: Vec<&'static str> = line.split('|').map(str::trim).collect();
        let ["", name, kind, _, text, ""] = cells[..] else {
            continue;
        };
        let name = name.trim_matches('`');
        match kind {
            "counter" => metrics::describe_counter!(name, text),
            "gauge" => metrics::describe_gauge!(name, text),
            "histogram" => metrics::describe_histogram!(name, text),
            _ => {}
        }
    }
}

/// Without traces, nobody is told of a span.
#[cfg(not(feature = "otlp"))]
pub(crate) fn tell(_: &tracing::Span, _: &mut ::http::HeaderMap) {}

/// Sets up the process's metrics, those of the process itself and its [`BUILD`] included, and gives
/// what renders them.
///
/// # Errors
/// When metrics were set up before.
pub fn init_metrics(program: &'static str) -> Result<MetricsPage, TelemetryError> {
    let page = MetricsPage::default().with_process();
    metrics::set_global_recorder(page.clone()).map_err(|_| TelemetryError::Metrics)?;
    // All programs of a release have its version.
    let version = env!("CARGO_PKG_VERSION");
    metrics::gauge!(BUILD, "program" => program, "version" => version).set(1.0);
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_described_by_a_table() {
        let page = MetricsPage::default();
        metrics::with_local_recorder(&page, || {
            describe(
                "| metric | type | labels | for |\n|---|---|---|---|\n| `a_total` | counter | `b` | A? |\n",
            );
            metrics::counter!("a_total", "b" => "c").increment(1);
        });
        let page = page.render();
        assert!(page.starts_with("# HELP a_total A?\n"), "{page}");
    }

    #[test]
    fn levels_are_checked_by_name() {
        for level in [
            "info",
            "WARNING",
            "debug",
            "ambient_runner=debug,info",
            "off",
            "",
        ] {
            assert!(parse_level(level).is_ok(), "{level}");
        }
        for level in ["loud", "info=", "a=b=c", "loud=info=x"] {
            let error = parse_level(level).unwrap_err().to_string();
            assert!(error.contains(level), "{error}");
        }
    }
}
