//! Times as the database keeps them: microseconds since the epoch, which order as numbers.

use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// Microseconds in a second.
const MICROS: i64 = 1_000_000;

/// The time as microseconds since the epoch, what is finer cut off; none beyond what 64 bits hold.
pub(crate) fn to_micros(time: &Timestamp) -> Option<i64> {
    time.seconds
        .checked_mul(MICROS)?
        .checked_add(i64::from(time.nanos) / 1000)
}

/// The time so many microseconds after the epoch.
pub(crate) fn from_micros(micros: i64) -> Timestamp {
    Timestamp {
        seconds: micros.div_euclid(MICROS),
        // Below a thousand million, so it fits.
        nanos: i32::try_from(micros.rem_euclid(MICROS) * 1000).unwrap_or_default(),
    }
}

/// The machine's time as microseconds since the epoch; 0 before it.
pub(crate) fn micros_of(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_way_through_the_database() {
        for text in [
            "1970-01-01T00:00:00Z",
            "2026-01-02T03:04:05.123456Z",
            "1969-12-31T23:59:59.999999Z",
        ] {
            let time: Timestamp = text.parse().unwrap();
            assert_eq!(from_micros(to_micros(&time).unwrap()), time, "{text}");
        }
        assert_eq!(
            to_micros(&Timestamp {
                seconds: i64::MAX,
                nanos: 0
            }),
            None
        );
    }
}
