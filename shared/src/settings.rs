//! Reading settings from flags and environment, with errors of one line that name the setting.

use std::{ffi::OsString, time::Duration};

use clap::{
    ArgMatches, Command, Parser,
    error::{ContextKind, ErrorKind},
};

/// What is wrong with a program's settings: one line for each fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSettings(pub String);

/// How parsing settings ended without settings.
#[derive(Debug)]
pub enum NoSettings {
    /// `--help` or `--version`: print this on stdout and end with 0.
    Asked(String),
    /// Print this on stderr and end with [`crate::exit::CONFIG`].
    Invalid(InvalidSettings),
}

/// Parses a program's settings from its arguments and the environment.
///
/// A variable that is set but empty counts as not set, as people write it in manifests.
///
/// # Errors
/// [`NoSettings`] when there is nothing to run with.
pub fn parse<S: Parser>(arguments: impl IntoIterator<Item = OsString>) -> Result<S, NoSettings> {
    let command = S::command();
    let parsed: Result<ArgMatches, clap::Error> =
        without_empty_variables(command.clone()).try_get_matches_from(arguments);
    parsed
        .and_then(|matches| S::from_arg_matches(&matches))
        .map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                NoSettings::Asked(error.to_string())
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => NoSettings::Invalid(
                InvalidSettings("a command is missing; --help names them".to_owned()),
            ),
            _ => NoSettings::Invalid(InvalidSettings(one_line(&command, &error))),
        })
}

/// Reads a secret from the environment. Not a flag: arguments are public.
pub fn secret(variable: &str) -> Option<secrecy::SecretString> {
    std::env::var(variable)
        .ok()
        .filter(|value| !value.trim().is_empty())
        .map(Into::into)
}

/// A duration as people write it: `90s`, `2m`, `1h 30m`.
///
/// # Errors
/// When it is not one.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "not a duration such as 90s or 2m".to_owned())
}

/// Contract section 3: `true`, `1` and `yes` mean yes.
///
/// # Errors
/// When it is neither a yes nor a no.
pub fn parse_flag(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" | "" => Ok(false),
        _ => Err("neither true nor false".to_owned()),
    }
}

fn without_empty_variables(command: Command) -> Command {
    let subcommands: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    let command = command.mut_args(|arg| {
        let empty = arg
            .get_env()
            .and_then(std::env::var_os)
            .is_some_and(|value| value.to_string_lossy().trim().is_empty());
        if empty { arg.env(None::<&str>) } else { arg }
    });
    subcommands.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, without_empty_variables)
    })
}

/// Clap's message on one line, without usage and hints, and with the variable's name where the
/// value came from the environment.
fn one_line(command: &Command, error: &clap::Error) -> String {
    let text = error.to_string();
    let message = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    let message = message.trim_start_matches("error: ").to_owned();
    match invalid_argument(error).and_then(|flag| variable_of(command, &flag)) {
        Some(variable) => format!("{variable}: {message}"),
        None => message,
    }
}

fn invalid_argument(error: &clap::Error) -> Option<String> {
    match error.get(ContextKind::InvalidArg)? {
        clap::error::ContextValue::String(flag) => Some(flag.clone()),
        clap::error::ContextValue::Strings(flags) => flags.first().cloned(),
        _ => None,
    }
}

/// `--token-url <URL>` to the variable of that flag, in the command or below it.
fn variable_of(command: &Command, flag: &str) -> Option<String> {
    let name = flag.trim_start_matches('-').split([' ', '=', '[']).next()?;
    command
        .get_arguments()
        .find(|arg| arg.get_long() == Some(name))
        .and_then(|arg| arg.get_env())
        .map(|variable| variable.to_string_lossy().into_owned())
        .or_else(|| {
            command
                .get_subcommands()
                .find_map(|sub| variable_of(sub, flag))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Sample {
        /// A wait.
        #[arg(long, env = "SAMPLE_WAIT", value_parser = parse_duration, default_value = "2m")]
        wait: Duration,
        /// Needed.
        #[arg(long, env = "SAMPLE_NAME")]
        name: String,
    }

    fn invalid(arguments: &[&str]) -> String {
        match parse::<Sample>(arguments.iter().map(Into::into)) {
            Err(NoSettings::Invalid(InvalidSettings(line))) => line,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn faults_are_one_line_that_names_the_variable() {
        let line = invalid(&["sample", "--name", "n", "--wait", "long"]);
        assert!(line.starts_with("SAMPLE_WAIT: "), "{line}");
        assert!(line.contains("90s or 2m") && !line.contains('\n'), "{line}");
        let line = invalid(&["sample"]);
        assert!(
            line.contains("--name") && line.contains("SAMPLE_NAME"),
            "{line}"
        );
    }

    #[test]
    fn defaults_and_help_work() {
        let sample = parse::<Sample>(["sample", "--name", "n"].map(Into::into)).unwrap();
        assert_eq!(
            (sample.wait, sample.name.as_str()),
            (Duration::from_mins(2), "n")
        );
        let help = parse::<Sample>(["sample", "--help"].map(Into::into));
        assert!(matches!(help, Err(NoSettings::Asked(text)) if text.contains("SAMPLE_WAIT")));
    }
}
