//! The refresher without a network, on a paused clock.
