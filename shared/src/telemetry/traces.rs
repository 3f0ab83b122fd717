//! Traces by OTLP over HTTP, for who names a collector.
//!
//! In: the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and its like). Out: a layer that takes
//! our own spans, and [`Traces`], which exports them while the program runs. Without a collector
//! there is neither. What is wrong with a collector or its settings is said in the log, and never
//! stops the program: others set these variables for all pods of a cluster.

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider, trace::SpanExporter as _};
use tracing::{Level, Metadata, info, level_filters::LevelFilter, warn};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::{
    Layer as _, filter::filter_fn, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use super::{LogFormat, TelemetryError, init_logs, parse_level};
use crate::{
    client::{self, ClientError},
    clock::Clock,
    exit,
    resolve::Resolver,
};

mod collector;
mod context;
mod export;
mod lines;
mod settings;

use collector::Collector;
pub use context::{follow, is_told, tell};
use export::{Export, Queue};
pub use export::{LAST_EXPORT, SPANS};
use lines::WithTraceId;
use settings::{OtlpFault, OtlpSettings};

/// How every target of ours begins; other crates' spans are not exported.
const OURS: &str = "ambient_";

/// Why no traces are exported, though a collector is named.
#[derive(Debug, thiserror::Error)]
enum NoTraces {
    #[error(transparent)]
    Settings(#[from] OtlpFault),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the exporter cannot be set up")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// The export of traces; nothing when it is off.
#[must_use = "spans are exported while a program runs during it"]
pub struct Traces(Option<Export<SpanExporter>>);

impl Traces {
    /// No traces.
    pub const fn off() -> Self {
        Self(None)
    }

    /// Runs the program, and exports its spans until it has ended; then what is left, for some
    /// seconds at most.
    pub async fn during<T>(self, program: impl Future<Output = T>) -> T {
        match self.0 {
            Some(export) => export::during(export, program).await,
            None => program.await,
        }
    }
}

impl std::fmt::Debug for Traces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the exporter: it would show its headers.
        let on = self.0.is_some();
        f.debug_struct("Traces").field("on", &on).finish()
    }
}

/// Sets up logging as [`init_logs`] does, and the export of spans when a collector is named. In
/// JSON, log lines within a span then have its `trace_id` and `span_id`.
///
/// The collector is told that `program` exports, unless `OTEL_SERVICE_NAME` names another.
///
/// # Errors
/// When the level is malformed, or logging was set up before.
pub fn init_logs_and_traces(
    program: &'static str,
    format: LogFormat,
    level: &str,
) -> Result<Traces, TelemetryError> {
    let variable = |name: &str| std::env::var(name).ok().filter(|it| !it.trim().is_empty());
    let parts = OtlpSettings::read(variable).map_err(NoTraces::from);
    let parts = parts.and_then(|settings| {
        let settings = settings.map(|it| set_up(program, it));
        settings.transpose()
    });
    let (provider, export, endpoint) = match parts {
        Ok(Some(parts)) => parts,
        Ok(None) => {
            init_logs(format, level)?;
            return Ok(Traces::off());
        }
        Err(error) => {
            init_logs(format, level)?;
            warn!(reason = %exit::report(&error), "traces are off");
            return Ok(Traces::off());
        }
    };
    let filter = parse_level(level)?;
    let spans = OpenTelemetryLayer::new(provider.tracer(program))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(filter_fn(is_exported).with_max_level_hint(LevelFilter::DEBUG));
    let registry = tracing_subscriber::registry().with(spans);
    let lines = fmt::layer().with_writer(std::io::stderr);
    if format.is_json() {
        let lines = lines.json().flatten_event(true);
        let lines = lines.map_event_format(WithTraceId);
        registry.with(lines.with_filter(filter)).try_init()?;
    } else {
        let lines = lines.compact().with_target(false);
        registry.with(lines.with_filter(filter)).try_init()?;
    }
    info!(collector = %endpoint, "traces are exported");
    Ok(Traces(Some(export)))
}

/// Spans of ours, and of what is told within them what a log shows by default.
fn is_exported(metadata: &Metadata<'_>) -> bool {
    let most = if metadata.is_span() {
        Level::DEBUG
    } else {
        Level::INFO
    };
    *metadata.level() <= most && metadata.target().starts_with(OURS)
}

type Parts = (SdkTracerProvider, Export<SpanExporter>, url::Url);

fn set_up(program: &'static str, settings: OtlpSettings) -> Result<Parts, NoTraces> {
    let http = client::http_client_to(
        &settings.endpoint,
        &Resolver::system(),
        client::trust_roots(settings.ca.as_deref())?,
        settings.deadline,
    )?;
    // Headers, and what else there is, the builder reads itself: secrets pass by us.
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Collector::new(http))
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .with_timeout(settings.deadline)
        .build()?;
    let resource = resource(program);
    exporter.set_resource(&resource);
    let (queue, spans) = Queue::bounded();
    let provider = SdkTracerProvider::builder()
        .with_resource(resource)
        .with_span_processor(queue)
        .build();
    let (deadline, delay) = (settings.deadline, settings.delay);
    let export = Export::new(exporter, spans, deadline, delay, Clock::system());
    Ok((provider, export, settings.endpoint))
}

/// Who exports: the variables' word goes before ours.
fn resource(program: &'static str) -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let builder = Resource::builder().with_attribute(version);
    let said = Resource::builder().build().get(&"service.name".into());
    let is_named = said.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    if is_named {
        builder.build()
    } else {
        builder.with_service_name(program).build()
    }
}
