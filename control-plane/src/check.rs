//! Tries each dependency, and says in a table what does not work.
