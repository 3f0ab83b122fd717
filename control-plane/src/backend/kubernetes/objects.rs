//! The objects of a session. Pure.
