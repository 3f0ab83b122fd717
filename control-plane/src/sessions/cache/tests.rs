use ambient_shared::{phase::Phase, proto};
use proptest::prelude::*;

use super::*;

const ID: &str = "session-0001";

fn id() -> SessionId {
    SessionId::parse(ID).unwrap()
}

/// A session whose last change was at this second; 0: nobody says.
fn at(second: i64, phase: &str) -> Session {
    let mut time = ambient_shared::rest::Session {
        id: ID.to_owned(),
        phase: Some(phase.to_owned()),
        ..Default::default()
    };
    if second > 0 {
        let text = format!("2026-01-01T00:00:{second:02}Z");
        time.updated_at = Some(text.parse().unwrap());
    }
    proto::Session::from(time).try_into().unwrap()
}

fn phase(cache: &SessionCache) -> Option<Phase> {
    cache.get(&id()).map(|session| session.phase)
}

fn seen(ids: &[&str]) -> HashSet<SessionId> {
    ids.iter()
        .map(|id| SessionId::parse(*id).unwrap())
        .collect()
}

#[test]
fn an_old_snapshot_never_replaces_a_newer_one() {
    let cache = SessionCache::new();
    assert_eq!(cache.apply_event(at(1, "Pending")), Applied::Changed);
    let since = cache.revision();
    assert_eq!(cache.apply_event(at(3, "Running")), Applied::Changed);

    // A page that was read before the event, and an event that is replayed after it.
    assert_eq!(cache.apply_read(at(1, "Pending"), since), Applied::Nothing);
    assert_eq!(cache.apply_event(at(2, "Creating")), Applied::Suspect);
    assert_eq!(phase(&cache), Some(Phase::Running));

    assert_eq!(cache.apply_read(at(4, "Stopping"), since), Applied::Changed);
    assert_eq!(phase(&cache), Some(Phase::Stopping));
}

#[test]
fn without_times_what_was_read_first_is_older() {
    for second in [0, 5] {
        let cache = SessionCache::new();
        cache.apply_event(at(second, "Pending"));
        let since = cache.revision();
        assert_eq!(cache.apply_event(at(second, "Creating")), Applied::Changed);
        assert_eq!(
            cache.apply_read(at(second, "Pending"), since),
            Applied::Nothing
        );
        let now = cache.revision();
        assert_eq!(
            cache.apply_read(at(second, "Running"), now),
            Applied::Changed
        );
        assert_eq!(phase(&cache), Some(Phase::Running));
    }
}

#[test]
fn the_same_object_again_is_no_news() {
    let cache = SessionCache::new();
    cache.apply_event(at(1, "Pending"));
    let revision = cache.revision();
    assert_eq!(cache.apply_event(at(1, "Pending")), Applied::Nothing);
    assert_eq!(cache.revision(), revision);
}

#[test]
fn a_late_page_does_not_revive_a_deleted_session() {
    let cache = SessionCache::new();
    cache.apply_event(at(1, "Running"));
    let list = cache.revision();
    assert!(cache.delete(&id()));
    assert!(!cache.delete(&id()));
    cache.set_cleaned(&id());

    assert_eq!(cache.apply_read(at(1, "Running"), list), Applied::Nothing);
    // That list completes: it began before the deletion, so another such page may be on its way.
    assert!(cache.complete_list(&seen(&[ID]), list).is_empty());
    assert!(cache.is_deleted(&id()));
    assert_eq!(cache.apply_read(at(1, "Running"), list), Applied::Nothing);
    assert_eq!(phase(&cache), None);

    // One that began after it settles the matter.
    let later = cache.revision();
    assert!(cache.complete_list(&seen(&[]), later).is_empty());
    assert!(!cache.is_deleted(&id()));
}

#[test]
fn a_tombstone_stays_until_its_clean_up_succeeded() {
    let cache = SessionCache::new();
    cache.apply_event(at(1, "Running"));
    cache.delete(&id());
    for _ in 0..3 {
        cache.complete_list(&seen(&[]), cache.revision());
        assert!(cache.is_deleted(&id()));
        assert_eq!(cache.uncleaned(), [id()]);
    }
    cache.set_cleaned(&id());
    assert!(cache.uncleaned().is_empty());
    cache.complete_list(&seen(&[]), cache.revision());
    assert!(!cache.knows(&id()));
}

#[test]
fn a_session_that_a_list_does_not_have_is_asked_for_not_deleted() {
    let cache = SessionCache::new();
    cache.apply_event(at(1, "Running"));
    assert!(!cache.is_synced());
    let missing = cache.complete_list(&seen(&[]), cache.revision());
    assert_eq!(missing, [id()]);
    assert!(cache.is_synced());
    assert_eq!(phase(&cache), Some(Phase::Running));

    // One that came after the list began is not missing from it.
    let cache = SessionCache::new();
    let since = cache.revision();
    cache.apply_event(at(1, "Running"));
    assert!(cache.complete_list(&seen(&[]), since).is_empty());
}

#[test]
fn a_single_read_is_the_last_word_unless_overtaken() {
    let cache = SessionCache::new();
    cache.apply_event(at(9, "Running"));
    // The API server's clock went back.
    let since = cache.revision();
    let settled = cache.confirm(&id(), Some(at(2, "Stopping")), since);
    assert_eq!(settled, Confirmed::Settled { changed: true });
    assert_eq!(phase(&cache), Some(Phase::Stopping));

    let since = cache.revision();
    cache.apply_event(at(3, "Stopped"));
    assert_eq!(cache.confirm(&id(), None, since), Confirmed::Overtaken);
    let late = cache.confirm(&id(), Some(at(2, "Stopping")), since);
    assert_eq!(late, Confirmed::Settled { changed: false });
    assert_eq!(phase(&cache), Some(Phase::Stopped));

    let gone = cache.confirm(&id(), None, cache.revision());
    assert_eq!(gone, Confirmed::Settled { changed: true });
    assert!(cache.is_deleted(&id()));
}

#[test]
fn a_deletion_is_taken_back_only_by_a_later_read() {
    let cache = SessionCache::new();
    cache.apply_event(at(1, "Running"));
    let before = cache.revision();
    cache.delete(&id());
    let late = cache.confirm(&id(), Some(at(1, "Running")), before);
    assert_eq!(late, Confirmed::Settled { changed: false });
    assert!(cache.is_deleted(&id()));

    // A list that began after it has the session all the same.
    let since = cache.revision();
    assert_eq!(cache.apply_read(at(1, "Running"), since), Applied::Suspect);
    cache.set_cleaned(&id());
    cache.complete_list(&seen(&[ID]), since);
    assert!(cache.is_deleted(&id()), "kept until the answer");
    cache.confirm(&id(), Some(at(1, "Running")), since);
    assert_eq!(phase(&cache), Some(Phase::Running));
}

#[test]
fn a_late_event_does_not_revive_a_session_that_was_found_deleted() {
    let cache = SessionCache::new();
    cache.watch_opened();
    cache.apply_event(at(1, "Running"));
    cache.confirm(&id(), None, cache.revision());
    cache.set_cleaned(&id());
    // Nobody has told of it: an older event may be on its way.
    cache.complete_list(&seen(&[]), cache.revision());
    assert_eq!(cache.apply_event(at(2, "Running")), Applied::Suspect);
    assert!(cache.is_deleted(&id()));

    cache.watch_opened();
    cache.complete_list(&seen(&[]), cache.revision());
    assert!(!cache.knows(&id()));
}

#[derive(Debug, Clone)]
enum Step {
    /// The server changes the session.
    Change,
    Delete,
    /// The oldest event on its way arrives, or is lost.
    Event {
        lost: bool,
    },
    /// The watch is opened again: what was on its way is lost.
    Reconnect,
    /// A list begins; there is one at a time.
    BeginList,
    /// It is answered with what was true when the server saw it.
    EndList,
    CleanUp,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Change),
        1 => Just(Step::Delete),
        4 => prop::bool::weighted(0.3).prop_map(|lost| Step::Event { lost }),
        2 => Just(Step::BeginList),
        2 => Just(Step::EndList),
        1 => Just(Step::CleanUp),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However events and lists interleave: nothing goes back in time, nobody comes back from the
    /// dead, and one more list and the questions it raises heal all that was lost.
    #[test]
    fn cache_never_goes_back_and_a_list_heals(steps in steps()) {
        let cache = SessionCache::new();
        let mut truth = Some(1);
        let mut newest = 1;
        let mut on_the_way: Vec<Option<i64>> = vec![truth];
        let mut list: Option<(Revision, Option<i64>)> = None;
        let mut shown = 0;
        let mut deleted = false;
        for step in steps {
            match step {
                Step::Change if truth.is_some() && newest < 59 => {
                    newest += 1;
                    truth = Some(newest);
                    on_the_way.push(truth);
                }
                Step::Delete if truth.is_some() => {
                    truth = None;
                    on_the_way.push(None);
                }
                Step::Event { lost } if !on_the_way.is_empty() => {
                    match on_the_way.remove(0) {
                        _ if lost => {}
                        Some(second) => { cache.apply_event(at(second, "Running")); }
                        None => { cache.delete(&id()); }
                    }
                }
                Step::BeginList if list.is_none() => list = Some((cache.revision(), truth)),
                Step::EndList => {
                    let Some((since, had)) = list.take() else {
                        continue;
                    };
                    if let Some(second) = had {
                        cache.apply_read(at(second, "Running"), since);
                    }
                    let listed = if had.is_some() { seen(&[ID]) } else { seen(&[]) };
                    for id in cache.complete_list(&listed, since) {
                        let answer = truth.map(|second| at(second, "Running"));
                        cache.confirm(&id, answer, cache.revision());
                    }
                }
                Step::Reconnect => {
                    on_the_way.clear();
                    cache.watch_opened();
                }
                Step::CleanUp if cache.is_deleted(&id()) => cache.set_cleaned(&id()),
                _ => {}
            }
            if let Some(session) = cache.get(&id()) {
                let (seconds, _) = session.updated_at().unwrap();
                prop_assert!(seconds >= shown, "went back in time");
                shown = seconds;
                prop_assert!(!deleted, "came back from the dead");
            }
            deleted |= cache.is_deleted(&id());
        }
        // Heal.
        let since = cache.revision();
        let mut asked = Vec::new();
        if let Some(second) = truth
            && cache.apply_read(at(second, "Running"), since) == Applied::Suspect
        {
            asked.push(id());
        }
        let listed = if truth.is_some() { seen(&[ID]) } else { seen(&[]) };
        asked.extend(cache.complete_list(&listed, since));
        for id in asked {
            let answer = truth.map(|second| at(second, "Running"));
            cache.confirm(&id, answer, cache.revision());
        }
        let now = cache.get(&id()).and_then(|session| session.updated_at());
        let expected = truth.map(|second| at(second, "Running").updated_at().unwrap());
        prop_assert_eq!(now, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_waits_from_when_it_is_seen_until_it_runs() {
    let cache = SessionCache::new();
    assert_eq!(cache.waiting_since(&id()), None);
    cache.apply_event(at(1, "Pending"));
    let since = cache.waiting_since(&id());
    assert!(since.is_some());

    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    cache.apply_event(at(2, "Creating"));
    assert_eq!(cache.waiting_since(&id()), since);
    cache.apply_event(at(3, "Running"));
    assert_eq!(cache.waiting_since(&id()), None);

    // Started again.
    cache.apply_event(at(4, "Pending"));
    assert!(cache.waiting_since(&id()) > since);
}
