//! Where the API token comes from, how it is kept fresh, and how it reaches the agent.

pub(crate) mod refresher;
