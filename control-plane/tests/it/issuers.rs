//! Issuers against real HTTP servers.
