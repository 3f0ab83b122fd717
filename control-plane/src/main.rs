//! The control plane; see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use ambient_control_plane::{
    check::{CheckSettings, check as check_all},
    keys::{self, KeysError, KeysSettings},
    local::{self, LocalError, shim},
    rules::Rules,
    serve::{self, ServeError},
    settings::{self, Action, LogSettings, ServeSettings},
    trial::{self, TrialSettings},
};
use ambient_shared::{
    client,
    clock::Clock,
    exit, harden,
    settings::NoSettings,
    telemetry::{self, MetricsPage, Traces},
};
use anyhow::Context as _;

const PROGRAM: &str = "ambient-control-plane";

/// What our metrics mean.
const METRICS: &str = include_str!("../../docs/metrics.md");

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
        Ok(Action::Keys(settings)) => init(&settings.log).and_then(|()| keys(&settings)),
        Ok(Action::Shim {
            folder,
            open_files,
            log,
        }) => {
            harden::limit_open_files(open_files);
            init(&log)
                .and_then(|()| shim::run(&folder).map_err(Into::into))
                .map(|()| 0)
        }
        Ok(Action::Serve(settings)) => init_traced(&settings.log)
            .and_then(|traces| run(traces, |metrics| serve::run(*settings, metrics)).map(|()| 0)),
        Ok(Action::Check(settings)) => init(&settings.log).and_then(|()| check(&settings)),
        Ok(Action::Try(settings, project)) => {
            init(&settings.log).and_then(|()| try_whole(&TrialSettings::new(&settings, project)))
        }
        Ok(Action::Local(settings)) => {
            let traces = init_traced(&settings.log);
            traces.and_then(|traces| run(traces, |metrics| local::run(*settings, metrics)))
        }
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
        let of_local = error.downcast_ref().map(LocalError::exit_code);
        let of_serve = error.downcast_ref().map(ServeError::exit_code);
        let of_keys = error.downcast_ref().map(KeysError::exit_code);
        of_local.or(of_serve).or(of_keys).unwrap_or(exit::SOFTWARE)
    }))
}

fn init(log: &LogSettings) -> anyhow::Result<()> {
    client::install_crypto_provider();
    Ok(telemetry::init_logs(log.format, &log.level)?)
}

/// For what runs long.
fn init_traced(log: &LogSettings) -> anyhow::Result<Traces> {
    client::install_crypto_provider();
    let traces = telemetry::init_logs_and_traces(PROGRAM, log.format, &log.level);
    Ok(traces?)
}

/// Runs a part of the program on a runtime of its own.
fn run<T, E, F>(traces: Traces, part: impl FnOnce(MetricsPage) -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, E>>,
    anyhow::Error: From<E>,
{
    harden::no_core_dumps();
    harden::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let metrics = telemetry::init_metrics(PROGRAM)?;
    telemetry::describe(METRICS);
    let ended = runtime.block_on(traces.during(part(metrics)));
    // A thread that waits for a line on stdin is not waited for.
    runtime.shutdown_background();
    Ok(ended?)
}

fn keys(settings: &KeysSettings) -> anyhow::Result<u8> {
    let said = run(Traces::off(), |_| async { keys::run(settings).await })?;
    print!("{said}");
    Ok(0)
}

fn check(settings: &ServeSettings) -> anyhow::Result<u8> {
    let what = CheckSettings::from(settings);
    let report = run(Traces::off(), |_| async {
        Ok::<_, anyhow::Error>(check_all(&what, &Clock::system()).await)
    })?;
    print!("{report}");
    Ok(report.exit_code())
}

fn try_whole(what: &TrialSettings) -> anyhow::Result<u8> {
    let report = run(Traces::off(), |_| async {
        Ok::<_, anyhow::Error>(trial::run(what, &Clock::system()).await)
    })?;
    print!("{report}");
    Ok(report.exit_code())
}
