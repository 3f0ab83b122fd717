//! The parts of the run, in order.

use std::time::Duration;

use ambient_testing::{
    installation::Installation,
    load::percentile,
    table::{mebibytes, milliseconds},
};
use tokio::time::{Instant, sleep};

use crate::{
    Settings,
    audit::{Audit, rate, span},
    bare::Bare,
    plane::{Plane, Tokens},
    report::Report,
    sessions::{Sessions, waits},
};

const MIB: u64 = 1024 * 1024;

/// Most memory of the control plane.
const MEMORY: u64 = 150 * MIB;

/// Longest first sync.
const SYNC: Duration = Duration::from_secs(30);

/// Longest from the request for a session to its pod, for 99 of 100.
const START: Duration = Duration::from_secs(1);

/// Requests a second that the existing control plane's client allows itself.
const EXISTING_LIMIT: f64 = 50.0;

/// How often is looked whether all is refreshed.
const POLL: Duration = Duration::from_millis(250);

/// Longest wait for that.
const LONGEST: Duration = Duration::from_mins(20);

/// All sessions come to run: most as fast as they can, the last at a steady rate.
pub async fn fill(
    settings: &Settings,
    plane: &mut Plane,
    sessions: &mut Sessions,
    report: &mut Report,
) {
    let steady = (settings.rate as usize * secs(settings.arriving)).min(settings.sessions / 2);
    let bulk = settings.sessions - steady;
    plane.start(Tokens::FIRST).await;
    let before = report.used(plane.pid());
    let begin = Instant::now();
    sessions.create(bulk).await;
    let created = begin.elapsed();
    sessions.until_all_run().await;
    let all_run = begin.elapsed();
    report.fact(
        &format!("{bulk} sessions created at once"),
        format!("{:.0}/s", per_second(bulk, created)),
    );
    report.fact(
        "until they all run",
        format!("{:.0}/s", per_second(bulk, all_run)),
    );
    report.processors("as they come to run", &before, plane.pid());

    let before = report.used(plane.pid());
    let mut audit = Audit::new(plane.cluster().new_requests());
    let arrivals = sessions
        .arrive(settings.rate, |number| number >= steady)
        .await;
    let mut waits = waits(&arrivals, &mut audit).await;
    started(report, settings, &mut waits, "");
    report.processors("while sessions arrive", &before, plane.pid());
    sessions.until_all_run().await;
    audit.update();
    calls(report, "start", &audit, steady);
    memory(report, plane, "all sessions run");
}

/// A control plane that starts finds them all.
pub async fn first_sync(plane: &mut Plane, sessions: &Sessions, report: &mut Report) {
    plane.stop().await;
    // No process yet, so no time of it.
    let before = report.used(0);
    let took = plane.start(Tokens::FIRST).await;
    report.processors("first sync", &before, plane.pid());
    report.target(
        &format!("first sync, {} pages", plane.pages()),
        format!("{:.1} s", took.as_secs_f64()),
        &format!("{} s", SYNC.as_secs()),
        took < SYNC,
    );
    // What it does once it is ready is part of it, and it reports what it knows now and then.
    sleep(Duration::from_secs(10)).await;
    let known = plane.metric("ambient_control_plane_sessions", "").await;
    report.note(format!("{known} sessions are known, of {}", sessions.len()));
    memory(report, plane, "first sync");
}

/// All tokens are due at once. Gives how many were written each second.
pub async fn refresh(plane: &mut Plane, sessions: &Sessions, report: &mut Report) -> f64 {
    let mut audit = Audit::new(plane.cluster().new_requests());
    plane.start(Tokens::SECOND).await;
    let before = report.used(plane.pid());
    until_refreshed(&mut audit, sessions.len()).await;
    report.processors("refresh", &before, plane.pid());
    let times = audit.refreshed();
    report.fact(
        &format!("refresh of {} sessions", times.len()),
        format!("{:.1} s", span(&times).as_secs_f64()),
    );
    report.target(
        "Secrets read for it",
        audit.secrets_read().to_string(),
        "0",
        audit.secrets_read() == 0,
    );
    let all: usize = audit.kinds().values().sum();
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    let calls_each = all as f64 / times.len() as f64;
    report.target(
        "calls per session",
        format!("{calls_each:.3}"),
        "1",
        times.len() == sessions.len() && calls_each < 1.01,
    );
    calls(report, "refresh", &audit, times.len());
    memory(report, plane, "refresh");
    rate(&times)
}

/// The same while sessions arrive.
pub async fn refresh_while_sessions_arrive(
    settings: &Settings,
    plane: &mut Plane,
    sessions: &mut Sessions,
    report: &mut Report,
) {
    let running = sessions.len();
    let mut audit = Audit::new(plane.cluster().new_requests());
    let mut written = Audit::new(plane.cluster().new_requests());
    plane.start(Tokens::THIRD).await;
    let before = report.used(plane.pid());
    let mut looked = Instant::now();
    let most = settings.rate as usize * secs(LONGEST);
    let arrivals = sessions.arrive(settings.rate, |number| {
        // Reading the log takes its time, too.
        if looked.elapsed() > Duration::from_secs(1) {
            written.update();
            looked = Instant::now();
        }
        written.refreshed().len() >= running || number >= most
    });
    let arrivals = arrivals.await;
    let mut waits = waits(&arrivals, &mut audit).await;
    let times = audit.refreshed();
    started(report, settings, &mut waits, " during a refresh");
    report.fact(
        "refresh meanwhile",
        format!("{:.0}/s, {:.1} s", rate(&times), span(&times).as_secs_f64()),
    );
    report.processors("refresh while sessions arrive", &before, plane.pid());
    sessions.until_all_run().await;
    memory(report, plane, "refresh while sessions arrive");
}

/// The same refresh in other ways.
pub async fn compare(
    settings: &Settings,
    installation: &Installation,
    sessions: &Sessions,
    ours: f64,
    report: &mut Report,
) {
    let sample: Vec<_> = sessions.secrets().take(settings.sample).collect();
    let bare = Bare::new(&installation.cluster);
    let bound = per_second(sample.len(), bare.at_once(&sample, 16).await);
    report.fact(
        &format!("bare writes, 16 at once ({} sessions)", sample.len()),
        format!("{bound:.0}/s"),
    );
    report.target(
        "refresh, of the bare writes",
        format!("{ours:.0}/s, {:.0} %", ours / bound * 100.0),
        "80 %",
        ours >= bound * 0.8,
    );
    let unlimited = per_second(sample.len(), bare.one_by_one(&sample, None).await);
    report.fact(
        &format!("one by one, read and write ({} sessions)", sample.len()),
        format!("{unlimited:.0}/s, {:.1} times slower", ours / unlimited),
    );
    let sample: Vec<_> = sessions.secrets().take(settings.sample / 4).collect();
    let limited = bare.one_by_one(&sample, Some(EXISTING_LIMIT)).await;
    let limited = per_second(sample.len(), limited);
    report.target(
        &format!(
            "the same with {EXISTING_LIMIT} requests a second ({} sessions)",
            sample.len()
        ),
        format!("{limited:.0}/s, {:.1} times slower", ours / limited),
        "10",
        ours >= limited * 10.0,
    );
}

async fn until_refreshed(audit: &mut Audit, count: usize) {
    let deadline = Instant::now() + LONGEST;
    loop {
        audit.update();
        if audit.refreshed().len() >= count {
            return;
        }
        assert!(Instant::now() < deadline, "not all tokens are refreshed");
        sleep(POLL).await;
    }
}

fn started(report: &mut Report, settings: &Settings, waits: &mut [Duration], when: &str) {
    let (half, most) = (percentile(waits, 0.5), percentile(waits, 0.99));
    let what = format!("event to pod, {}/s arrive{when}", settings.rate);
    report.fact(&format!("{what}, p50"), milliseconds(half));
    report.target(
        &format!("{what}, p99 of {}", waits.len()),
        milliseconds(most),
        "1000 ms",
        most < START,
    );
}

fn calls(report: &mut Report, what: &str, audit: &Audit, sessions: usize) {
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    let each = |count: usize| count as f64 / sessions.max(1) as f64;
    let kinds = audit.kinds();
    let kinds = kinds
        .iter()
        .map(|(kind, count)| format!("{kind} {:.2}", each(*count)));
    let kinds: Vec<_> = kinds.collect();
    report.note(format!("calls per session, {what}: {}", kinds.join(", ")));
    let refused = audit.refused();
    if !refused.is_empty() {
        report.note(format!("answers without success, {what}: {refused:?}"));
    }
}

fn memory(report: &mut Report, plane: &Plane, when: &str) {
    let (now, most) = plane.memory();
    report.target(
        &format!("memory, {when}: now, most"),
        format!("{}, {}", mebibytes(now), mebibytes(most)),
        "150 MiB",
        most < MEMORY,
    );
}

fn per_second(count: usize, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    let count = count as f64;
    count / time.as_secs_f64().max(f64::EPSILON)
}

fn secs(duration: Duration) -> usize {
    usize::try_from(duration.as_secs()).unwrap_or(usize::MAX)
}
