//! What a process sets for itself before it works: no core dumps, and as many open files as it may
//! have.

use std::sync::OnceLock;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// More open files than any of our programs needs; where the hard limit is a billion, some systems
/// reserve memory by it.
const ENOUGH_FILES: u64 = 1 << 20;

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

/// The soft limit before it was raised.
static BEFORE: OnceLock<u64> = OnceLock::new();

/// Lets this process have as many open files as it is allowed to: the usual soft limit of 1,024 is
/// for programs that use select(2).
///
/// Programs that it starts have the new limit too, unless it is set back for them (see
/// [`open_files_before`]). Failing is no reason not to run: [`open_files`] says what there is.
pub fn raise_open_files() {
    let before = *BEFORE.get_or_init(open_files);
    let most = getrlimit(Resource::Nofile).maximum;
    limit_open_files(most.unwrap_or(ENOUGH_FILES).min(ENOUGH_FILES).max(before));
}

/// The soft limit that this process was started with.
pub fn open_files_before() -> u64 {
    *BEFORE.get_or_init(open_files)
}

/// Sets the soft limit of open files.
pub fn limit_open_files(soft: u64) {
    let limit = Rlimit {
        current: Some(soft),
        ..getrlimit(Resource::Nofile)
    };
    let _ = setrlimit(Resource::Nofile, limit);
}

/// How many open files this process may have.
pub fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(ENOUGH_FILES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one_and_set_back() {
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(ENOUGH_FILES);
        // More than the other tests of this process need.
        let usual = hard.min(1024);
        limit_open_files(usual);
        raise_open_files();
        assert_eq!(open_files_before(), usual);
        assert_eq!(open_files(), hard.min(ENOUGH_FILES));
        limit_open_files(open_files_before());
        assert_eq!(open_files(), usual);
        raise_open_files();
    }
}
