//! Starts our own binaries and watches what they say.
//!
//! In: a name, arguments, environment. Out: a [`Running`] program whose log lines (JSON on stderr)
//! and output can be waited for. The environment starts empty, so that a test does not depend on
//! the machine's. A program is killed when its handle is dropped, and its log shown if the test
//! failed. Needs a tokio runtime.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader, PipeReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, ChildStdin, Command},
    sync::Notify,
    time::timeout,
};

use crate::DEADLINE;

/// Folder with the binaries to test; without it, the folder that cargo built the test into.
pub const BIN_DIR: &str = "AMBIENT_BIN_DIR";

/// Variables of the machine that programs under test still get.
const PASSED_ON: [&str; 5] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "RUST_BACKTRACE",
    "LLVM_PROFILE_FILE",
];

/// Path of one of our binaries: in the folder named by [`BIN_DIR`], else where cargo puts it, beside
/// the test that runs.
///
/// # Panics
/// When it is not there. Cargo builds the binaries of a package with its tests, but not those of
/// other packages: `cargo build --workspace --bins` does.
pub fn binary(name: &str) -> PathBuf {
    let folder = std::env::var_os(BIN_DIR).map_or_else(built_into, PathBuf::from);
    let path = folder.join(name);
    assert!(
        path.is_file(),
        "{} is not there; build it with `cargo build --workspace --bins`",
        path.display()
    );
    path
}

/// `target/<profile>`: tests run in its `deps`, benchmarks in itself.
fn built_into() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its own path");
    let folder = exe.parent().expect("a file is in a folder");
    if folder.ends_with("deps") {
        folder.parent().expect("deps is in target").to_owned()
    } else {
        folder.to_owned()
    }
}

/// A program that is to be started.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    folder: Option<PathBuf>,
}

impl Program {
    /// One of our binaries, such as `ambient-sidecar`, with JSON logs.
    ///
    /// # Panics
    /// When it is not built; see [`binary`].
    pub fn new(name: &str) -> Self {
        Self::at(binary(name)).env("AMBIENT_LOG_FORMAT", "json")
    }

    /// Any program, by its path or its name in `PATH`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
        }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.args.extend(args);
        self
    }

    /// A variable of the program's environment; a later value of the same name wins.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// The folder to run in; the test's own when not given.
    #[must_use]
    pub fn folder(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// Starts it, with pipes on all three standard streams.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(self) -> Running {
        let (stdout, to_stdout) = std::io::pipe().expect("pipe");
        let (stderr, to_stderr) = std::io::pipe().expect("pipe");
        let mut command = Command::new(&self.path);
        command
            .args(&self.args)
            .env_clear()
            .envs(PASSED_ON.iter().filter_map(|name| {
                let value = std::env::var_os(name)?;
                Some((OsString::from(name), value))
            }))
            .envs(self.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(to_stdout))
            .stderr(Stdio::from(to_stderr))
            .kill_on_drop(true);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.path.display()));
        Running {
            name: self
                .path
                .file_name()
                .unwrap_or_default()
                .display()
                .to_string(),
            pid: child.id().expect("a program just started has a pid"),
            stdin: child.stdin.take(),
            stdout: Lines::of(stdout),
            stderr: Lines::of(stderr),
            child,
        }
    }
}

/// A program that was started; killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    pid: u32,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
}

impl Running {
    /// Its process id, also after it ended.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it logs that it listens, and gives the address.
    ///
    /// # Panics
    /// When it ends before, or at the deadline.
    pub async fn listening(&mut self, port_of: &str) -> SocketAddr {
        let line = self
            .log_line(&format!("listening with port_of {port_of:?}"), |line| {
                line["message"] == "listening" && line["port_of"] == port_of
            })
            .await;
        let address = line["address"].as_str().unwrap_or_default();
        address
            .parse()
            .unwrap_or_else(|_| panic!("{} listens at {address:?}", self.name))
    }

    /// Waits for a log line, among those already written too; `what` it is, for the failure.
    ///
    /// # Panics
    /// When the program ends without it, or at the deadline.
    pub async fn log_line(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.log_line_after(0, what, wanted).await.1
    }

    /// Like [`Running::log_line`], but among the lines from number `from` (0 is the first). Gives
    /// the number of the line after it, from where to wait for the next.
    ///
    /// # Panics
    /// When the program ends without it, or at the deadline.
    pub async fn log_line_after(
        &mut self,
        from: usize,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> (usize, Value) {
        let json = |line: &str| serde_json::from_str(line).unwrap_or(Value::Null);
        let found = self
            .stderr
            .find(from, |line| Some(json(line)).filter(&wanted))
            .await;
        match found {
            Some(found) => found,
            None => self.fail(&format!("never logged: {what}")).await,
        }
    }

    /// Waits for a line of its output that has this in it, and gives it.
    ///
    /// # Panics
    /// When the program ends without it, or at the deadline.
    pub async fn output_line(&mut self, part: &str) -> String {
        let found = self
            .stdout
            .find(0, |line| line.contains(part).then(|| line.to_owned()))
            .await;
        match found {
            Some((_, line)) => line,
            None => {
                self.fail(&format!("never wrote a line with {part:?}"))
                    .await
            }
        }
    }

    /// What it has written to stdout so far, by lines.
    pub fn output(&self) -> Vec<String> {
        self.stdout.so_far()
    }

    /// What it has written to stderr so far, by lines.
    pub fn log(&self) -> Vec<String> {
        self.stderr.so_far()
    }

    /// Writes a line to its stdin.
    ///
    /// # Panics
    /// When its stdin is closed.
    pub async fn write_line(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("stdin was not closed before");
        let written = timeout(DEADLINE, async {
            stdin.write_all(line.as_bytes()).await?;
            stdin.write_all(b"\n").await?;
            stdin.flush().await
        });
        match written.await {
            Ok(Ok(())) => {}
            other => panic!("cannot write to {}: {other:?}", self.name),
        }
    }

    /// Closes its stdin: end of input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is not there any more.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid).expect("pids are positive"));
        kill(pid, signal).unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
    }

    /// Kills it with SIGKILL and does not wait; nothing happens when it has ended already.
    pub fn kill_now(&mut self) {
        let _ = self.child.start_kill();
    }

    /// Kills it with SIGKILL and waits for its end.
    ///
    /// # Panics
    /// At the deadline.
    pub async fn kill(&mut self) {
        self.kill_now();
        self.wait().await;
    }

    /// Waits for its end and for all that it wrote.
    ///
    /// # Panics
    /// At the deadline.
    pub async fn wait(&mut self) -> ExitStatus {
        let Some(status) = self.ended_within(DEADLINE).await else {
            self.fail("did not end").await
        };
        // Not for ever: what it left running may hold the pipes.
        let all_read = async {
            self.stdout.at_end().await;
            self.stderr.at_end().await;
        };
        let _ = timeout(Duration::from_secs(2), all_read).await;
        status
    }

    /// Whether, and how, it ends within this time.
    pub async fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        match timeout(limit, self.child.wait()).await {
            Ok(ended) => Some(ended.expect("a child can be waited for")),
            Err(_) => None,
        }
    }

    async fn fail(&mut self, what: &str) -> ! {
        let state = match self.ended_within(Duration::from_millis(100)).await {
            Some(status) => format!("ended with {status}"),
            None => "still running".to_owned(),
        };
        // Dropping it shows the log.
        panic!("{} (pid {}, {state}) {what}", self.name, self.pid);
    }
}

impl Drop for Running {
    #[expect(
        clippy::print_stderr,
        reason = "the test harness shows it with the failed test"
    )]
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for (stream, lines) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            eprintln!("--- {stream} of {} (pid {})", self.name, self.pid);
            for line in lines.so_far() {
                eprintln!("{line}");
            }
        }
    }
}

/// The lines of one stream, read by a thread of its own: a test that blocks its executor must not
/// block the program.
#[derive(Debug, Clone)]
struct Lines(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    read: Mutex<Read>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Read {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn of(pipe: PipeReader) -> Self {
        let shared = Arc::new(Shared {
            read: Mutex::default(),
            changed: Notify::new(),
        });
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end_matches(['\n', '\r']).to_owned();
                line.clear();
                writer.lock().lines.push(text);
                writer.changed.notify_waiters();
            }
            writer.lock().ended = true;
            writer.changed.notify_waiters();
        });
        Self(shared)
    }

    fn so_far(&self) -> Vec<String> {
        self.0.lock().lines.clone()
    }

    /// The first line from number `from` that `pick` takes, and the number after it; none when the
    /// stream ended, or [`DEADLINE`] passed, without one.
    async fn find<T>(&self, from: usize, pick: impl Fn(&str) -> Option<T>) -> Option<(usize, T)> {
        let mut seen = from;
        let found = async {
            loop {
                let changed = self.0.changed.notified();
                tokio::pin!(changed);
                // Before looking, so that a line written meanwhile is not missed.
                changed.as_mut().enable();
                {
                    let read = self.0.lock();
                    while let Some(line) = read.lines.get(seen) {
                        seen += 1;
                        if let Some(picked) = pick(line) {
                            return Some((seen, picked));
                        }
                    }
                    if read.ended {
                        return None;
                    }
                }
                changed.await;
            }
        };
        timeout(DEADLINE, found).await.ok().flatten()
    }

    async fn at_end(&self) {
        self.find(usize::MAX, |_| None::<()>).await;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Read> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Running {
        Program::at("sh").args(["-c", script]).start()
    }

    #[tokio::test]
    async fn waits_for_the_port_that_is_asked_for() {
        let mut program = shell(
            r#"echo noise >&2
               echo '{"message":"listening","port_of":"admin","address":"127.0.0.1:7"}' >&2
               echo '{"message":"listening","port_of":"proxy","address":"127.0.0.1:8"}' >&2
               read -r wait"#,
        );
        assert_eq!(program.listening("proxy").await.port(), 8);
        assert_eq!(program.listening("admin").await.port(), 7);
        program.close_stdin();
        assert!(!program.wait().await.success());
    }

    #[tokio::test]
    async fn talks_both_ways_and_sees_the_exit_code() {
        let mut program = shell(r#"read -r line; echo "got $line"; exit 3"#);
        program.write_line("this").await;
        assert_eq!(program.output_line("got").await, "got this");
        assert_eq!(program.wait().await.code(), Some(3));
        assert_eq!(program.output(), ["got this"]);
    }

    #[tokio::test]
    #[should_panic(expected = "never logged: the impossible")]
    async fn an_early_end_is_a_failure_at_once() {
        shell("exit 0").log_line("the impossible", |_| false).await;
    }

    #[tokio::test]
    async fn nothing_of_the_machines_environment_leaks_in() {
        let mut program = Program::at("env").env("AMBIENT_X", "1").start();
        assert!(program.wait().await.success());
        let leaked: Vec<_> = program
            .output()
            .into_iter()
            .filter(|line| line.starts_with("CARGO"))
            .collect();
        assert!(leaked.is_empty(), "{leaked:?}");
        assert!(program.output().contains(&"AMBIENT_X=1".to_owned()));
    }
}
