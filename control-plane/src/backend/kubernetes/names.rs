//! Names and labels of a session's objects (contract section 3).
