use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use opentelemetry::{
    InstrumentationScope,
    trace::{SpanContext, SpanId, SpanKind, Status},
};
use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};
use tokio::{task::JoinSet, time::Instant};

use super::*;
use crate::telemetry::MetricsPage;

/// A collector that takes so long for each batch, or refuses it.
#[derive(Debug, Clone)]
struct Taking {
    time: Duration,
    refuses: bool,
    taken: Arc<AtomicUsize>,
}

impl Taking {
    fn after(time: Duration) -> Self {
        Self {
            time,
            refuses: false,
            taken: Arc::default(),
        }
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::SeqCst)
    }
}

impl SpanExporter for Taking {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        sleep(self.time).await;
        if self.refuses {
            return Err(OTelSdkError::InternalFailure("refused".to_owned()));
        }
        self.taken.fetch_add(batch.len(), Ordering::SeqCst);
        Ok(())
    }
}

fn span() -> SpanData {
    SpanData {
        span_context: SpanContext::empty_context(),
        parent_span_id: SpanId::INVALID,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: Cow::Borrowed("a span"),
        start_time: SystemTime::UNIX_EPOCH,
        end_time: SystemTime::UNIX_EPOCH,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::default(),
    }
}

const DELAY: Duration = Duration::from_secs(5);

fn export(exporter: &Taking) -> (Queue, Export<Taking>) {
    let (queue, spans) = Queue::bounded();
    let deadline = Duration::from_secs(10);
    let export = Export::new(exporter.clone(), spans, deadline, DELAY, Clock::system());
    (queue, export)
}

/// Runs the export, with `count` spans ended at once, until `stop`; gives the metrics.
async fn counted(exporter: &Taking, count: usize, stop_after: Duration) -> String {
    let page = MetricsPage::default();
    let _recorder = metrics::set_default_local_recorder(&page);
    let (queue, export) = export(exporter);
    for _ in 0..count {
        queue.on_end(span());
    }
    let stop = CancellationToken::new();
    let stopping = async {
        sleep(stop_after).await;
        stop.cancel();
    };
    tokio::join!(export.run(stop.clone()), stopping);
    page.render()
}

#[tokio::test(start_paused = true)]
async fn spans_that_do_not_fit_are_dropped_and_counted() {
    let exporter = Taking::after(Duration::ZERO);
    let metrics = counted(&exporter, QUEUE + 7, Duration::from_secs(60)).await;
    assert_eq!(exporter.taken(), QUEUE);
    for line in [
        format!("{SPANS}{{result=\"dropped\"}} 7"),
        format!("{SPANS}{{result=\"exported\"}} {QUEUE}"),
    ] {
        assert!(metrics.contains(&line), "no {line} in\n{metrics}");
    }
    assert!(metrics.contains(LAST_EXPORT), "{metrics}");
}

#[tokio::test(start_paused = true)]
async fn an_export_has_a_deadline() {
    let exporter = Taking::after(Duration::from_secs(3600));
    let began = Instant::now();
    let metrics = counted(&exporter, 3, Duration::from_secs(60)).await;
    let line = format!("{SPANS}{{result=\"failed\"}} 3");
    assert!(metrics.contains(&line), "{metrics}");
    assert!(!metrics.contains(LAST_EXPORT), "{metrics}");
    assert!(began.elapsed() < Duration::from_secs(80));
}

#[tokio::test(start_paused = true)]
async fn what_waits_at_the_end_is_still_exported() {
    let exporter = Taking::after(Duration::from_millis(1));
    counted(&exporter, BATCH + 1, Duration::ZERO).await;
    assert_eq!(exporter.taken(), BATCH + 1);
}

#[tokio::test(start_paused = true)]
async fn a_span_alone_does_not_wait_for_a_whole_batch() {
    let exporter = Taking::after(Duration::ZERO);
    let (queue, export) = export(&exporter);
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(export.run(stop.clone()));
    queue.on_end(span());
    sleep(DELAY / 2).await;
    assert_eq!(exporter.taken(), 0);
    sleep(DELAY / 2 + Duration::from_millis(1)).await;
    assert_eq!(exporter.taken(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_hangs_holds_up_no_end() {
    let exporter = Taking::after(Duration::from_secs(3600));
    let (queue, export) = export(&exporter);
    let began = Instant::now();
    let ended = during(export, async {
        queue.on_end(span());
        sleep(DELAY * 2).await;
        7
    });
    assert_eq!(ended.await, 7);
    assert_eq!(began.elapsed(), DELAY * 2 + FLUSH);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_said_once_and_its_end_too() {
    let mut exporter = Taking::after(Duration::ZERO);
    exporter.refuses = true;
    let (queue, mut export) = export(&exporter);
    for lost in [1, 2] {
        queue.on_end(span());
        export.gather().await;
        export.export().await;
        assert_eq!(export.lost, Some(lost), "the first alone is said");
    }
    export.exporter.refuses = false;
    queue.on_end(span());
    export.gather().await;
    export.export().await;
    assert_eq!(export.lost, None);
}
