//! What is done about a session (being written).

pub mod desired;
