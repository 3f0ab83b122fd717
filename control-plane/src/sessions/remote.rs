//! Single calls to the API server (being written).
