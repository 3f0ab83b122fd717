//! Container entrypoint of an agent session.
fn main() {}
