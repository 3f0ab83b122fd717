//! The keys of a control plane: its RSA keypair, the root of session keys, the signing key.

pub mod files;
