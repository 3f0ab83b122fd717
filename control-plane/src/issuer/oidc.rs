//! The `oidc` issuer: a token of the control plane's own, from an identity provider.
