//! Metrics in memory, and the page on which Prometheus reads them (text format 0.0.4).
//!
//! In: what the `metrics` macros record. Out: [`MetricsPage::render`]. The recorder is
//! `metrics-prometheus`, as `metrics-exporter-prometheus` calibrates a clock at each start: some
//! 35 ms of processor time, more than a runner takes to get its token.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_prometheus::failure::strategy::NoOp;
use prometheus::{
    HistogramOpts, HistogramVec, Registry, TextEncoder, process_collector::ProcessCollector,
};

/// Upper bounds of all histograms, in seconds: from an exchange that a cache answers to a pod that
/// waits for its image.
const BUCKETS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0,
];

/// All metrics of a process. Clones share them.
#[derive(Clone)]
pub struct MetricsPage {
    recorder: metrics_prometheus::Recorder<NoOp>,
    registry: Registry,
    histograms: Arc<RwLock<Histograms>>,
}

#[derive(Default)]
struct Histograms {
    /// Names of those that have [`BUCKETS`].
    made: HashSet<String>,
    /// What those mean that were described before they were made.
    help: HashMap<String, SharedString>,
}

impl MetricsPage {
    /// The page as Prometheus reads it: metrics by name, their series by label.
    ///
    /// Reads some files of `/proc`, which takes less than a millisecond.
    pub fn render(&self) -> String {
        // Families that cannot be written would be a fault of ours; the others are of use still.
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }

    /// Adds what is known of the process itself, by the names that Prometheus has for it.
    pub(super) fn with_process(self) -> Self {
        // An error means that it is there already.
        let _ = self
            .registry
            .register(Box::new(ProcessCollector::for_self()));
        self
    }

    /// Makes a histogram with [`BUCKETS`]: the recorder's own end at 10 s.
    fn prepare(&self, key: &Key) {
        let help = {
            let known = self.histograms.read();
            let known = known.unwrap_or_else(PoisonError::into_inner);
            if known.made.contains(key.name()) {
                return;
            }
            known.help.get(key.name()).cloned()
        };
        let help = help.as_deref().unwrap_or(key.name());
        let labels: Vec<&str> = key.labels().map(metrics::Label::key).collect();
        let options = HistogramOpts::new(key.name(), help).buckets(BUCKETS.to_vec());
        if let Ok(histogram) = HistogramVec::new(options, &labels) {
            // An error means that another thread was here first.
            let _ = self.recorder.try_register_metric(histogram);
        }
        let mut known = (self.histograms.write()).unwrap_or_else(PoisonError::into_inner);
        known.made.insert(key.name().to_owned());
    }
}

impl Default for MetricsPage {
    fn default() -> Self {
        let registry = Registry::new();
        let recorder = metrics_prometheus::Recorder::builder()
            .with_registry(&registry)
            .with_failure_strategy(NoOp)
            .build();
        Self {
            recorder,
            registry,
            histograms: Arc::default(),
        }
    }
}

impl fmt::Debug for MetricsPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetricsPage(..)")
    }
}

impl Recorder for MetricsPage {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.recorder.describe_counter(name, unit, text);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.recorder.describe_gauge(name, unit, text);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        let mut known = (self.histograms.write()).unwrap_or_else(PoisonError::into_inner);
        known.help.insert(name.as_str().to_owned(), text.clone());
        drop(known);
        self.recorder.describe_histogram(name, unit, text);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.recorder.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.recorder.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.prepare(key);
        self.recorder.register_histogram(key, metadata)
    }
}

#[cfg(test)]
mod tests {
    use metrics::{counter, describe_counter, describe_histogram, gauge, histogram};

    use super::*;

    fn recorded(record: impl FnOnce()) -> String {
        let page = MetricsPage::default();
        metrics::with_local_recorder(&page, record);
        page.render()
    }

    #[test]
    fn metrics_are_written_by_name_and_label() {
        let page = recorded(|| {
            describe_counter!("b_total", "of b");
            describe_histogram!("bare_seconds", "of all");
            counter!("b_total", "result" => "ok").increment(2);
            counter!("b_total", "result" => "error").increment(1);
            counter!("b_total", "result" => "ok").increment(1);
            gauge!("c", "why" => "a \"quoted\" \\").set(1.5);
            gauge!("c", "why" => "a \"quoted\" \\").increment(1.0);
            histogram!("h_seconds", "of" => "x").record(0.3);
            histogram!("h_seconds", "of" => "x").record(31.0);
            histogram!("h_seconds", "of" => "y").record(0.0004);
            histogram!("bare_seconds").record(250.0);
        });
        for line in [
            "# HELP b_total of b",
            "# TYPE b_total counter",
            "# HELP bare_seconds of all",
            "b_total{result=\"error\"} 1",
            "b_total{result=\"ok\"} 3",
            "c{why=\"a \\\"quoted\\\" \\\\\"} 2.5",
            "h_seconds_bucket{of=\"x\",le=\"0.5\"} 1",
            "h_seconds_bucket{of=\"x\",le=\"+Inf\"} 2",
            "h_seconds_sum{of=\"x\"} 31.3",
            "h_seconds_count{of=\"x\"} 2",
            "h_seconds_bucket{of=\"x\",le=\"30\"} 1",
            "h_seconds_bucket{of=\"x\",le=\"60\"} 2",
            "h_seconds_bucket{of=\"y\",le=\"0.0005\"} 1",
            "bare_seconds_bucket{le=\"120\"} 0",
            "bare_seconds_bucket{le=\"300\"} 1",
        ] {
            assert!(page.lines().any(|it| it == line), "no {line:?} in\n{page}");
        }
    }

    #[test]
    fn the_process_itself_is_measured() {
        let page = MetricsPage::default().with_process().render();
        for name in ["resident_memory_bytes", "open_fds", "start_time_seconds"] {
            let line = format!("process_{name} ");
            let value = page.lines().find_map(|it| it.strip_prefix(&line));
            let value: f64 = value.unwrap_or_default().parse().unwrap_or_default();
            assert!(value > 0.0, "{name} in\n{page}");
        }
    }

    #[test]
    fn described_but_not_recorded_is_no_line() {
        assert_eq!(recorded(|| describe_counter!("x_total", "x")), "");
    }
}
