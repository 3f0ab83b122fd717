//! Kubernetes quantities, such as `500m` and `4Gi`, as far as they can be compared.

/// Longest text that is read: far more digits than any amount has.
const MAX_LENGTH: usize = 24;

/// Decimal places that count; what is finer is rounded up, as Kubernetes does.
const PLACES: u32 = 9;

/// An amount of a resource, in billionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Amount(u128);

impl Amount {
    /// The amount that a quantity names. None for a text that is none, is negative, or is larger
    /// than any amount that Kubernetes can count.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_LENGTH {
            return None;
        }
        let text = text.strip_prefix('+').unwrap_or(text);
        let end = text
            .find(|it: char| !it.is_ascii_digit() && it != '.')
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.len() + fraction.len() == 0 || !digits(whole) || !digits(fraction) {
            return None;
        }
        let mantissa: u128 = format!("{whole}{fraction}").parse().ok()?;
        let places = u32::try_from(fraction.len()).ok()?;
        let scale = Scale::parse(suffix)?;
        // Billionths of it: mantissa * base^power * 10^(9 - places), rounded up.
        let mut amount = mantissa;
        let mut tens = i64::from(PLACES) - i64::from(places);
        match scale {
            Scale::Binary(power) => amount = amount.checked_mul(1024_u128.checked_pow(power)?)?,
            Scale::Decimal(exponent) => tens += i64::from(exponent),
        }
        let factor = 10_u128.checked_pow(u32::try_from(tens.unsigned_abs()).ok()?);
        let amount = match (tens >= 0, factor) {
            (true, Some(factor)) => amount.checked_mul(factor)?,
            (true, None) => (amount == 0).then_some(0)?,
            (false, Some(factor)) => amount.div_ceil(factor),
            (false, None) => u128::from(amount > 0),
        };
        Self::counted(amount)
    }

    /// Kubernetes counts to 2^63 - 1 whole ones.
    fn counted(billionths: u128) -> Option<Self> {
        let most = u128::from(i64::MAX.unsigned_abs()) * 10_u128.pow(PLACES);
        (billionths <= most).then_some(Self(billionths))
    }
}

enum Scale {
    /// A power of 1024.
    Binary(u32),
    /// A power of 10.
    Decimal(i32),
}

impl Scale {
    fn parse(suffix: &str) -> Option<Self> {
        const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        if let Some(power) = BINARY.iter().position(|it| *it == suffix) {
            return u32::try_from(power + 1).ok().map(Self::Binary);
        }
        let exponent = match suffix {
            "n" => -9,
            "u" => -6,
            "m" => -3,
            "" => 0,
            "k" => 3,
            "M" => 6,
            "G" => 9,
            "T" => 12,
            "P" => 15,
            "E" => 18,
            _ => {
                let exponent = suffix.strip_prefix(['e', 'E'])?;
                // `i32` takes all that is written so: a sign and digits.
                exponent.parse().ok()?
            }
        };
        Some(Self::Decimal(exponent))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amount(text: &str) -> Amount {
        Amount::parse(text).unwrap_or_else(|| panic!("{text} is no quantity"))
    }

    #[test]
    fn the_same_amount_can_be_written_in_many_ways() {
        for same in [
            &[
                "1",
                "1000m",
                "1e0",
                "0.001k",
                "+1",
                "1.",
                "1E0",
                "1000000000n",
            ][..],
            &["1Gi", "1024Mi", "1048576Ki", "1073741824", "1073741824000m"],
            &["0.5", ".5", "500m", "5e-1", "500000u"],
            &["1P", "1e15", "1000T"],
            &["0", "0.0", "0Gi", "0e99"],
        ] {
            for text in same {
                assert_eq!(amount(text), amount(same[0]), "{text}");
            }
        }
    }

    #[test]
    fn larger_is_larger() {
        let rising = [
            "0", "1n", "1m", "100m", "1", "1k", "1Ki", "1M", "1Mi", "4Gi", "1Ti", "7E",
        ];
        for pair in rising.windows(2) {
            assert!(amount(pair[0]) < amount(pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn what_is_finer_than_a_billionth_is_rounded_up() {
        assert_eq!(amount("0.0000000001"), amount("1n"));
        assert_eq!(amount("1e-99"), amount("1n"));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in [
            "",
            " ",
            "Gi",
            ".",
            "+",
            "-1",
            "1 ",
            " 1",
            "1gi",
            "1 Gi",
            "1GB",
            "1mi",
            "1.2.3",
            "0x10",
            "1e",
            "1e1.5",
            "1e1Gi",
            "٣",
            "NaN",
            "inf",
            "9E9E",
            "1E99",
            "16E",
            "9999999999999999999999",
        ] {
            assert_eq!(Amount::parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,30}") {
            let _ = Amount::parse(&text);
        }

        #[test]
        fn any_likely_text_is_read_or_refused(text in "[+-]?[0-9.]{0,24}[eE]?[+-]?[0-9kKMGTPEmun]{0,10}i?") {
            let _ = Amount::parse(&text);
        }

        #[test]
        fn whole_numbers_compare_as_numbers(one: u32, other: u32) {
            let written = |number: u32| amount(&number.to_string());
            prop_assert_eq!(written(one).cmp(&written(other)), one.cmp(&other));
        }
    }
}
