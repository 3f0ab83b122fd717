//! What was last seen of the sessions' objects.
