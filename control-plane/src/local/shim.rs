//! The shim: the detached process that holds one session's run together.
//!
//! In: a session's folder with `run.json`, and the session's lock as stdin. Out: `shim.json` with
//! the processes, `exit.json` with the end. It has a session (in the system's sense) of its own,
//! so that no terminal's Ctrl-C reaches it; it is the reaper of all its descendants, so that none
//! gets away; and it holds the lock as long as it lives, so that whoever looks knows. SIGTERM
//! stops the run in order, SIGQUIT at once.

use std::{
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _, unix::process::ExitStatusExt as _},
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use ambient_shared::{clock::Clock, exit};
use rustix::process::Signal;
use tokio::{
    process::{Child, Command},
    signal::unix::{Signal as SignalStream, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tracing::{error, info, warn};

use crate::backend::process::{
    folder::{Exit, ExitRecord, ProgramRecord, RunRecord, SessionFolder, ShimRecord, open_log},
    identity::ProcessIdentity,
    launch::READY,
    tree::{Family, GRACE, ended_children},
};
use sidecar::Sidecar;

mod logs;
mod sidecar;

/// From SIGTERM to the runner until it is killed: as long as a pod has (contract section 3). The
/// runner's own grace period for the agent is shorter.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How often logs are looked at, and the process that the run is tied to.
const UPKEEP: Duration = Duration::from_secs(1);

/// How often, and with which pause, writing `exit.json` is tried: a full disk may get room again.
const EXIT_TRIES: u32 = 30;
const EXIT_PAUSE: Duration = Duration::from_secs(1);

/// Why a shim does not start.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// Started by hand.
    #[error("stdin is not the session's lock; this subcommand is for the control plane alone")]
    NotLocked,
    /// No run is described.
    #[error("there is no run.json in the session's folder")]
    NoRun,
    /// This run was started before: a run is started once.
    #[error("this run was started before")]
    StartedBefore,
    /// The system refused.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// Runs a session's run from start to end.
///
/// # Errors
/// When it cannot start; nothing was started then. The control plane is told on stdout.
pub fn run(folder: &Path) -> Result<(), ShimError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ShimError::System("start the runtime", error))?;
    runtime.block_on(async {
        let started = start(&SessionFolder::at(folder));
        let answer = match &started {
            Ok(_) => READY.to_owned(),
            Err(error) => exit::report(error),
        };
        // Nobody may be left to hear it.
        let _ = writeln!(io::stdout(), "{answer}");
        let shim = started?;
        release_stdout()?;
        shim.run().await;
        Ok(())
    })
}

/// The control plane reads one line; from then on nothing may block on that pipe.
fn release_stdout() -> Result<(), ShimError> {
    std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .and_then(|nothing| Ok(rustix::stdio::dup2_stdout(nothing)?))
        .map_err(|error| ShimError::System("close stdout", error))
}

fn start(folder: &SessionFolder) -> Result<Shim, ShimError> {
    let system = |what| move |error: io::Error| ShimError::System(what, error);
    let lock = take_lock(folder)?;
    // Fails where we lead a process group already, as when started by hand from a shell.
    rustix::process::setsid().map_err(|error| system("leave the terminal")(error.into()))?;
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
        .map_err(|error| system("become the reaper of descendants")(error.into()))?;
    let run = folder
        .run()
        .map_err(system("read run.json"))?
        .ok_or(ShimError::NoRun)?;
    let before = folder
        .shim(run.generation)
        .map_err(system("read shim.json"))?;
    let ended = folder
        .exit(run.generation)
        .map_err(system("read exit.json"))?;
    if before.is_some() || ended.is_some() {
        return Err(ShimError::StartedBefore);
    }
    // Before the record is there, by which others find and signal us.
    let signals = Signals::new().map_err(system("catch signals"))?;
    let record = ShimRecord {
        generation: run.generation,
        mark: run.mark.clone(),
        shim: ProcessIdentity::own().map_err(system("identify this process"))?,
        runner: None,
        sidecar: None,
    };
    folder
        .write_shim(&record)
        .map_err(system("write shim.json"))?;
    Ok(Shim {
        folder: folder.clone(),
        run,
        record,
        signals,
        clock: Clock::system(),
        _lock: lock,
    })
}

/// Moves the lock from stdin to a descriptor that no child inherits.
fn take_lock(folder: &SessionFolder) -> Result<OwnedFd, ShimError> {
    let stdin = rustix::stdio::stdin();
    let given = rustix::fs::fstat(stdin).map_err(|_| ShimError::NotLocked)?;
    let wanted = std::fs::metadata(folder.lock()).map_err(|_| ShimError::NotLocked)?;
    if (given.st_dev, given.st_ino) != (wanted.dev(), wanted.ino()) {
        return Err(ShimError::NotLocked);
    }
    let lock = stdin
        .try_clone_to_owned()
        .map_err(|error| ShimError::System("keep the lock", error))?;
    // The control plane locked it for us; without that, one who tries it gets the lock or not.
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| ShimError::NotLocked)?;
    let nothing = std::fs::File::open("/dev/null")
        .map_err(|error| ShimError::System("open /dev/null", error))?;
    rustix::stdio::dup2_stdin(nothing)
        .map_err(|error| ShimError::System("close stdin", error.into()))?;
    Ok(lock)
}

struct Signals {
    stop: SignalStream,
    quit: SignalStream,
    child: SignalStream,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            stop: signal(SignalKind::terminate())?,
            quit: signal(SignalKind::quit())?,
            child: signal(SignalKind::child())?,
        })
    }
}

/// One run.
struct Shim {
    folder: SessionFolder,
    run: RunRecord,
    record: ShimRecord,
    signals: Signals,
    clock: Clock,
    /// Held until this process ends.
    _lock: OwnedFd,
}

impl Shim {
    async fn run(mut self) {
        let mut sidecar = Sidecar::new(self.run.sidecar.clone(), self.folder.clone());
        sidecar.start();
        self.record.sidecar = sidecar.identity();
        let (how, at) = match self.start_runner() {
            Ok(runner) => {
                self.record.runner = runner.id().and_then(|pid| ProcessIdentity::of(pid).ok());
                self.keep_record();
                let ended = self.supervise(runner, &mut sidecar).await;
                (exit_of(ended), self.clock.now())
            }
            Err(error) => {
                error!(%error, "runner cannot be started");
                self.leave_last_words(&format!("ambient-runner cannot be started: {error}"));
                (Exit::Code(exit::SOFTWARE), self.clock.now())
            }
        };
        sidecar.stop().await;
        self.end_descendants().await;
        self.write_exit(ExitRecord {
            generation: self.run.generation,
            at,
            how,
            message: self.folder.last_words(),
        })
        .await;
    }

    fn start_runner(&self) -> io::Result<Child> {
        command(&self.run.runner)
            .current_dir(self.folder.workspace())
            .stdout(Stdio::from(open_log(&self.folder.agent_log())?))
            .stderr(Stdio::from(open_log(&self.folder.runner_log())?))
            .spawn()
    }

    /// Waits for the runner's end, and keeps everything else going meanwhile.
    async fn supervise(
        &mut self,
        mut runner: Child,
        sidecar: &mut Sidecar,
    ) -> io::Result<ExitStatus> {
        let mut upkeep = interval(UPKEEP);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stop_by: Option<Instant> = None;
        loop {
            let deadline = stop_by.unwrap_or_else(|| Instant::now() + STOP_LIMIT);
            tokio::select! {
                biased;
                ended = runner.wait() => return ended,
                _ = self.signals.quit.recv() => {
                    info!("run is ended at once");
                    runner.start_kill()?;
                }
                _ = self.signals.stop.recv() => self.ask_to_stop(&mut stop_by),
                () = sleep_until(deadline), if stop_by.is_some() => {
                    warn!(limit_s = STOP_LIMIT.as_secs(), "runner did not end in time; killed");
                    runner.start_kill()?;
                    stop_by = None;
                }
                () = sidecar.run() => {
                    self.record.sidecar = sidecar.identity();
                    self.keep_record();
                }
                _ = self.signals.child.recv() => reap_strangers(&[runner.id(), sidecar.pid()]),
                _ = upkeep.tick() => {
                    logs::keep_small(&self.folder);
                    if self.run.tied_to.as_ref().is_some_and(|process| !process.is_alive()) {
                        self.ask_to_stop(&mut stop_by);
                    }
                }
            }
        }
    }

    fn ask_to_stop(&self, stop_by: &mut Option<Instant>) {
        if stop_by.is_some() {
            return;
        }
        info!("run is asked to stop");
        *stop_by = Some(Instant::now() + STOP_LIMIT);
        if let Some(runner) = &self.record.runner
            && let Err(error) = runner.signal(Signal::TERM)
        {
            warn!(%error, "runner cannot be signalled");
        }
    }

    /// Ends whatever is left of the run, agents' forgotten background processes included.
    async fn end_descendants(&self) {
        let family = Family {
            recorded: Vec::new(),
            ancestor: Some(std::process::id()),
            mark: self.run.mark.clone(),
        };
        // Zombies are not alive: what was killed is gone even before it is reaped.
        if !family.end(GRACE).await {
            error!("some processes of the run cannot be killed");
        }
        reap_strangers(&[]);
    }

    fn keep_record(&self) {
        if let Err(error) = self.folder.write_shim(&self.record) {
            // Without it a later control plane finds these processes by their mark.
            warn!(%error, "shim.json cannot be written");
        }
    }

    fn leave_last_words(&self, words: &str) {
        if let Err(error) = std::fs::write(self.folder.termination_log(), words) {
            warn!(%error, "last words cannot be written");
        }
    }

    async fn write_exit(&self, record: ExitRecord) {
        for _ in 0..EXIT_TRIES {
            match self.folder.write_exit(&record) {
                Ok(()) => {
                    info!(end = ?record.how, "run has ended");
                    return;
                }
                // The session was deleted together with its folder.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) => error!(%error, "exit.json cannot be written"),
            }
            sleep(EXIT_PAUSE).await;
        }
    }
}

/// A program as its record says, with nothing on stdin.
fn command(program: &ProgramRecord) -> Command {
    let mut command = Command::new(&program.program);
    command
        .args(&program.arguments)
        .env_clear()
        .envs(&program.environment)
        .stdin(Stdio::null())
        .kill_on_drop(false);
    command
}

/// Waits for a child to end; false when it did not in time.
async fn ends_within(child: &mut Child, limit: Duration) -> bool {
    timeout(limit, child.wait()).await.is_ok()
}

/// Reaps what was handed down to us: children that are not `known`.
fn reap_strangers(known: &[Option<u32>]) {
    for pid in ended_children() {
        if known.contains(&Some(pid)) {
            continue;
        }
        if let Some(pid) = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            // It has ended, so this does not wait; an error means that it is reaped already.
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
        }
    }
}

fn exit_of(ended: io::Result<ExitStatus>) -> Exit {
    match ended {
        Ok(status) => match (status.code(), status.signal()) {
            // An exit code has eight bits.
            (Some(code), _) => Exit::Code(u8::try_from(code).unwrap_or(u8::MAX)),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Lost(true),
        },
        Err(error) => {
            error!(%error, "runner cannot be waited for");
            Exit::Lost(true)
        }
    }
}
