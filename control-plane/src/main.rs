//! The control plane; see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use ambient_control_plane::{
    local::{self, LocalError, shim},
    rules::Rules,
    settings::{self, Action, LocalSettings, LogSettings},
};
use ambient_shared::{client, exit, harden, settings::NoSettings, telemetry};
use anyhow::Context as _;

const PROGRAM: &str = "ambient-control-plane";

fn main() -> ExitCode {
    let ended = match settings::read(std::env::args_os()) {
        Ok(Action::Hash(hash)) => {
            println!("{hash}");
            Ok(0)
        }
        Ok(Action::Rules(settings)) => match Rules::new(&settings).yaml() {
            Ok(text) => {
                print!("{text}");
                Ok(0)
            }
            Err(error) => Err(error.into()),
        },
        Ok(Action::Shim { folder, log }) => init(&log)
            .and_then(|()| shim::run(&folder).map_err(Into::into))
            .map(|()| 0),
        Ok(Action::Serve(_) | Action::Check(_)) => Err(anyhow::anyhow!("not yet")),
        Ok(Action::Local(settings)) => init(&settings.log).and_then(|()| local(*settings)),
        Err(NoSettings::Asked(text)) => {
            print!("{text}");
            Ok(0)
        }
        Err(NoSettings::Invalid(faults)) => {
            for fault in faults.0.lines() {
                exit::last_words(PROGRAM, fault);
            }
            Ok(exit::CONFIG)
        }
    };
    ExitCode::from(ended.unwrap_or_else(|error| {
        exit::last_words(PROGRAM, &exit::report(error.as_ref()));
        error
            .downcast_ref::<LocalError>()
            .map_or(exit::SOFTWARE, LocalError::exit_code)
    }))
}

fn init(log: &LogSettings) -> anyhow::Result<()> {
    client::install_crypto_provider();
    Ok(telemetry::init_logs(log.format, &log.level)?)
}

fn local(settings: LocalSettings) -> anyhow::Result<u8> {
    harden::no_core_dumps();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let metrics = telemetry::init_metrics()?;
    let ended = runtime.block_on(local::run(settings, metrics));
    // A thread that waits for a line on stdin is not waited for.
    runtime.shutdown_background();
    Ok(ended?)
}
