//! What of an exchange is in the log, and what a flood keeps out of it.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::scene::{ACTIVE, Client, NoIssuer, Setup};

/// Counts the warnings that a session has no token.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "ambient_control_plane::endpoint::exchange"
            && *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl Visit for Warnings {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" && format!("{value:?}") == "no token for a session" {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[tokio::test]
async fn a_flood_of_refusals_hides_no_line_about_the_issuer() {
    let warnings = Warnings::default();
    // All tasks of this test run on its own thread, so this sees only them.
    let _logging = tracing::subscriber::set_default(warnings.clone());
    let setup = Setup {
        issuer: Some(Arc::new(NoIssuer)),
        ..Setup::default()
    };
    let scene = setup.start().await;
    let mut stranger = Client::connect(scene.address).await;
    for _ in 0..1000 {
        assert_eq!(stranger.ask("GET /token", "").await, 401);
    }

    // More than there is room for by the time that these take.
    let bearer = scene.bearer(ACTIVE);
    let mut runner = Client::connect(scene.address).await;
    for _ in 0..100 {
        let headers = scene.headers(ACTIVE, &bearer);
        assert_eq!(runner.ask("GET /token", &headers).await, 500);
    }

    assert_eq!(warnings.0.load(Ordering::SeqCst), 100);
}
