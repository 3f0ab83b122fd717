//! The token endpoint over real sockets.
//!
//! By subject: `contract` (the table of contract section 1), `proof`, `clocks` that are off, `load`
//! (rates, floods, odd requests), `connections`, their `limits` and `places`, `tls`, `lines` of the log; and
//! the real program under `siege`.

mod clocks;
mod connections;
mod contract;
mod limits;
mod lines;
mod load;
mod places;
mod proof;
pub(crate) mod scene;
mod siege;
mod tls;
