#![forbid(unsafe_code)]
//! Settings, telemetry, run, exit code.

use std::process::ExitCode;

use ambient_shared::{client, exit, harden, settings::NoSettings, telemetry};
use ambient_sidecar::{RunError, Settings};
use tokio_util::sync::CancellationToken;

const PROGRAM: &str = "ambient-sidecar";

fn main() -> ExitCode {
    harden::no_core_dumps();
    harden::raise_open_files();
    client::install_crypto_provider();
    let settings = match Settings::from_arguments(std::env::args_os()) {
        Ok(settings) => settings,
        Err(NoSettings::Asked(text)) => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(NoSettings::Invalid(fault)) => return end(exit::CONFIG, &fault),
    };
    match start(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(error.exit_code(), &error),
    }
}

fn start(settings: Settings) -> Result<(), RunError> {
    let level = match settings.log_level.as_str() {
        // It tells at this level that a watch of a removed folder cannot be removed.
        "info" => "info,notify=warn",
        level => level,
    };
    telemetry::init_logs(settings.log_format, level)?;
    let metrics = telemetry::init_metrics(PROGRAM)?;
    // One thread: the work is copying bytes, and each more costs memory beside every agent.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .map_err(RunError::Runtime)?;
    let ended = runtime.block_on(ambient_sidecar::run(
        settings,
        metrics,
        CancellationToken::new(),
    ));
    // A file read that hangs (a dead network file system) must not hold up the end.
    runtime.shutdown_background();
    ended
}

fn end(code: u8, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    exit::last_words(PROGRAM, &exit::report(error));
    ExitCode::from(code)
}
