//! The program is killed between any two of its steps, and started again.
//!
//! A step is a write, to Kubernetes or of a session's status. For each number, the program is killed
//! before the write of that number leaves it and, in another life, once it is done and nobody has
//! heard so; until a life has fewer writes than that.

use std::{
    fmt,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use ambient_testing::{
    DEADLINE,
    cluster::Cluster,
    kube_proxy::asked,
    programs::Running,
    proxy::{Call, Cut, Side},
};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::time::timeout;

use super::site::{KEYS, Site};
use crate::permissions;

/// Writes of which there are more than in any life that is lived here: so many say that something
/// goes round in circles.
const MANY: usize = 60;

/// Where a life is cut.
#[derive(Clone, Copy)]
struct Death {
    side: Side,
    number: usize,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Before => "before",
            Side::After => "after",
        };
        write!(f, "{side}-{}", self.number)
    }
}

/// The lives that are still to be lived.
struct Plan {
    /// The next one of each side.
    next: Mutex<Vec<Death>>,
    writes: AtomicUsize,
}

impl Plan {
    fn new(sides: &[Side]) -> Self {
        let first = sides.iter().map(|&side| Death { side, number: 1 });
        Self {
            next: Mutex::new(first.collect()),
            writes: AtomicUsize::new(0),
        }
    }

    /// The next life; none when all have been lived.
    fn take(&self) -> Option<Death> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let next = next.iter_mut().min_by_key(|death| death.number)?;
        let taken = *next;
        next.number += 1;
        assert!(taken.number < MANY, "a life of endless writes");
        Some(taken)
    }

    /// A life had no write of its number.
    fn end(&self, death: Death) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.retain(|it| it.side != death.side);
        self.writes.fetch_max(death.number - 1, Ordering::Relaxed);
    }

    /// How many writes a life had.
    fn writes(&self) -> usize {
        self.writes.load(Ordering::Relaxed)
    }
}

/// Says in which life a test failed.
struct Scene(Death);

impl Drop for Scene {
    #[expect(
        clippy::print_stderr,
        reason = "the test harness shows it with the failed test"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in a life that was cut {}", self.0);
        }
    }
}

/// Whether a call to kube-apiserver is a step: what comes at its own time is none.
fn is_step(call: &Call) -> bool {
    let asked = asked(call);
    asked.is_write() && !matches!(asked.resource.as_str(), "events" | "leases")
}

/// Whether it is one about a project, not about a session.
fn is_step_of_a_project(call: &Call) -> bool {
    let of_a_session = ["serviceaccounts", "secrets", "services", "pods"];
    is_step(call) && !of_a_session.contains(&asked(call).resource.as_str())
}

fn is_status(call: &Call) -> bool {
    call.path.ends_with("/UpdateSessionStatus")
}

/// Lives a life in which the program is killed at one write, and started again at once. Says whether
/// there was such a write.
async fn live(
    site: &Site,
    program: &mut Running,
    cut: &Cut,
    life: impl Future<Output = ()>,
) -> bool {
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

/// Lives all lives, several at once, each on one of some sites after `prepare`. Gives how many
/// writes a life has.
async fn at_each_write(
    name: &str,
    lanes: usize,
    prepare: impl AsyncFn(&Site),
    cut_at: impl Fn(&Site, &Cut),
    life: impl AsyncFn(&Site),
) -> usize {
    let plan = Plan::new(&[Side::Before, Side::After]);
    let lane = async |lane: usize| {
        let site = Site::new(&format!("{name}-{lane}")).await;
        let mut program = site.program().start();
        prepare(&site).await;
        while let Some(death) = plan.take() {
            let _scene = Scene(death);
            let cut = Cut::at(death.number, death.side);
            cut_at(&site, &cut);
            let lived = live(&site, &mut program, &cut, life(&site));
            let lived = timeout(DEADLINE * 2, lived).await;
            if !lived.expect("a life in time") {
                plan.end(death);
            }
        }
    };
    join_all((0..lanes).map(lane)).await;
    plan.writes()
}

/// How often an object of this kind was made, by the calls from number `from`.
fn made(site: &Site, from: usize, resource: &str) -> usize {
    let calls = site.asked();
    let made = calls[from..].iter().filter(|(asked, code)| {
        asked.verb != "update" && asked.resource == resource && *code == Some(201)
    });
    made.count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_lives_its_life_wherever_the_program_is_killed() {
    let cut_at = |site: &Site, cut: &Cut| {
        site.kube.cut(cut, is_step);
        site.grpc.cut(cut, is_status);
    };
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
    let writes = at_each_write("cut-session", 4, Site::create_project, cut_at, life).await;
    assert!(writes > 20, "{writes} writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_project_lives_its_life_wherever_the_program_is_killed() {
    let cut_at = |site: &Site, cut: &Cut| site.kube.cut(cut, is_step_of_a_project);
    let lives = AtomicUsize::new(0);
    let life = async |site: &Site| {
        let from = site.asked().len();
        let number = lives.fetch_add(1, Ordering::Relaxed);
        let project = format!("{}-team-{number}", site.name);
        site.create_project_of(&project).await;
        let session = site.create_in(&project).await;
        session.runs(0).await;
        session.until_phase("Running").await;
        session.is_whole().await;
        session.delete().await;
        session.finishes().await;
        session.is_gone().await;
        let path = format!("/projects/{project}");
        site.rest(Method::DELETE, &path, None).await;
        site.wait_gone(&format!("/api/v1/namespaces/{project}"))
            .await;

        for resource in ["namespaces", "rolebindings", "networkpolicies", "pods"] {
            assert_eq!(made(site, from, resource), 1, "{resource}");
        }
    };
    // Many at once: a namespace takes its time to go.
    let writes = at_each_write("cut-project", 6, async |_| {}, cut_at, life).await;
    assert!(writes >= 5, "{writes} writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keys_are_made_once_wherever_the_program_is_killed() {
    // Before a write, there is what there was after the one before it.
    let plan = Plan::new(&[Side::After]);
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    let lane = async |_| {
        while let Some(death) = plan.take() {
            let _scene = Scene(death);
            let name = format!("cut-keys-{death}");
            let site = Site::bare(cluster, &name).await;
            let cut = Cut::at(death.number, death.side);
            site.kube.cut(&cut, is_step);
            let mut program = site.program().start();
            let life = async {
                let mut found = Vec::new();
                for key in KEYS {
                    let path = format!("/api/v1/namespaces/{name}/secrets/{key}");
                    found.push(site.wait_for(&path, |_| true).await);
                }
                let map = format!("/api/v1/namespaces/{name}/configmaps/ambient-cp-keys");
                let owner = site.wait_for(&map, |_| true).await;
                for key in &found {
                    let owners = &key["metadata"]["ownerReferences"];
                    assert_eq!(owners[0]["uid"], owner["metadata"]["uid"], "{owners}");
                }
            };
            let lived = live(&site, &mut program, &cut, life);
            let was_killed = timeout(DEADLINE * 2, lived).await.expect("in time");
            // With whatever it was left, it works.
            program.listening("endpoint").await;
            assert_eq!(made(&site, 0, "secrets"), KEYS.len());
            assert_eq!(made(&site, 0, "configmaps"), 1);
            if !was_killed {
                plan.end(death);
            }
        }
    };
    join_all((0..4).map(lane)).await;
    let writes = plan.writes();
    assert!(writes > KEYS.len(), "{writes} writes");
}
