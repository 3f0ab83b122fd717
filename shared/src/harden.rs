//! Keeps secrets in memory out of files.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// From now on no core dump of this process is written, by itself or by a handler that the kernel
/// would start (core(5)). First thing in a `main` that will hold secrets.
///
/// The limit is passed on to what it starts; a program that is executed may be dumped by a handler
/// again. Failing is no reason not to run.
pub fn no_core_dumps() {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}
