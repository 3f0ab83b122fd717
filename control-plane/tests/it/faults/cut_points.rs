//! The program is killed between any two of its steps, and started again.
//!
//! A step is a write, to Kubernetes or of a session's status. For each number, the program is killed
//! before the write of that number leaves it and, in another life, once it is done and nobody has
//! heard so; until a life has fewer writes than that.

use std::{
    pin::pin,
    sync::{Mutex, PoisonError},
};

use ambient_testing::{
    DEADLINE,
    kube_proxy::asked,
    programs::Running,
    proxy::{Call, Cut, Side},
};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::time::timeout;

use super::site::Site;

/// Lives that are lived at once.
const LANES: usize = 4;

/// Steps of which there are more in a life than any that is lived here: so many say that something
/// goes round in circles.
const MANY: usize = 60;

/// The lives that are still to be lived, by the number of the write and its side.
struct Plan {
    next: Mutex<Vec<(Side, usize)>>,
}

impl Plan {
    fn new() -> Self {
        Self {
            next: Mutex::new(vec![(Side::Before, 1), (Side::After, 1)]),
        }
    }

    /// The next life; none when all have been lived.
    fn take(&self) -> Option<(Side, usize)> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let (side, number) = next.iter_mut().min_by_key(|(_, number)| *number)?;
        let taken = (*side, *number);
        *number += 1;
        assert!(taken.1 < MANY, "{taken:?}: a life of endless writes");
        Some(taken)
    }

    /// A life had no write of its number.
    fn end(&self, side: Side) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.retain(|(of, _)| *of != side);
    }
}

/// Whether a call to kube-apiserver is a step: what comes at its own time is none.
fn is_step(call: &Call) -> bool {
    let asked = asked(call);
    asked.is_write() && !matches!(asked.resource.as_str(), "events" | "leases")
}

fn is_status(call: &Call) -> bool {
    call.path.ends_with("/UpdateSessionStatus")
}

/// Lives a life in which the program is killed at one write, and started again at once. Says whether
/// there was such a write.
async fn live(
    site: &Site,
    program: &mut Running,
    (side, number): (Side, usize),
    life: impl Future<Output = ()>,
) -> bool {
    let cut = Cut::at(number, side);
    site.kube.cut(&cut, is_step);
    site.grpc.cut(&cut, is_status);
    let killing = async {
        cut.reached().await;
        site.kill(program).await;
        site.kube.mend();
        site.grpc.mend();
        *program = site.program().start();
    };
    let (mut killing, mut life) = (pin!(killing), pin!(life));
    let mut is_killed = false;
    loop {
        tokio::select! {
            () = &mut life => break,
            () = &mut killing, if !is_killed => is_killed = true,
        }
    }
    if cut.has_come() && !is_killed {
        // Its last write did all that was left to be done.
        killing.await;
    }
    site.kube.mend();
    site.grpc.mend();
    cut.has_come()
}

/// Lives all lives, several at once, each after `prepare` on one of some sites.
async fn at_each_write(name: &str, prepare: impl AsyncFn(&Site), life: impl AsyncFn(&Site)) {
    let plan = Plan::new();
    let lane = async |number: usize| {
        let site = Site::new(&format!("{name}-{number}")).await;
        let mut program = site.program().start();
        prepare(&site).await;
        while let Some((side, number)) = plan.take() {
            let _scene = Scene(side, number);
            let lived = live(&site, &mut program, (side, number), life(&site));
            let lived = timeout(DEADLINE * 2, lived).await;
            if !lived.expect("a life in time") {
                plan.end(side);
            }
        }
    };
    join_all((0..LANES).map(lane)).await;
}

/// Says where a life failed.
struct Scene(Side, usize);

impl Drop for Scene {
    #[expect(
        clippy::print_stderr,
        reason = "the test harness shows it with the failed test"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("killed {:?} write {}", self.0, self.1);
        }
    }
}

/// How often an object of this kind was made, by the calls from number `from`.
fn made(site: &Site, from: usize, resource: &str) -> usize {
    let calls = site.asked();
    let made = calls[from..].iter().filter(|(asked, code)| {
        asked.resource == resource && asked.namespace == site.project && *code == Some(201)
    });
    made.count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_lives_its_life_wherever_the_program_is_killed() {
    let life = async |site: &Site| {
        let from = site.asked().len();
        let session = site.create().await;
        let pod = session.runs(0).await;
        session.until_phase("Running").await;
        session.is_whole().await;
        let now = site.get(&session.pod()).await.unwrap();
        assert_eq!(now["metadata"]["uid"], pod["metadata"]["uid"]);

        // A token that is due.
        let expires = "ambient-code.io/token-expires-at";
        let edited = json!({"metadata": {"annotations": {expires: "2026-01-01T00:00:00Z"}}});
        let path = session.secret();
        let patched = site.ask(Method::PATCH, &path, Some(&edited)).await;
        assert_eq!(patched.0, 200, "{}", patched.1);
        site.wait_for(&path, |it| {
            it["metadata"]["annotations"][expires] != edited["metadata"]["annotations"][expires]
        })
        .await;

        session.post("stop").await;
        session.finishes().await;
        session.until_phase("Stopped").await;
        session.post("start").await;
        session.bound(1).await;
        session.ends(3).await;
        session.until_phase("Failed").await;
        session.post("start").await;
        session.finishes().await;
        session.runs(2).await;
        session.until_phase("Running").await;
        session.is_whole().await;
        session.delete().await;
        session.finishes().await;
        session.is_gone().await;

        assert_eq!(made(site, from, "pods"), 3);
        for resource in ["serviceaccounts", "secrets", "services"] {
            assert_eq!(made(site, from, resource), 1, "{resource}");
        }
    };
    at_each_write("cut-session", Site::create_project, life).await;
}
