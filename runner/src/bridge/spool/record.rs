//! How a message is written in the spool: length, checksum, number, and the message.

use std::io::{self, Read};

use uuid::Uuid;

use super::Outgoing;
use crate::bridge::format::{EventType, MAX_PAYLOAD};

/// Bytes before the body: length, checksum, number.
const HEADER: usize = 4 + 4 + 8;

/// Bytes of the body before the payload: id, type.
const BODY_HEADER: usize = 16 + 1;

/// Longest body that is believed: more is no record of ours.
const LONGEST_BODY: usize = BODY_HEADER + MAX_PAYLOAD;

/// Bytes of a message's record.
pub(super) fn length(message: &Outgoing) -> u64 {
    (HEADER + BODY_HEADER + message.payload.len()) as u64
}

/// The record of a message.
pub(super) fn encode(number: u64, message: &Outgoing) -> Vec<u8> {
    let body_length = BODY_HEADER + message.payload.len();
    let code = EventType::ALL.iter().position(|kind| *kind == message.kind);
    let code = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(0);

    let mut record = Vec::with_capacity(HEADER + body_length);
    // Fits: a payload has at most MAX_PAYLOAD bytes.
    record.extend_from_slice(&u32::try_from(body_length).unwrap_or(u32::MAX).to_le_bytes());
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&number.to_le_bytes());
    record.extend_from_slice(message.id.as_bytes());
    record.push(code);
    record.extend_from_slice(message.payload.as_bytes());
    let checksum = checksum(&record[8..]);
    record[4..8].copy_from_slice(&checksum.to_le_bytes());
    record
}

/// Reads the next record; none at the end of the file.
///
/// # Errors
/// `UnexpectedEof` for a part of a record, `InvalidData` for what is none; those of reading.
pub(super) fn read(from: &mut impl Read) -> io::Result<Option<(u64, Outgoing)>> {
    let mut header = [0; HEADER];
    match from.read(&mut header[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut header[1..])?,
    }
    let (length, rest) = header.split_at(4);
    let (expected, number) = rest.split_at(4);
    let length = u32::from_le_bytes(array(length)) as usize;
    if !(BODY_HEADER..=LONGEST_BODY).contains(&length) {
        return Err(damaged("length"));
    }
    let mut checked = vec![0; 8 + length];
    checked[..8].copy_from_slice(number);
    from.read_exact(&mut checked[8..])?;
    if checksum(&checked) != u32::from_le_bytes(array(expected)) {
        return Err(damaged("checksum"));
    }
    let kind = EventType::ALL.get(usize::from(checked[24]));
    let payload = String::from_utf8(checked.split_off(8 + BODY_HEADER));
    let message = Outgoing {
        id: Uuid::from_bytes(array(&checked[8..24])),
        kind: *kind.ok_or_else(|| damaged("type"))?,
        payload: payload.map_err(|_| damaged("text"))?,
    };
    Ok(Some((u64::from_le_bytes(array(number)), message)))
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("wrong {what}"))
}

/// `bytes` has that length.
pub(super) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

/// CRC-32 (IEEE 802.3), as in zip and Ethernet.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        (crc >> 8) ^ TABLE[index as usize]
    })
}

static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "below 256")]
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                (value >> 1) ^ 0xedb8_8320
            } else {
                value >> 1
            };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32() {
        // printf 123456789 | gzip | tail -c8, and every description of CRC-32.
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_record_reads_back_and_a_changed_byte_is_seen() {
        let message = Outgoing::new((EventType::Error, "payload".to_owned()));
        let record = encode(7, &message);
        assert_eq!(record.len() as u64, length(&message));
        assert_eq!(read(&mut record.as_slice()).unwrap(), Some((7, message)));
        for byte in 0..record.len() {
            let mut changed = record.clone();
            changed[byte] ^= 1;
            assert!(read(&mut changed.as_slice()).is_err(), "byte {byte}");
        }
        for length in 1..record.len() {
            assert!(read(&mut &record[..length]).is_err(), "{length} bytes");
        }
    }
}
