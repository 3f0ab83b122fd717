#![forbid(unsafe_code)]
//! The API server's binary: settings, telemetry, run, exit code.

use std::{io::Write as _, process::ExitCode};

use ambient_api_server::{Arguments, Server, StartError};
use ambient_shared::{
    admin,
    client::install_crypto_provider,
    clock::Clock,
    exit,
    harden::{no_core_dumps, raise_open_files},
    settings::NoSettings,
    tasks::cancel_on_signal,
    telemetry::{describe, init_logs_and_traces, init_metrics},
};
use tokio_util::sync::CancellationToken;

const PROGRAM: &str = "ambient-api-server";

/// What our metrics mean.
const METRICS: &str = include_str!("../../docs/metrics.md");

fn main() -> ExitCode {
    no_core_dumps();
    raise_open_files();
    install_crypto_provider();
    let arguments = match Arguments::read(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(NoSettings::Asked(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(NoSettings::Invalid(faults)) => return end(exit::CONFIG, &faults.0),
    };
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, error)) => end(code, &error),
    }
}

/// Says each fault on a line of its own.
fn end(code: u8, faults: &str) -> ExitCode {
    for line in faults.lines() {
        exit::last_words(PROGRAM, line);
    }
    ExitCode::from(code)
}

fn start(arguments: Arguments) -> Result<(), (u8, String)> {
    let software = |error: &dyn std::error::Error| (exit::SOFTWARE, error.to_string());
    let (format, level) = (arguments.log_format, &arguments.log_level);
    let traces = init_logs_and_traces(PROGRAM, format, level).map_err(|error| software(&error))?;
    let metrics = init_metrics(PROGRAM).map_err(|error| software(&error))?;
    describe(METRICS);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| software(&error))?
        .block_on(traces.during(async {
            let server = Server::bind(arguments.server, Clock::system())
                .await
                .map_err(|error| match error {
                    StartError::Settings(faults) => (exit::CONFIG, faults.join("\n")),
                    error => (exit::UNAVAILABLE, exit::report(&error)),
                })?;
            let readiness = server.readiness();
            let server = server.with_admin(admin::routes(metrics, readiness));
            let shutdown = CancellationToken::new();
            let signals = cancel_on_signal(shutdown.clone());
            let (caught, ran) = tokio::join!(signals, server.run(shutdown));
            caught.map_err(|error| software(&error))?;
            ran.map_err(|error| software(&error))
        }))
}
