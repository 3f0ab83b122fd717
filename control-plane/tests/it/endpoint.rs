//! The token endpoint over real sockets.
//!
//! By subject: `contract` (the table of contract section 1), `proof`, `load` (limits, floods, odd
//! requests), `connections`.

mod connections;
mod contract;
mod load;
mod proof;
pub(crate) mod scene;
