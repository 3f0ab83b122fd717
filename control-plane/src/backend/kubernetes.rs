//! Sessions as pods.

pub(crate) mod names;
pub(crate) mod objects;
pub mod projects;
pub(crate) mod refusal;
pub(crate) mod seen;
pub mod settings;
