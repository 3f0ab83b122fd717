//! Carries the agent's messages to the session and back.
