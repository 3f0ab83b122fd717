//! Following one run from its start to its end.
//!
//! In: the session's lock, records and the file that the runner makes when it has started the
//! agent. Out: the run's state. The lock alone says whether the shim lives; it is looked at often,
//! as that costs three system calls and no other process can wait for it.

use std::{io, time::Duration};

use ambient_shared::clock::Clock;
use tokio::time::sleep;

use super::{
    folder::{Exit, ExitRecord, SessionFolder, is_malformed},
    tree::{Family, GRACE},
};
use crate::backend::{RunEnd, RunState, RunStatus};

/// Pause between looks while the agent has not been started: people wait for it.
const STARTING: Duration = Duration::from_millis(50);

/// Pause between looks at a running session: 1,000 of them make 15,000 short system calls a
/// second.
const RUNNING: Duration = Duration::from_millis(200);

/// What is known of a run without waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sight {
    /// Nothing was ever started: no run, or one whose shim never came to life.
    Nothing,
    /// Its shim lives.
    Alive(RunState),
    /// It ended, and how is on record.
    Ended(RunState),
    /// Its shim is gone without a record: leftovers may run.
    Lost {
        /// The run's generation.
        generation: u32,
    },
}

/// Looks at a folder. A malformed record does not hide what the lock and the others say.
///
/// # Errors
/// When too little can be read to tell: try again.
pub(super) fn look(folder: &SessionFolder) -> io::Result<Sight> {
    let run = match folder.run() {
        Ok(None) => return Ok(Sight::Nothing),
        Ok(Some(run)) => Ok(run),
        Err(error) => Err(error),
    };
    // The lock first: a shim writes how its run ended before it lets go of the lock.
    let locked = folder.is_locked()?;
    let generation = match run {
        Ok(run) => run.generation,
        Err(error) => match folder.generation_of_leftovers() {
            Some(generation) => generation,
            // No shim lives, and none has left anything.
            None if is_malformed(&error) && !locked => return Ok(Sight::Nothing),
            None => return Err(error),
        },
    };
    if locked {
        let status = match folder.started_at() {
            Some(since) => RunStatus::Running {
                since,
                not_ready: None,
            },
            None => RunStatus::Starting { waits_for: None },
        };
        return Ok(Sight::Alive(RunState {
            generation,
            status,
            namespace: None,
            keypair: None,
        }));
    }
    match folder.exit(generation) {
        Ok(Some(exit)) => return Ok(Sight::Ended(ended(exit))),
        Ok(None) => {}
        Err(error) if is_malformed(&error) => return Ok(Sight::Lost { generation }),
        Err(error) => return Err(error),
    }
    match folder.shim(generation) {
        Ok(None) => Ok(Sight::Nothing),
        Ok(Some(_)) => Ok(Sight::Lost { generation }),
        Err(error) if is_malformed(&error) => Ok(Sight::Lost { generation }),
        Err(error) => Err(error),
    }
}

/// Ends what a lost shim left running, and records that the run is lost.
///
/// # Errors
/// When something cannot be ended or the record cannot be written: try again.
pub(super) async fn bury(
    folder: &SessionFolder,
    generation: u32,
    clock: &Clock,
) -> io::Result<RunState> {
    let family = match folder.shim(generation) {
        Ok(record) => record.map(|record| Family {
            recorded: record.runner.into_iter().chain(record.sidecar).collect(),
            ancestor: None,
            mark: record.mark,
        }),
        // The mark alone finds them too.
        Err(error) if is_malformed(&error) => {
            let run = folder.run().ok().flatten();
            run.map(|run| Family {
                recorded: Vec::new(),
                ancestor: None,
                mark: run.mark,
            })
        }
        Err(error) => return Err(error),
    };
    if let Some(family) = family
        && !family.end(GRACE).await
    {
        let message = "processes of a session whose shim is gone cannot be killed";
        return Err(io::Error::other(message));
    }
    let exit = ExitRecord {
        generation,
        at: clock.now(),
        how: Exit::Lost(true),
        message: Some("the session's shim vanished without a record of its end".to_owned()),
    };
    folder.write_exit(&exit)?;
    Ok(ended(exit))
}

/// Waits until it is worth looking again: the run went on from this state, or ended.
pub(super) async fn wait_for_change(folder: &SessionFolder, state: &RunState) {
    match state.status {
        RunStatus::Starting { .. } => sleep(STARTING).await,
        RunStatus::Running { .. } => loop {
            sleep(RUNNING).await;
            // Whatever else it is, a closer look tells.
            if !matches!(folder.is_locked(), Ok(true)) {
                return;
            }
        },
        RunStatus::Unknown
        | RunStatus::Doomed(_)
        | RunStatus::Ending(_)
        | RunStatus::Ended { .. } => {}
    }
}

fn ended(exit: ExitRecord) -> RunState {
    let end = match exit.how {
        Exit::Code(code) => RunEnd::Exited {
            code,
            message: exit.message,
        },
        Exit::Signal(signal) => RunEnd::Lost {
            message: format!("the runner was killed by signal {signal}"),
        },
        Exit::Lost(_) => RunEnd::Lost {
            message: exit
                .message
                .unwrap_or_else(|| "the runner vanished".to_owned()),
        },
    };
    RunState {
        generation: exit.generation,
        status: RunStatus::Ended { at: exit.at, end },
        namespace: None,
        keypair: None,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, time::SystemTime};

    use ambient_shared::session::SessionId;

    use super::*;
    use crate::backend::process::{
        folder::{ProgramRecord, RunRecord, ShimRecord},
        identity::ProcessIdentity,
    };

    fn folder(dir: &std::path::Path, generation: u32) -> SessionFolder {
        let id = SessionId::parse("session-0001").unwrap();
        let folder = SessionFolder::of(dir, &id);
        folder.create(&id).unwrap();
        let program = ProgramRecord {
            program: "true".into(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
        };
        let run = RunRecord {
            generation,
            mark: "no process has this mark".to_owned(),
            tied_to: None,
            runner: program.clone(),
            sidecar: program,
        };
        folder.prepare(&run).unwrap();
        folder
    }

    fn shim(generation: u32) -> ShimRecord {
        ShimRecord {
            generation,
            mark: "no process has this mark".to_owned(),
            shim: ProcessIdentity::own().unwrap(),
            runner: None,
            sidecar: None,
        }
    }

    #[test]
    fn a_run_whose_shim_never_lived_may_be_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path(), 4);
        assert_eq!(look(&folder).unwrap(), Sight::Nothing);
        // That of an earlier run says nothing.
        folder.write_shim(&shim(3)).unwrap();
        assert_eq!(look(&folder).unwrap(), Sight::Nothing);
    }

    #[test]
    fn the_lock_says_that_it_lives_and_the_file_that_the_agent_runs() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path(), 1);
        let lock = folder.open_lock().unwrap();
        lock.try_lock().unwrap();
        let starting = RunState {
            generation: 1,
            status: RunStatus::Starting { waits_for: None },
            namespace: None,
            keypair: None,
        };
        assert_eq!(look(&folder).unwrap(), Sight::Alive(starting));
        fs::write(folder.started(), "").unwrap();
        let Sight::Alive(state) = look(&folder).unwrap() else {
            panic!("not alive");
        };
        assert!(matches!(state.status, RunStatus::Running { .. }));
    }

    #[tokio::test]
    async fn neither_lock_nor_record_is_lost_and_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path(), 2);
        folder.write_shim(&shim(2)).unwrap();
        assert_eq!(look(&folder).unwrap(), Sight::Lost { generation: 2 });

        let clock = Clock::manual(SystemTime::UNIX_EPOCH + Duration::from_secs(9));
        let state = bury(&folder, 2, &clock).await.unwrap();

        assert!(matches!(
            &state.status,
            RunStatus::Ended {
                end: RunEnd::Lost { .. },
                ..
            }
        ));
        assert_eq!(look(&folder).unwrap(), Sight::Ended(state));
    }

    #[tokio::test]
    async fn a_malformed_record_hides_neither_life_nor_death() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path(), 2);
        folder.write_shim(&shim(2)).unwrap();
        let malform = |file: &str| fs::write(folder.path().join(file), "{").unwrap();
        malform("run.json");
        let lock = folder.open_lock().unwrap();
        lock.try_lock().unwrap();
        assert!(matches!(
            look(&folder).unwrap(),
            Sight::Alive(RunState { generation: 2, .. })
        ));
        malform("shim.json");
        assert!(look(&folder).is_err(), "of which generation?");
        drop(lock);
        assert_eq!(look(&folder).unwrap(), Sight::Nothing);

        folder.write_shim(&shim(2)).unwrap();
        malform("exit.json");
        assert_eq!(look(&folder).unwrap(), Sight::Lost { generation: 2 });
        let clock = Clock::manual(SystemTime::UNIX_EPOCH);
        let state = bury(&folder, 2, &clock).await.unwrap();
        assert_eq!(look(&folder).unwrap(), Sight::Ended(state));
    }
}
