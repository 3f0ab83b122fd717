//! Container entrypoint of an agent session; see the library.
#![forbid(unsafe_code)]

use std::{io::Write as _, process::ExitCode};

use ambient_runner::{
    Failure, Finished, install,
    settings::{self, Action, Settings},
};
use ambient_shared::{client, exit, settings::NoSettings, telemetry};
use anyhow::Context as _;

const PROGRAM: &str = "ambient-runner";

fn main() -> ExitCode {
    let (code, line) = match settings::parse(std::env::args_os()) {
        Ok(Action::Run(settings)) => match run(*settings) {
            Ok(finished) => (finished.exit_code, finished.last_words),
            Err(error) => (code_of(&error), Some(exit::report(error.as_ref()))),
        },
        Ok(Action::Install(folder)) => match install::install(&folder) {
            Ok(_) => (0, None),
            Err(error) => (exit::SOFTWARE, Some(exit::report(&error))),
        },
        Err(NoSettings::Asked(text)) => {
            // Whoever asked may read no further.
            let _ = std::io::stdout().write_all(text.as_bytes());
            (0, None)
        }
        Err(NoSettings::Invalid(error)) => (exit::CONFIG, Some(error.to_string())),
    };
    if let Some(line) = line {
        exit::last_words_to(PROGRAM, &line, &settings::termination_log());
    }
    ExitCode::from(code)
}

fn run(settings: Settings) -> anyhow::Result<Finished> {
    ambient_runner::prepare_process();
    if settings.uses_tls() {
        // Beside what follows: its first random number takes tens of milliseconds.
        std::thread::spawn(client::install_crypto_provider);
    }
    telemetry::init_logs(settings.log_format, &settings.log_level)?;
    // One thread: the runner waits nearly all the time, and is small.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build()
        .context("cannot start the runtime")?;
    let finished = runtime.block_on(ambient_runner::run(settings));
    // Whoever still reads a terminal is not waited for.
    runtime.shutdown_background();
    Ok(finished?)
}

fn code_of(error: &anyhow::Error) -> u8 {
    let failure = error.downcast_ref::<Failure>();
    failure.map_or(exit::SOFTWARE, Failure::exit_code)
}
