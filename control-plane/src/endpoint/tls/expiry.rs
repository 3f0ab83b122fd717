//! When a certificate expires: the TLS library checks a pair, but does not tell.

use std::time::SystemTime;

use der::{
    Decode as _, Reader, SliceReader, Tag,
    asn1::{AnyRef, GeneralizedTime, UtcTime},
};

/// The end of a certificate's validity (RFC 5280, section 4.1); none when it is malformed.
pub(super) fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let mut reader = SliceReader::new(certificate).ok()?;
    reader.sequence(of_certificate).ok()
}

fn of_certificate(fields: &mut SliceReader<'_>) -> der::Result<SystemTime> {
    let not_after = fields.sequence(of_signed_part)?;
    skip_rest(fields)?;
    Ok(not_after)
}

fn of_signed_part(fields: &mut SliceReader<'_>) -> der::Result<SystemTime> {
    if Tag::peek(fields)?.is_context_specific() {
        // The version; the first one does not say so.
        AnyRef::decode(fields)?;
    }
    // Serial number, algorithm, issuer.
    for _ in 0..3 {
        AnyRef::decode(fields)?;
    }
    let not_after = fields.sequence(of_validity)?;
    skip_rest(fields)?;
    Ok(not_after)
}

fn of_validity(fields: &mut SliceReader<'_>) -> der::Result<SystemTime> {
    AnyRef::decode(fields)?;
    time(fields)
}

fn skip_rest(fields: &mut SliceReader<'_>) -> der::Result<()> {
    while !fields.is_finished() {
        AnyRef::decode(fields)?;
    }
    Ok(())
}

/// Until 2049 in two digits of the year, then in four.
fn time(reader: &mut SliceReader<'_>) -> der::Result<SystemTime> {
    match Tag::peek(reader)? {
        Tag::UtcTime => Ok(UtcTime::decode(reader)?.to_system_time()),
        _ => Ok(GeneralizedTime::decode(reader)?.to_system_time()),
    }
}

#[cfg(test)]
mod tests {
    use ambient_shared::clock::from_unix_seconds;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn expires_at(year: i32) -> Vec<u8> {
        let mut params = CertificateParams::new(["cp.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 2, 3);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn both_forms_of_a_time_are_read() {
        // date --utc --date 2030-02-03 +%s
        for (year, seconds) in [(2030, 1_896_307_200), (2060, 2_842_992_000)] {
            assert_eq!(not_after(&expires_at(year)), from_unix_seconds(seconds));
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_expiry() {
        let whole = expires_at(2030);
        for length in 0..whole.len() {
            assert_eq!(not_after(&whole[..length]), None, "{length}");
        }
        assert_eq!(not_after(b"certificate"), None);
        assert_eq!(not_after(&vec![0x30; 10_000]), None);
    }
}
