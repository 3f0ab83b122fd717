//! Types, clients and servers generated from `proto/ambient/v1`.

#![allow(missing_docs, clippy::pedantic, reason = "generated code")]

tonic::include_proto!("ambient.v1");

/// The encoded descriptor set of all protos, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
