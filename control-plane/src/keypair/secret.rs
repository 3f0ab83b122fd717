//! Keys in Secrets.
