//! Against a server that answers as told.
