//! Metrics in memory, and the page on which Prometheus reads them (text format 0.0.4).
//!
//! In: what the `metrics` macros record. Out: [`MetricsPage::render`]. The recorder is
//! `metrics-prometheus`, as `metrics-exporter-prometheus` calibrates a clock at each start: some
//! 35 ms of processor time, more than a runner takes to get its token.

use std::fmt;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_prometheus::failure::strategy::NoOp;
use prometheus::{Registry, TextEncoder};

/// All metrics of a process. Clones share them.
#[derive(Clone)]
pub struct MetricsPage {
    recorder: metrics_prometheus::Recorder<NoOp>,
    registry: Registry,
}

impl MetricsPage {
    /// The page as Prometheus reads it: metrics by name, their series by label.
    pub fn render(&self) -> String {
        // Families that cannot be written would be a fault of ours; the others are of use still.
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }
}

impl Default for MetricsPage {
    fn default() -> Self {
        let registry = Registry::new();
        let recorder = metrics_prometheus::Recorder::builder()
            .with_registry(&registry)
            .with_failure_strategy(NoOp)
            .build();
        Self { recorder, registry }
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
        self.recorder.describe_histogram(name, unit, text);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.recorder.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.recorder.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.recorder.register_histogram(key, metadata)
    }
}

#[cfg(test)]
mod tests {
    use metrics::{counter, describe_counter, gauge, histogram};

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
            counter!("b_total", "result" => "ok").increment(2);
            counter!("b_total", "result" => "error").increment(1);
            counter!("b_total", "result" => "ok").increment(1);
            gauge!("c", "why" => "a \"quoted\" \\").set(1.5);
            gauge!("c", "why" => "a \"quoted\" \\").increment(1.0);
            histogram!("h_seconds", "of" => "x").record(0.3);
            histogram!("h_seconds", "of" => "x").record(31.0);
        });
        for line in [
            "# HELP b_total of b",
            "# TYPE b_total counter",
            "b_total{result=\"error\"} 1",
            "b_total{result=\"ok\"} 3",
            "c{why=\"a \\\"quoted\\\" \\\\\"} 2.5",
            "h_seconds_bucket{of=\"x\",le=\"0.5\"} 1",
            "h_seconds_bucket{of=\"x\",le=\"+Inf\"} 2",
            "h_seconds_sum{of=\"x\"} 31.3",
            "h_seconds_count{of=\"x\"} 2",
        ] {
            assert!(page.lines().any(|it| it == line), "no {line:?} in\n{page}");
        }
    }

    #[test]
    fn described_but_not_recorded_is_no_line() {
        assert_eq!(recorded(|| describe_counter!("x_total", "x")), "");
    }
}
