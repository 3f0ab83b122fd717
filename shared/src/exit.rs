//! Exit codes, and how a program says why it ends.

use std::{error::Error, fmt::Write as _, io::Write as _, path::Path};

/// Bad settings (sysexits.h `EX_CONFIG`).
pub const CONFIG: u8 = 78;
/// A service that is needed cannot be had, such as the first token (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// A fault of the program or machine (`EX_SOFTWARE`).
pub const SOFTWARE: u8 = 70;
/// The command was ended because its time was over (timeout(1)).
pub const TIMED_OUT: u8 = 124;
/// The command was found but cannot be executed (POSIX shell).
pub const NOT_EXECUTABLE: u8 = 126;
/// The command was not found (POSIX shell).
pub const NOT_FOUND: u8 = 127;
/// Added to a signal's number when it ended the command (POSIX shell).
pub const SIGNAL_BASE: u8 = 128;

/// Where Kubernetes reads a container's last words.
pub const TERMINATION_LOG: &str = "/dev/termination-log";

/// An error and its causes on one line: `what: why: why`.
pub fn report(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some libraries repeat their cause in their own message.
        if !line.ends_with(&text) {
            let _ = write!(line, ": {text}");
        }
        cause = error.source();
    }
    line.replace(['\n', '\r'], " ")
}

/// Says on stderr, and in the termination log when there is one, why the program ends.
pub fn last_words(program: &str, line: &str) {
    last_words_to(program, line, Path::new(TERMINATION_LOG));
}

/// As [`last_words`], with another termination log. That one is made when it is not there.
pub fn last_words_to(program: &str, line: &str, log: &Path) {
    // Nobody may be left to read it, which is no reason to end in another way.
    let _ = writeln!(std::io::stderr(), "{program}: {line}");
    write_termination_log(log, line);
}

/// Never makes the default file: outside Kubernetes there is none.
fn write_termination_log(path: &Path, line: &str) {
    if let Ok(mut log) = std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .create(path != Path::new(TERMINATION_LOG))
        .open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}
