//! The feed (being written).
