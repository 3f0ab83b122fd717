//! Starts the real runner, with real processes as agents and real sockets as servers.

mod messages;
mod output;
mod scene;
mod settings;
mod supervision;
mod token;
