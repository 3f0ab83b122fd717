//! What a project has in the cluster: its namespace and all that sessions need there.
