//! Sessions as pods.
