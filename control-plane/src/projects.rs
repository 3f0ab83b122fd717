//! The projects that the API server has, and what each is to have in the cluster.
