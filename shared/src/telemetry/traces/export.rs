//! The way of a span from its end to the collector.
//!
//! In: ended spans, from any thread. Out: batches for the exporter, each with a deadline. Nobody
//! waits for a collector: what does not fit into the queue is dropped and counted.

use std::{mem, time::Duration};

use metrics::{counter, gauge};
use opentelemetry::Context;
use opentelemetry_sdk::{
    error::{OTelSdkError, OTelSdkResult},
    trace::{Span, SpanData, SpanExporter, SpanProcessor},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{clock::Clock, tasks::Tasks};

/// Counter, label `result` (`exported`, `failed`, `dropped`): spans that ended.
pub const SPANS: &str = "ambient_trace_spans_total";
/// Gauge: when the collector last took spans, in Unix seconds.
pub const LAST_EXPORT: &str = "ambient_trace_last_export_timestamp_seconds";

/// Most spans that wait, as OpenTelemetry's specification has it: some 2 MiB.
const QUEUE: usize = 2048;

/// Most spans in one export, by the same.
const BATCH: usize = 512;

/// How long the last spans may take to be exported when the program ends.
const FLUSH: Duration = Duration::from_secs(3);

/// Takes ended spans. Never waits.
#[derive(Debug)]
pub(super) struct Queue(mpsc::Sender<SpanData>);

impl Queue {
    pub(super) fn bounded() -> (Self, mpsc::Receiver<SpanData>) {
        let (sender, spans) = mpsc::channel(QUEUE);
        (Self(sender), spans)
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.0.try_send(span).is_err() {
            counter!(SPANS, "result" => "dropped").increment(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// A task that exports.
pub(super) struct Export<E> {
    exporter: E,
    spans: mpsc::Receiver<SpanData>,
    batch: Vec<SpanData>,
    /// Longest time of one export.
    deadline: Duration,
    /// How long a span may wait until others fill the batch.
    delay: Duration,
    /// Spans lost since exports began to fail; none while they do not.
    lost: Option<usize>,
    clock: Clock,
}

impl<E: SpanExporter> Export<E> {
    pub(super) fn new(
        exporter: E,
        spans: mpsc::Receiver<SpanData>,
        deadline: Duration,
        delay: Duration,
        clock: Clock,
    ) -> Self {
        Self {
            exporter,
            spans,
            batch: Vec::new(),
            deadline,
            delay,
            lost: None,
            clock,
        }
    }

    /// Exports until `stop`, then what waits.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        while stop.run_until_cancelled(self.gather()).await.is_some() {
            self.export().await;
        }
        self.spans.close();
        loop {
            self.export().await;
            if self.spans.recv_many(&mut self.batch, BATCH).await == 0 {
                return;
            }
        }
    }

    /// Waits for a batch. Cancel-safe: what was taken is in `self.batch`.
    async fn gather(&mut self) {
        let room = BATCH.saturating_sub(self.batch.len());
        if self.spans.recv_many(&mut self.batch, room).await == 0 {
            // Nobody ends spans any more.
            return std::future::pending().await;
        }
        let delay = sleep(self.delay);
        tokio::pin!(delay);
        while self.batch.len() < BATCH {
            let room = BATCH - self.batch.len();
            tokio::select! {
                () = &mut delay => return,
                taken = self.spans.recv_many(&mut self.batch, room) => if taken == 0 {
                    return;
                },
            }
        }
    }

    async fn export(&mut self) {
        let batch = mem::take(&mut self.batch);
        if batch.is_empty() {
            return;
        }
        let count = batch.len();
        let exported = timeout(self.deadline, self.exporter.export(batch)).await;
        let failure = match exported {
            Ok(Ok(())) => None,
            Ok(Err(OTelSdkError::InternalFailure(reason))) => Some(reason),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {:?}", self.deadline)),
        };
        let result = if failure.is_none() {
            "exported"
        } else {
            "failed"
        };
        counter!(SPANS, "result" => result).increment(count as u64);
        self.tell(count, failure);
    }

    /// Says that exports fail, or work again: once, however long it lasts.
    fn tell(&mut self, count: usize, failure: Option<String>) {
        let Some(reason) = failure else {
            #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
            gauge!(LAST_EXPORT).set(self.clock.unix_seconds() as f64);
            if let Some(lost) = self.lost.take() {
                info!(lost, "traces are exported again");
            }
            return;
        };
        if self.lost.is_none() {
            warn!(%reason, "traces cannot be exported; spans are lost until they can");
        }
        *self.lost.get_or_insert(0) += count;
    }
}

/// Runs the program, and exports its spans until it has ended; then what is left.
pub(super) async fn during<E, T>(export: Export<E>, program: impl Future<Output = T>) -> T
where
    E: SpanExporter + 'static,
{
    let mut tasks = Tasks::new(CancellationToken::new());
    tasks.spawn("export of traces", export.run(tasks.shutdown().clone()));
    let ended = program.await;
    tasks.shutdown().cancel();
    // Says itself what did not end in time.
    let _ = tasks.drain(FLUSH).await;
    ended
}

#[cfg(test)]
mod tests;
