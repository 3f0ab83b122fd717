//! The refresh ticker: nobody is missed, nobody is written without need.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use ambient_control_plane::{
    metrics::{EARLIEST_EXPIRY, HANDLER_RUNS, LIFE_USED, OLDEST_ISSUE, REFRESHES},
    refresh::Interval,
};
use ambient_shared::{clock::Clock, telemetry::MetricsPage};

use crate::scene::{Call, FakeApi, Plan, Scene, count, id};

fn name(number: usize) -> String {
    format!("session-{number:05}")
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn now_since_epoch() -> Duration {
    secs(Clock::system().unix_seconds())
}

/// Tokens live an hour and are looked at every 20 minutes: the first tick is all there is.
fn one_tick() -> Plan {
    Plan {
        refresh: Interval::Auto,
        token_life: secs(3600),
        ..Plan::default()
    }
}

#[tokio::test]
async fn of_1000_sessions_over_10_pages_nobody_is_missed_or_written_twice() {
    const SESSIONS: usize = 1000;
    let finished = Arc::new(Mutex::new(Vec::new()));
    let scene = Scene::start(one_tick(), |api, backend| {
        for number in 0..SESSIONS {
            api.create(&name(number), |session| {
                session.phase = Some("Running".to_owned());
                session.project_id = Some(format!("project-{}", number % 7));
            });
            backend.runs(&name(number), 0);
            // Every tenth has a fresh token.
            let left = if number % 10 == 0 { 3500 } else { 60 };
            backend.has_token(&name(number), secs(3600 - left), secs(left));
        }
        api.set(|api| api.page_cap = 100);
        // While the refresh reads page after page, sessions of the first page finish, so that
        // those of every later page move to the page before.
        let finished = Arc::clone(&finished);
        api.on_page(move |api, phase, page| {
            if phase != Some("Running") {
                return;
            }
            for number in (page as usize * 5)..(page as usize * 5 + 5) {
                api.change(&name(number), |it| it.phase = Some("Completed".to_owned()));
                finished.lock().unwrap().push(number);
            }
        });
    })
    .await;

    let is_finished = |number: &usize| finished.lock().unwrap().contains(number);
    scene
        .until("all pages read and all tokens written", |scene| {
            let pages = scene.api.ask(|api| api.pages);
            let written = count(scene.backend.writes());
            let done = |number| {
                number % 10 == 0 || is_finished(&number) || written.contains_key(&id(&name(number)))
            };
            pages >= 20 && (0..SESSIONS).all(done)
        })
        .await;
    scene.settle("session-sentinel").await;

    let written = count(scene.backend.writes());
    assert!(
        written.values().all(|writes| *writes == 1),
        "written twice without need"
    );
    let fresh = (0..SESSIONS).filter(|number| number % 10 == 0);
    for number in fresh {
        assert!(
            !written.contains_key(&id(&name(number))),
            "{number} was fresh"
        );
    }
    assert_eq!(
        scene.api.ask(|api| api.restricted),
        0,
        "lists were of one project only"
    );
    assert_eq!(
        scene.api.ask(|api| api.lists[&Some("Running".to_owned())]),
        1
    );
    scene.stop().await;
}

#[tokio::test]
async fn the_times_that_are_shown_are_those_of_the_tokens_that_are_there() {
    let page = MetricsPage::default();
    let _recorder = metrics::set_default_local_recorder(&page);
    let scene = Scene::start(one_tick(), |api, backend| {
        api.create_in("session-old", "Running");
        backend.runs("session-old", 0);
        backend.has_token("session-old", secs(3600), secs(1));
    })
    .await;
    let shown = |name: &str| -> Option<f64> {
        let page = page.render();
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(|value| value.parse().unwrap())
    };
    scene
        .until("written", |scene| !scene.backend.writes().is_empty())
        .await;
    // Since the only tick.
    let left = |expiry: f64| Duration::from_secs_f64(expiry) > now_since_epoch() + secs(60);
    scene
        .until("shown", |_| shown(EARLIEST_EXPIRY).is_some_and(left))
        .await;
    assert!(shown(LIFE_USED) < Some(0.5), "{}", page.render());

    // One that never expires is good however old.
    scene
        .backend
        .has_endless_token("session-old", secs(1 << 20));
    scene
        .until("shown", |_| shown(OLDEST_ISSUE) == Some(f64::INFINITY))
        .await;
    assert_eq!(shown(LIFE_USED), Some(0.0));
    scene.stop().await;
}

#[tokio::test]
async fn sessions_that_the_cache_has_missed_are_refreshed_too_and_learned_of() {
    // The feed learns of nothing: its lists fail, and the watch is deaf.
    let scene = Scene::start(one_tick(), |api, backend| {
        for number in 0..50 {
            api.create_in(&name(number), "Running");
            backend.runs(&name(number), 0);
            backend.has_token(&name(number), secs(3600), secs(1));
        }
        api.set(|api| (api.deaf, api.full_lists_fail, api.page_cap) = (true, true, 10));
    })
    .await;
    scene
        .until("all written", |scene| {
            count(scene.backend.writes()).len() == 50
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn tokens_stay_fresh_while_the_api_server_is_away() {
    stays_fresh(|api| api.set(|api| api.down = true)).await;
}

#[tokio::test]
async fn tokens_stay_fresh_while_the_api_server_hangs() {
    stays_fresh(|api| api.set(|api| api.hold_pages = true)).await;
}

/// Tokens of six seconds, and an API server that knows of no session.
async fn stays_fresh(fault: impl FnOnce(&FakeApi)) {
    let plan = Plan {
        refresh: Interval::Auto,
        token_life: secs(6),
        lag: Duration::from_millis(200),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |api, backend| {
        fault(api);
        backend.runs("session-a", 2);
        backend.has_token("session-a", secs(2), secs(1));
    })
    .await;
    for writes in 1..=4 {
        scene
            .until("written", |scene| scene.backend.writes().len() >= writes)
            .await;
        let expiry = scene
            .backend
            .token("session-a")
            .unwrap()
            .expires_at
            .unwrap();
        assert!(expiry > Clock::system().now());
    }
    assert!(
        scene
            .issuer
            .subjects()
            .iter()
            .all(|subject| subject.generation == 2)
    );
    scene.stop().await;
}

#[tokio::test]
async fn a_write_that_fails_is_tried_again_before_the_next_tick() {
    // What fails is tried again after parts of this: one second, two, four.
    let plan = Plan {
        refresh: Interval::Every(secs(40)),
        token_life: secs(3600),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |api, backend| {
        for name in ["session-a", "session-b"] {
            api.create_in(name, "Running");
            backend.runs(name, 0);
            backend.has_token(name, secs(3599), secs(1));
        }
        backend.fail_writes("session-a", 3);
    })
    .await;
    scene
        .until("both written", |scene| {
            count(scene.backend.writes()).len() == 2
        })
        .await;
    assert_eq!(scene.backend.tries(&Call::Write(id("session-a"))), 4);
    assert_eq!(scene.backend.tries(&Call::Write(id("session-b"))), 1);
    scene.stop().await;
}

#[tokio::test]
async fn a_deleted_secret_is_made_again_at_once() {
    let scene = Scene::start(one_tick(), |_, _| {}).await;
    scene.settle("session-a").await;
    assert!(
        scene.backend.writes().is_empty(),
        "the start wrote the first token"
    );
    scene.backend.lose_token("session-a");
    scene
        .until("it is there again", |scene| {
            scene.backend.token("session-a").is_some()
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn tokens_are_replaced_in_time_tick_after_tick() {
    let plan = Plan {
        refresh: Interval::Auto,
        token_life: secs(9),
        lag: Duration::from_millis(100),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |_, _| {}).await;
    for number in 0..20 {
        scene.api.create(&name(number), |_| {});
    }
    let expired = || {
        let now = Clock::system().now();
        let token = |number| scene.backend.token(&name(number));
        let expiries = (0..20).filter_map(token).filter_map(|it| it.expires_at);
        expiries.filter(|expiry| *expiry <= now).count()
    };
    scene
        .until("each was renewed twice", |scene| {
            assert_eq!(expired(), 0);
            let written = count(scene.backend.writes());
            (0..20).all(|number| written.get(&id(&name(number))).is_some_and(|it| *it >= 2))
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn finished_and_deleted_sessions_get_no_token() {
    let scene = Scene::start(one_tick(), |api, backend| {
        api.create_in("session-completed", "Completed");
        api.create_in("session-running", "Running");
        for name in ["session-completed", "session-running"] {
            backend.runs(name, 0);
            backend.has_token(name, secs(3600), secs(1));
        }
        backend.ends("session-completed", 0);
    })
    .await;
    scene
        .until("the other is written", |scene| {
            !scene.backend.writes().is_empty()
        })
        .await;
    scene.settle("session-sentinel").await;
    assert_eq!(scene.backend.writes(), [id("session-running")]);
    scene.stop().await;
}

#[tokio::test]
async fn new_sessions_and_upkeep_do_not_wait_for_each_other() {
    let plan = Plan {
        refresh: Interval::Every(Duration::from_millis(300)),
        token_life: secs(2),
        lag: Duration::from_millis(100),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |api, backend| {
        // Every worker for new sessions hangs in a start.
        backend.close_gate();
        for number in 0..50 {
            api.create(&name(number), |_| {});
        }
        api.create_in("session-running", "Running");
        backend.runs("session-running", 0);
        backend.has_token("session-running", secs(2), secs(0));
        api.create_in("session-stopping", "Stopping");
        backend.runs("session-stopping", 0);
    })
    .await;
    scene
        .until("tokens are written", |scene| {
            count(scene.backend.writes()).get(&id("session-running")) >= Some(&2)
        })
        .await;
    let stop = Call::Stop(id("session-stopping"));
    scene
        .until("sessions are stopped", |scene| {
            scene.backend.count(&stop) >= 1
        })
        .await;
    scene.backend.open_gate();
    scene.stop().await;
}

#[tokio::test]
async fn work_that_hangs_is_counted_as_failed() {
    let page = MetricsPage::default();
    let _recorder = metrics::set_default_local_recorder(&page);
    let scene = Scene::start(one_tick(), |api, backend| {
        backend.close_gate();
        api.create("session-starting", |_| {});
        api.create_in("session-running", "Running");
        backend.runs("session-running", 0);
        backend.has_token("session-running", secs(3599), secs(1));
        backend.hang_writes("session-running");
    })
    .await;
    let write = Call::Write(id("session-running"));
    scene
        .until("both hang", |scene| {
            let creating = scene.api.phase("session-starting").as_deref() == Some("Creating");
            creating && scene.backend.tries(&write) == 1
        })
        .await;
    let failed = [
        format!("{HANDLER_RUNS}{{handler=\"provision\",result=\"failed\"}} "),
        format!("{REFRESHES}{{result=\"failed\"}} "),
    ];
    let told = |line: &String| page.render().contains(line);
    assert!(!failed.iter().any(told), "{}", page.render());

    // More than the time that each may take.
    tokio::time::pause();
    tokio::time::sleep(secs(130)).await;
    tokio::time::resume();

    assert!(failed.iter().all(told), "{}", page.render());
    scene.backend.open_gate();
}

#[tokio::test]
async fn a_ticker_that_is_off_writes_nothing() {
    let scene = Scene::start(Plan::default(), |api, backend| {
        api.create_in("session-a", "Running");
        backend.runs("session-a", 0);
        backend.has_token("session-a", secs(3600), secs(1));
    })
    .await;
    scene.settle("session-b").await;
    scene.backend.lose_token("session-b");
    scene.settle("session-c").await;
    assert!(scene.backend.writes().is_empty());
    scene.stop().await;
}
