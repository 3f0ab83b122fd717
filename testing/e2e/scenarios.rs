//! What is shown on the cluster, in order.

use crate::{chart, harness::Harness, leftovers, system::System, target::Target};

pub mod by_hand;
mod ends;
mod processes;
mod refresh;
mod restart;
mod user;

/// What needs nothing but the cluster.
const BY_HAND: &str = "a_pod_by_hand_sees_a_changed_secret";

/// What needs the system.
const ALL: [&str; 7] = [
    "a_posted_session_completes",
    "a_refreshed_token_reaches_the_agent",
    "no_process_of_a_pod_shows_a_token",
    "an_agent_killed_for_its_memory_fails_for_that_reason",
    "a_session_whose_pod_was_deleted_fails_for_that_reason",
    "sessions_go_on_without_the_control_plane",
    "a_user_sees_it_with_kubectl",
];

/// Names of all scenarios, in order.
pub fn names() -> impl Iterator<Item = &'static str> {
    let ours = [leftovers::KILLED].into_iter().chain(in_order());
    ours.chain([chart::guide::NAME, chart::NAME])
}

/// Names of those that run one after the other on one cluster.
pub fn in_order() -> impl Iterator<Item = &'static str> {
    let by_hand = [BY_HAND].into_iter();
    by_hand.chain(ALL).chain([leftovers::ENDED])
}

/// Runs all that are wanted; gives the cluster back, without the system.
pub async fn run(harness: &mut Harness, target: Target) -> Option<Target> {
    let by_hand = by_hand::sees_a_changed_secret(&target);
    if harness.run(BY_HAND, by_hand).await {
        println!("{}", target.scene(by_hand::NAMESPACE).await);
    }
    let wanted: Vec<_> = ALL.into_iter().filter(|name| harness.wants(name)).collect();
    if wanted.is_empty() {
        return Some(target);
    }
    let mut system = harness.set_up("the system", System::start(target)).await?;
    for name in wanted {
        let failed = harness.run(name, scenario(name, &mut system)).await;
        if failed {
            println!("{}", system.scene().await);
            system.clear().await;
        }
    }
    Some(system.end().await)
}

async fn scenario(name: &str, system: &mut System) -> String {
    match name {
        "a_posted_session_completes" => ends::completes(system).await,
        "a_refreshed_token_reaches_the_agent" => refresh::reaches_the_agent(system).await,
        "no_process_of_a_pod_shows_a_token" => processes::show_no_token(system).await,
        "an_agent_killed_for_its_memory_fails_for_that_reason" => ends::out_of_memory(system).await,
        "a_session_whose_pod_was_deleted_fails_for_that_reason" => ends::pod_deleted(system).await,
        "sessions_go_on_without_the_control_plane" => restart::goes_on(system).await,
        "a_user_sees_it_with_kubectl" => user::sees_it(system).await,
        other => panic!("no scenario {other}"),
    }
}
