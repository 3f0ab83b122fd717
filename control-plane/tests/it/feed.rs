//! Lists and watch: whatever is lost, late or old, the controller ends up with what is true.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::{phase::Phase, session::SessionId};
use ambient_testing::faults::Mode;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::scene::{Call, Plan, Scene, count, id};

fn name(number: usize) -> String {
    format!("session-{number:05}")
}

fn started(scene: &Scene, name: &str) -> usize {
    scene.backend.count(&Call::Start(id(name), 0))
}

fn removed(scene: &Scene) -> Vec<SessionId> {
    let calls = scene.backend.calls().into_iter();
    let removal = |call| match call {
        Call::Remove(id) => Some(id),
        _ => None,
    };
    calls.filter_map(removal).collect()
}

#[tokio::test]
async fn many_sessions_at_start_block_nothing() {
    let scene = Scene::start(Plan::default(), |api, _| {
        for number in 0..700 {
            api.create(&name(number), |_| {});
        }
    })
    .await;

    scene
        .until("all run", |scene| {
            (0..700).all(|number| scene.api.phase(&name(number)).as_deref() == Some("Running"))
        })
        .await;

    let starts = scene.backend.calls().into_iter().map(|call| match call {
        Call::Start(id, 0) => id,
        other => panic!("{other:?}"),
    });
    assert!(count(starts).values().all(|starts| *starts == 1));
    scene.stop().await;
}

#[tokio::test]
async fn events_are_read_while_a_list_hangs() {
    let scene = Scene::start(Plan::default(), |api, _| {
        api.create("session-old", |_| {});
        api.set(|api| api.hold_pages = true);
    })
    .await;
    scene
        .until("the list hangs", |scene| scene.api.ask(|api| api.held) > 0)
        .await;

    // More events than an existing server keeps for a slow reader.
    for number in 0..600 {
        scene.api.create(&name(number), |_| {});
        tokio::task::yield_now().await;
    }

    scene.until_phase(&name(599), "Running").await;
    assert!(!scene.cache.is_synced());
    scene.api.send_pages();
    scene.until_phase("session-old", "Running").await;
    scene.stop().await;
}

#[tokio::test]
async fn events_lost_while_the_watch_was_down_are_healed_by_the_next_list() {
    let scene = Scene::start(Plan::default(), |api, _| {
        api.create("session-kept", |_| {});
        api.create("session-gone", |_| {});
        api.create("session-stopped", |_| {});
    })
    .await;
    for name in ["session-kept", "session-gone", "session-stopped"] {
        scene.until_phase(name, "Running").await;
    }

    scene.api.set(|api| api.deaf = true);
    scene.api.delete("session-gone");
    scene.api.create("session-new", |_| {});
    scene.api.change("session-stopped", |it| {
        it.phase = Some("Stopping".to_owned());
    });
    scene.api.set(|api| api.deaf = false);
    scene.api.cut_watches();

    scene.until_phase("session-new", "Running").await;
    scene
        .until("the deleted one removed", |scene| {
            removed(scene) == [id("session-gone")]
        })
        .await;
    let stop = Call::Stop(id("session-stopped"));
    scene
        .until("the other stopped", |scene| scene.backend.count(&stop) == 1)
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn a_watch_that_says_nothing_is_healed_by_the_resync_and_opened_again() {
    let plan = Plan {
        resync: Duration::from_millis(500),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |api, _| api.create("session-kept", |_| {})).await;
    scene.until_phase("session-kept", "Running").await;

    scene.api.set(|api| api.deaf = true);
    scene.api.create("session-new", |_| {});
    scene.api.delete("session-kept");

    scene.until_phase("session-new", "Running").await;
    scene
        .until("the deleted one removed", |scene| {
            removed(scene) == [id("session-kept")]
        })
        .await;
    scene
        .until("a second watch", |scene| {
            scene.api.ask(|api| api.watches) > 1
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn a_watch_that_tells_while_a_list_is_read_is_kept() {
    let plan = Plan {
        resync: Duration::from_millis(500),
        ..Plan::default()
    };
    let changed = "session-000";
    let scene = Scene::start(plan, |api, _| {
        for number in 0..100 {
            api.create_in(&format!("session-{number:03}"), "Completed");
        }
        api.set(|api| api.page_cap = 5);
    })
    .await;
    // Changed after one list has read its first page, told of after the next one has.
    let mut pages = 0;
    let told = Arc::new(AtomicBool::new(false));
    let tells = Arc::clone(&told);
    scene.api.on_page(move |api, phase, page| {
        if (phase, page) != (None, 2) {
            return;
        }
        pages += 1;
        match pages {
            1 => {
                api.set(|api| api.deaf = true);
                api.change(changed, |it| it.name = "another".to_owned());
                api.set(|api| api.deaf = false);
            }
            2 => {
                api.replay(api.get(changed).unwrap());
                tells.store(true, Ordering::Release);
            }
            _ => {}
        }
    });
    scene
        .until("it is told of", |_| told.load(Ordering::Acquire))
        .await;

    // Longer than a watch may lag behind a list.
    let lists = |scene: &Scene| scene.api.ask(|api| api.lists[&None]);
    let enough = lists(&scene) + 14;
    scene
        .until("many lists", |scene| lists(scene) >= enough)
        .await;
    assert_eq!(scene.api.ask(|api| api.watches), 1);
    scene.stop().await;
}

#[tokio::test]
async fn a_first_list_that_fails_is_repeated_until_it_is_complete() {
    let scene = Scene::start(Plan::default(), |api, _| {
        for number in 0..40 {
            api.create(&name(number), |_| {});
        }
        // The second page fails again and again.
        api.set(|api| (api.page_cap, api.failing_pages) = (10, (8, 2)));
    })
    .await;
    scene.until_phase(&name(39), "Running").await;
    assert!(scene.cache.is_synced());
    scene.stop().await;
}

#[tokio::test]
async fn lists_go_over_grpc_where_rest_refuses_the_token() {
    let scene = Scene::start(Plan::default(), |api, _| {
        for number in 0..700 {
            api.create(&name(number), |_| {});
        }
        api.set(|api| api.rest_refuses = true);
    })
    .await;
    scene
        .until("all run", |scene| {
            (0..700).all(|number| scene.api.phase(&name(number)).as_deref() == Some("Running"))
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn a_server_that_is_silent_before_the_first_event_is_followed() {
    let scene = Scene::start(Plan::default(), |api, _| {
        api.create("session-old", |_| {});
        api.set(|api| api.quiet = true);
    })
    .await;
    scene.until_phase("session-old", "Running").await;
    scene.settle("session-new").await;
    assert_eq!(scene.api.ask(|api| api.watches), 1);
    scene.stop().await;
}

#[tokio::test]
async fn pages_that_shift_lose_and_delete_nobody() {
    let scene = Scene::start(Plan::default(), |api, _| {
        for number in 0..200 {
            api.create(&name(number), |_| {});
        }
        api.set(|api| api.page_cap = 20);
        let mut next = 0;
        api.on_page(move |api, _, page| {
            // From the first pages, so that one session slips from each later page to the one
            // before it, which has been read.
            if page < 8 && next < 7 {
                api.delete(&name(next));
                next += 1;
            }
        });
    })
    .await;
    scene
        .until("all that are left run", |scene| {
            (7..200).all(|number| scene.api.phase(&name(number)).as_deref() == Some("Running"))
        })
        .await;
    scene.settle("session-sentinel").await;
    assert!(
        removed(&scene)
            .iter()
            .all(|id| id.as_str() < "session-00007")
    );
    scene.stop().await;
}

#[tokio::test]
async fn a_session_that_a_list_has_missed_is_not_taken_for_deleted() {
    let scene = Scene::start(Plan::default(), |api, _| {
        api.create("session-a", |_| {});
        api.create("session-b", |_| {});
    })
    .await;
    scene.until_phase("session-b", "Running").await;
    scene.until_phase("session-a", "Running").await;

    // The next list does not have it, as if it had slipped through; but it is there.
    let hidden = scene.api.get("session-b").unwrap();
    let mut hide = true;
    scene.api.on_page({
        let hidden = hidden.clone();
        move |api, _, _| {
            if std::mem::take(&mut hide) {
                api.set(|state| state.insert(hidden.clone()));
            }
        }
    });
    let gets = scene.api.set(|api| {
        api.take("session-b");
        api.gets
    });
    scene.api.cut_watches();
    scene
        .until("it is asked for", |scene| {
            scene.api.ask(|api| api.gets) > gets
        })
        .await;
    scene.settle("session-sentinel").await;
    assert_eq!(removed(&scene), []);
    assert_eq!(
        scene.cache.get(&id("session-b")).unwrap().phase,
        Phase::Running
    );
    scene.stop().await;
}

#[tokio::test]
async fn leftovers_are_removed_only_when_the_api_server_says_they_are_gone() {
    let scene = Scene::start(Plan::default(), |api, backend| {
        api.create("session-kept", |_| {});
        backend.runs("session-orphan", 0);
        api.set(|api| {
            api.failing_pages = (3, 1);
            api.gets_fail = true;
        });
    })
    .await;
    // A list that fails says nothing about it, and neither does an answer that fails.
    scene
        .until("it is asked for", |scene| scene.api.ask(|api| api.gets) > 2)
        .await;
    assert!(scene.cache.is_synced());
    assert_eq!(scene.backend.tries(&Call::Remove(id("session-orphan"))), 0);

    scene.api.set(|api| api.gets_fail = false);
    scene
        .until("it is removed", |scene| {
            removed(scene) == [id("session-orphan")]
        })
        .await;
    scene.stop().await;
}

#[tokio::test]
async fn an_old_snapshot_after_a_newer_event_changes_nothing() {
    let scene = Scene::start(Plan::default(), |api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    let running = scene.api.get("session-a").unwrap();
    let mut pending = running.clone();
    pending.phase = None;
    pending.updated_at = Some("2025-01-01T00:00:00Z".parse().unwrap());
    scene.backend.ends("session-a", 0);
    scene.until_phase("session-a", "Completed").await;

    scene.api.replay(running);
    scene.api.replay(pending);
    scene.settle("session-sentinel").await;
    scene
        .until("it is asked for", |scene| {
            scene.api.ask(|api| api.gets) >= 1
        })
        .await;
    scene.settle("session-sentinel-2").await;

    assert_eq!(
        scene.cache.get(&id("session-a")).unwrap().phase,
        Phase::Completed
    );
    assert_eq!(started(&scene, "session-a"), 1);
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Completed"));
    scene.stop().await;
}

#[tokio::test]
async fn a_deleted_session_is_not_provisioned_again_by_a_late_page() {
    let scene = Scene::start(Plan::default(), |_, _| {}).await;
    scene.until("synced", |scene| scene.cache.is_synced()).await;
    scene.settle("session-a").await;

    // A list reads the session, then it is deleted and removed, then the page arrives.
    scene.api.set(|api| api.hold_pages = true);
    scene.api.cut_watches();
    scene
        .until("the page is made", |scene| {
            scene.api.ask(|api| api.held) > 0
        })
        .await;
    scene
        .until("the watch is open", |scene| {
            scene.api.ask(|api| api.watches) > 1
        })
        .await;
    scene.api.delete("session-a");
    scene
        .until("it is removed", |scene| removed(scene) == [id("session-a")])
        .await;
    scene.api.send_pages();

    scene.settle("session-sentinel").await;
    assert_eq!(started(&scene, "session-a"), 1);
    assert!(scene.cache.get(&id("session-a")).is_none());
    scene.stop().await;
}

#[tokio::test]
async fn a_deletion_during_the_start_leaves_nothing_behind() {
    let scene = Scene::start(Plan::default(), |api, backend| {
        backend.close_gate();
        api.create("session-a", |_| {});
    })
    .await;
    scene.until_phase("session-a", "Creating").await;
    scene.api.delete("session-a");
    scene
        .until("it is known", |scene| {
            scene.cache.is_deleted(&id("session-a"))
        })
        .await;
    scene.backend.open_gate();
    scene
        .until("it is removed", |scene| removed(scene) == [id("session-a")])
        .await;
    assert!(scene.backend.is_empty());
    scene.stop().await;
}

#[tokio::test]
async fn sessions_that_cannot_be_used_stop_nobody_else() {
    let scene = Scene::start(Plan::default(), |api, _| {
        api.create("short", |_| {});
        api.create("with a space", |_| {});
        api.create_in("session-from-the-future", "Hibernating");
        api.create("session-a", |_| {});
    })
    .await;
    scene.until_phase("session-a", "Running").await;
    scene.api.delete("with a space");
    scene.settle("session-b").await;
    assert_eq!(scene.backend.calls().len(), 2);
    scene.stop().await;
}

#[tokio::test]
async fn a_watch_that_hangs_is_healed_by_the_resync() {
    let plan = Plan {
        relay: true,
        resync: Duration::from_secs(1),
        ..Plan::default()
    };
    let scene = Scene::start(plan, |_, _| {}).await;
    scene.settle("session-a").await;
    let relay = scene.relay.as_ref().unwrap();

    // Open, but nothing arrives any more.
    relay.set(Mode::HalfOpen).await;
    scene.api.create("session-b", |_| {});
    scene
        .until("it is known", |scene| {
            scene.cache.get(&id("session-b")).is_some()
        })
        .await;

    relay.set(Mode::Pass).await;
    scene.until_phase("session-b", "Running").await;
    scene.stop().await;
}

#[tokio::test]
async fn a_connection_that_is_reset_is_opened_again() {
    let plan = Plan {
        relay: true,
        ..Plan::default()
    };
    let scene = Scene::start(plan, |_, _| {}).await;
    scene.settle("session-a").await;
    let relay = scene.relay.as_ref().unwrap();

    relay.set(Mode::Refuse).await;
    relay.reset();
    scene.api.create("session-b", |_| {});
    scene.api.delete("session-a");
    relay.set(Mode::Pass).await;

    scene.until_phase("session-b", "Running").await;
    scene
        .until("the other is removed", |scene| {
            removed(scene) == [id("session-a")]
        })
        .await;
    scene.stop().await;
}

/// Keeps the waits before reconnects that the feed logs, in seconds.
#[derive(Debug, Clone, Default)]
struct Waits(Arc<Mutex<Vec<f64>>>);

impl Waits {
    fn so_far(&self) -> Vec<f64> {
        self.0.lock().unwrap().clone()
    }
}

impl Subscriber for Waits {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "ambient_control_plane::sessions::feed"
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

impl Visit for Waits {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == "retry_in_s" {
            self.0.lock().unwrap().push(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[tokio::test]
async fn after_a_good_connection_the_first_reconnect_is_quick_again() {
    let waits = Waits::default();
    // All tasks of this test run on its own thread, so this sees only them.
    let _logging = tracing::subscriber::set_default(waits.clone());
    let scene = Scene::start(Plan::default(), |api, _| api.set(|api| api.down = true)).await;
    // Enough failures for waits of seconds.
    scene
        .until("failures", |scene| scene.api.ask(|api| api.watches) >= 5)
        .await;
    scene.api.set(|api| api.down = false);
    scene.until("synced", |scene| scene.cache.is_synced()).await;
    // A good connection: one that lasts.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let (watches, before) = (scene.api.ask(|api| api.watches), waits.so_far());
    assert!(before.len() >= 4, "{before:?}");

    scene.api.cut_watches();
    scene
        .until("open again", |scene| {
            scene.api.ask(|api| api.watches) > watches
        })
        .await;
    // Without the reset it would be up to 8 s.
    let wait = waits.so_far()[before.len()];
    assert!(wait <= 0.25, "{wait} s after {before:?}");
    scene.stop().await;
}

#[tokio::test]
async fn a_server_that_ends_every_watch_is_not_asked_without_a_pause() {
    let scene = Scene::start(Plan::default(), |api, _| {
        // Each list ends the watch that was opened before it.
        api.on_page(|api, _, _| api.cut_watches());
    })
    .await;
    scene
        .until("some watches", |scene| {
            scene.api.ask(|api| api.watches) >= 2
        })
        .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    // Bounds of 0.25, 0.5, 1, 2, 4 s: some 6 on average, never dozens.
    let watches = scene.api.ask(|api| api.watches);
    assert!(watches < 20, "{watches} watches in 5 s");
    scene.stop().await;
}
