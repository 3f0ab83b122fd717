//! Runs scenarios one after the other and tells of each in the form that `cargo test` uses.

use std::{
    any::Any,
    io::Write as _,
    panic::AssertUnwindSafe,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use tokio::time::timeout;

/// Longest time of one scenario. The slowest takes a minute and a half on a busy machine of two cores.
const LIMIT: Duration = Duration::from_secs(420);

/// Where the scenario that panicked did so, and what it said.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Runs scenarios and counts.
#[derive(Debug)]
pub struct Harness {
    names: Vec<String>,
    list: bool,
    passed: usize,
    failed: Vec<String>,
    filtered: usize,
    started: Instant,
}

impl Harness {
    /// For scenarios with one of these in their names; for all when there are none.
    pub fn new(names: Vec<String>, list: bool) -> Self {
        std::panic::set_hook(Box::new(|panic| {
            let mut last = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(panic.to_string());
        }));
        Self {
            names,
            list,
            passed: 0,
            failed: Vec::new(),
            filtered: 0,
            started: Instant::now(),
        }
    }

    /// Whether a scenario of this name is to run. One that is not is counted, or listed.
    pub fn wants(&mut self, name: &str) -> bool {
        if !self.is_named(name) {
            self.filtered += 1;
            return false;
        }
        if self.list {
            println!("{name}: test");
        }
        !self.list
    }

    /// Whether the names are for a scenario of this name.
    pub fn is_named(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| name.contains(part))
    }

    /// Runs a scenario, if it is wanted. What it gives is shown. Whether it failed.
    pub async fn run(&mut self, name: &str, scenario: impl Future<Output = String>) -> bool {
        if !self.wants(name) {
            return false;
        }
        let notes = self.step("test", name, scenario).await;
        if let Some(notes) = &notes {
            println!("{notes}");
            self.passed += 1;
        }
        notes.is_none()
    }

    /// Runs what all scenarios need. None when it failed.
    pub async fn set_up<T>(&mut self, name: &str, step: impl Future<Output = T>) -> Option<T> {
        let made = self.step("set up", name, step).await;
        if made.is_some() {
            println!();
        }
        made
    }

    async fn step<T>(
        &mut self,
        kind: &str,
        name: &str,
        step: impl Future<Output = T>,
    ) -> Option<T> {
        print!("{kind} {name} ... ");
        let _ = std::io::stdout().flush();
        let started = Instant::now();
        let ended = timeout(LIMIT, AssertUnwindSafe(step).catch_unwind()).await;
        let took = started.elapsed().as_secs_f64();
        let failure = match ended {
            Ok(Ok(result)) => {
                print!("ok ({took:.1} s)");
                return Some(result);
            }
            Ok(Err(panic)) => words_of(panic.as_ref()),
            Err(_) => format!("not done after {LIMIT:?}"),
        };
        println!("FAILED ({took:.1} s)\n\n---- {name}\n{failure}\n");
        self.failed.push(name.to_owned());
        None
    }

    /// The last line and the exit code.
    pub fn end(self) -> ExitCode {
        if self.list {
            return ExitCode::SUCCESS;
        }
        let failed = self.failed.len();
        if failed > 0 {
            println!("\nfailures:\n    {}", self.failed.join("\n    "));
        }
        println!(
            "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered \
             out; finished in {:.2}s",
            if failed == 0 { "ok" } else { "FAILED" },
            self.passed,
            self.filtered,
            self.started.elapsed().as_secs_f64(),
        );
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// What the hook saw, with the place; a panic of another form says itself.
fn words_of(panic: &(dyn Any + Send)) -> String {
    let mut last = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner);
    last.take().unwrap_or_else(|| {
        let text = panic.downcast_ref::<String>().cloned();
        text.unwrap_or_else(|| "a panic that says nothing".to_owned())
    })
}
