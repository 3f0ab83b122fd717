//! Runs the agent to its end, again after each end that was for a restart.
//!
//! In: settings, a supervisor, the agent's environment. Out: exit code and last words. Each life
//! has its own stdio: a bridge when messages are on, else the runner's own, masked.

use std::{
    convert::Infallible,
    future::Future,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::{
    api::Api,
    clock::Clock,
    exit,
    swap::write_atomic,
    tasks::{TaskFailure, Tasks},
};
use metrics::{counter, gauge};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    Agent, AgentEnvironment, AgentIo, RunningAgent,
    mask::Masker,
    passthrough::{Input, copy_masked},
    reaper::Reaper,
    signals,
    supervisor::{Outcome, Supervisor, Why},
    sys::{self, Ended},
};
use crate::{
    bridge::{Bridge, BridgeError, BridgeSettings, format},
    failure::Cause,
    metrics as names,
    settings::Settings,
    token::refresher::TokenHandle,
};

/// Longest time from the agent's end to that of what is only passed through: 60 s are what
/// Kubernetes gives a pod (contract section 3), and the agent's own grace period comes first.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// How a run ended with its agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The process's exit code.
    pub exit_code: u8,
    /// What stderr and the termination log should say; nothing when all went well.
    pub last_words: Option<String>,
}

/// What became of one agent's stdio.
struct Carried {
    result: Result<(), TaskFailure>,
    /// What was not pushed in time. It waits for the next agent.
    unsent: Option<BridgeError>,
}

/// What every life of the agent needs.
pub(crate) struct Lives {
    pub(crate) settings: Settings,
    pub(crate) clock: Clock,
    pub(crate) masker: Masker,
    pub(crate) reaper: Reaper,
    pub(crate) tokens: TokenHandle,
    /// The API server, when messages are on.
    pub(crate) api: Option<Api>,
    /// Whether there is an agent, for who asks whether the runner is ready.
    pub(crate) agent_runs: Arc<AtomicBool>,
    /// Where in the session's messages this runner began.
    pub(crate) runner_start: Arc<OnceLock<i64>>,
}

impl Lives {
    /// The prompt, when it is to be handed over by the runner itself.
    pub(crate) fn prompt(&self) -> Option<&String> {
        let prompt = self.settings.initial_prompt.as_ref();
        prompt.filter(|_| !self.settings.is_resume)
    }

    /// Starts the agent, again after each end that was for a restart. Cancels `shutdown` at the
    /// end.
    pub(crate) async fn run(
        &self,
        mut supervisor: Supervisor,
        environment: AgentEnvironment,
        shutdown: &CancellationToken,
    ) -> Result<Finished, Cause> {
        let _end_all = shutdown.clone().drop_guard();
        let mut agent = Agent {
            command: self.settings.command.clone(),
            environment,
            io: self.settings.io,
            foreground: self.settings.io == AgentIo::None && sys::has_terminal(),
        };
        let mut input = None;
        let mut is_restart = false;
        loop {
            let bridge = self.bridge().map_err(Cause::of_bridge)?;
            let mut running = agent.start(&self.reaper)?;
            info!(pid = running.pid, restart = is_restart, "agent started");
            counter!(names::AGENT_STARTS).increment(1);
            #[expect(
                clippy::cast_precision_loss,
                reason = "exact until the year 285 million"
            )]
            gauge!(names::AGENT_START).set(self.clock.unix_seconds() as f64);
            self.agent_runs.store(true, Ordering::Relaxed);
            self.tell_started();

            let first = self.first_input(bridge.is_some() || is_restart);
            let (outcome, carried) = self
                .live(
                    &mut supervisor,
                    &mut running,
                    bridge,
                    &mut input,
                    first,
                    shutdown,
                )
                .await;
            self.agent_runs.store(false, Ordering::Relaxed);
            if agent.foreground {
                sys::take_terminal();
            }
            let goes_on = carried.result.is_ok() && !shutdown.is_cancelled();
            if outcome.why == Some(Why::Restart) && goes_on {
                is_restart = true;
                // It had the prompt before.
                agent.environment.remove("INITIAL_PROMPT");
                continue;
            }
            return finish(outcome, carried, self.settings.timeout);
        }
    }

    /// For who waits beside the runner, and reads no logs.
    fn tell_started(&self) {
        if let Some(file) = &self.settings.started_file
            && let Err(error) = write_atomic(file, b"", 0o644)
        {
            warn!(%error, file = %file.display(), "cannot tell that the agent was started");
        }
    }

    /// One agent with its stdio, until both have ended.
    async fn live(
        &self,
        supervisor: &mut Supervisor,
        running: &mut RunningAgent,
        bridge: Option<Bridge>,
        input: &mut Option<Input>,
        first: Option<String>,
        shutdown: &CancellationToken,
    ) -> (Outcome, Carried) {
        // Cancelled by the agent's end, by a failure of its stdio, or by that of a task.
        let over = shutdown.child_token();
        // Cancelled when messages have to be pushed soon, or stay in the spool.
        let hurry = CancellationToken::new();
        let mut stdio = Tasks::new(over.clone());
        let mut messages = Tasks::new(over.clone());
        let mut typed = None;
        let unsent = Arc::new(OnceLock::new());
        if let Some((pipes, stderr)) = running.pipes.take() {
            let masker = self.masker.clone();
            stdio.spawn(
                "stderr",
                log_end("stderr", copy_masked(stderr, tokio::io::stderr(), masker)),
            );
            if let Some(bridge) = bridge {
                let carried = bridge.run(pipes, over.clone(), hurry.clone());
                let unsent = Arc::clone(&unsent);
                messages.spawn_fallible("bridge", async move {
                    match carried.await {
                        // No failure for an agent that is started again: the next bridge takes
                        // the spool up.
                        Err(error @ BridgeError::Unsent { .. }) => {
                            let _ = unsent.set(error);
                            Ok(())
                        }
                        carried => carried,
                    }
                });
            } else {
                let masker = self.masker.clone();
                let copy = copy_masked(pipes.stdout, tokio::io::stdout(), masker);
                stdio.spawn("stdout", log_end("stdout", copy));
                typed = Some((input.get_or_insert_with(Input::stdin), pipes.stdin));
            }
        }
        let typing = async {
            if let Some((input, stdin)) = typed {
                log_end("stdin", input.feed(first, stdin)).await;
            }
            // The agent's end is what is waited for.
            std::future::pending::<Infallible>().await
        };
        let all_carried = CancellationToken::new();
        let watching = async {
            let outcome = tokio::select! {
                outcome = supervisor.watch(running, &over) => outcome,
                never = typing => match never {},
            };
            over.cancel();
            // An agent that ended by itself leaves the time to push all that it said, until the
            // runner is asked to end.
            if outcome.why.is_none() {
                tokio::select! {
                    () = all_carried.cancelled() => {}
                    _ = supervisor.signals.next_end() => {}
                }
            }
            hurry.cancel();
            outcome
        };
        let carrying = async {
            // The bridge has limits of its own.
            let carried = messages.run_until_shutdown(Duration::MAX).await;
            all_carried.cancel();
            carried
        };
        let (outcome, carried, copied) =
            tokio::join!(watching, carrying, stdio.run_until_shutdown(FLUSH_LIMIT));
        let carried = Carried {
            result: carried.and(copied),
            unsent: Arc::into_inner(unsent).and_then(OnceLock::into_inner),
        };
        (outcome, carried)
    }

    /// A bridge for the next agent, when messages are on and there are pipes. One that follows a
    /// restart goes on where the last one ended: the records of deliveries say where.
    fn bridge(&self) -> Result<Option<Bridge>, BridgeError> {
        let settings = &self.settings;
        let (Some(api), Some((session, spool_dir))) = (&self.api, settings.spool()) else {
            return Ok(None);
        };
        let bridge_settings = BridgeSettings {
            session: session.clone(),
            io: settings.io,
            turns: settings.turns,
            spool_dir: spool_dir.to_owned(),
            initial_prompt: settings.initial_prompt.clone(),
            preamble: settings.preamble.clone(),
            is_resume: settings.is_resume,
            runner_start: Arc::clone(&self.runner_start),
        };
        Bridge::new(
            bridge_settings,
            api.clone(),
            self.tokens.clone(),
            self.masker.clone(),
            self.clock.clone(),
        )
        .map(Some)
    }

    /// What the agent's stdin gets before anything else, when nobody else hands the prompt over.
    fn first_input(&self, handed_over: bool) -> Option<String> {
        let io = self.settings.io;
        self.prompt()
            .filter(|_| !handed_over && io != AgentIo::None)
            .map(|prompt| format::to_agent(io, prompt))
    }
}

/// The exit code: the agent's own, unless it was ended for another reason.
fn finish(
    outcome: Outcome,
    carried: Carried,
    timeout: Option<Duration>,
) -> Result<Finished, Cause> {
    let (own, how) = match outcome.ended {
        Ended::Exited(code) => (code, format!("agent ended with exit code {code}")),
        Ended::Signalled(number) => (
            signal_code(number),
            format!("agent was ended by {}", signals::name(number)),
        ),
    };
    if let Err(failure) = carried.result
        && (own == 0 || outcome.why == Some(Why::Stopped))
    {
        return Err(Cause::Stdio(failure));
    }
    if let (Some(Why::TimedOut), Some(timeout)) = (outcome.why, timeout) {
        let after = humantime::format_duration(timeout);
        return Ok(Finished {
            exit_code: exit::TIMED_OUT,
            last_words: Some(format!("agent was ended after its TIMEOUT of {after}")),
        });
    }
    match carried.unsent {
        // Nobody may take the session for one that did all it should.
        Some(unsent) if own == 0 => Err(Cause::Bridge(unsent)),
        _ => Ok(Finished {
            exit_code: own,
            last_words: (own != 0).then_some(how),
        }),
    }
}

/// 128 + n, as a shell says it.
pub(crate) fn signal_code(number: i32) -> u8 {
    exit::SIGNAL_BASE.saturating_add(u8::try_from(number).unwrap_or(u8::MAX))
}

/// Copies end with whoever is at the other end: that is no failure of the runner.
async fn log_end(of: &'static str, copy: impl Future<Output = io::Result<()>>) {
    match copy.await {
        Ok(()) => debug!(of, "at its end"),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => debug!(of, "closed"),
        Err(error) => error!(of, %error, "agent's stdio broke"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Failure;

    /// Exit code and last words of a runner whose agent ended so, with messages unsent.
    fn ended_unsent(ended: Ended, why: Option<Why>) -> (u8, String) {
        let unsent = BridgeError::Unsent {
            messages: 3,
            bytes: 70,
        };
        let carried = Carried {
            result: Ok(()),
            unsent: Some(unsent),
        };
        let timeout = Some(Duration::from_secs(5));
        match finish(Outcome { ended, why }, carried, timeout) {
            Ok(finished) => (finished.exit_code, finished.last_words.unwrap_or_default()),
            Err(cause) => {
                let failure = Failure::from(cause);
                (failure.exit_code(), exit::report(&failure))
            }
        }
    }

    #[test]
    fn an_end_in_order_with_messages_unsent_is_a_failure() {
        for why in [None, Some(Why::Signalled)] {
            let (code, words) = ended_unsent(Ended::Exited(0), why);
            assert_eq!(code, exit::UNAVAILABLE);
            assert!(words.contains("3 messages (70 bytes)"), "{words}");
        }
    }

    #[test]
    fn an_agent_that_failed_keeps_its_code_with_messages_unsent() {
        for (ended, why, code) in [
            (Ended::Exited(7), None, 7),
            (Ended::Signalled(15), Some(Why::Signalled), 143),
            (Ended::Exited(0), Some(Why::TimedOut), exit::TIMED_OUT),
        ] {
            assert_eq!(ended_unsent(ended, why).0, code, "{ended:?}");
        }
    }
}
