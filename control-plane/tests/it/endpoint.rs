//! The token endpoint over real sockets.
