//! Cuts the agent's output into lines, masked and of bounded length.
//!
//! In: bytes. Out: [`Piece`]s. A line longer than the limit comes in parts, cut so that no secret
//! is split between two of them, where masking would miss it.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::{agent::mask::Masker, bridge::format::Piece};

/// Most bytes of one piece: a payload with room for the marks of a cut.
pub(super) const LONGEST: usize = 1024 * 1024 - 64;

/// How much is read at once: as much as a pipe holds.
const CHUNK: usize = 64 * 1024;

/// Reads lines; holds at most one piece and one chunk.
pub(super) struct Lines<R> {
    from: R,
    masker: Masker,
    longest: usize,
    buffer: Vec<u8>,
    /// Where the line that is not complete yet starts in the buffer.
    start: usize,
    /// Up to where no line break was found.
    scanned: usize,
    /// Whether a part of the current line was given out already.
    continued: bool,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(from: R, masker: Masker, longest: usize) -> Self {
        Self {
            from,
            masker,
            longest,
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            continued: false,
            ended: false,
        }
    }

    /// The next piece; none at the end.
    ///
    /// Cancel-safe: what was read stays here.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) async fn next(&mut self) -> io::Result<Option<Piece>> {
        loop {
            let limit = self.buffer.len().min(self.start + self.longest);
            let fresh = &self.buffer[self.scanned.min(limit)..limit];
            if let Some(at) = fresh.iter().position(|byte| *byte == b'\n') {
                let end = self.scanned + at;
                return Ok(Some(self.take_line(end, end + 1)));
            }
            self.scanned = limit;
            if self.buffer.len() - self.start >= self.longest {
                return Ok(Some(self.take_part()));
            }
            if self.ended {
                let rest = self.buffer.len();
                let nothing = rest == self.start && !self.continued;
                return Ok((!nothing).then(|| self.take_line(rest, rest)));
            }
            self.make_room();
            self.ended = self.from.read_buf(&mut self.buffer).await? == 0;
        }
    }

    fn make_room(&mut self) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        // A long line is over: give its memory back.
        if self.buffer.len() < CHUNK && self.buffer.capacity() > 4 * CHUNK {
            self.buffer.shrink_to(2 * CHUNK);
        }
        self.buffer.reserve(CHUNK);
    }

    fn take_line(&mut self, end: usize, next: usize) -> Piece {
        let line = &self.buffer[self.start..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let text = text_of(&self.masker.mask_bytes(line));
        self.start = next;
        self.scanned = next;
        Piece {
            text,
            continued: std::mem::replace(&mut self.continued, false),
            continues: false,
        }
    }

    fn take_part(&mut self) -> Piece {
        let end = self.start + self.longest;
        let masked = self.masker.mask_bytes(&self.buffer[self.start..end]);
        // Neither a secret nor a character may be cut in two.
        let held_back = self.masker.unfinished(&masked).max(unfinished(&masked));
        let held_back = if held_back < masked.len() {
            held_back
        } else {
            0
        };
        let (given, held) = masked.split_at(masked.len() - held_back);
        let text = text_of(given);
        let held = held.to_vec();
        self.start = end - held.len();
        self.buffer[self.start..end].copy_from_slice(&held);
        self.scanned = end;
        Piece {
            text,
            continued: std::mem::replace(&mut self.continued, true),
            continues: true,
        }
    }
}

/// How many bytes at the end are the start of a character whose rest is missing.
fn unfinished(bytes: &[u8]) -> usize {
    let from = bytes.len().saturating_sub(3);
    let tail = &bytes[from..];
    (1..=tail.len())
        .find(|length| {
            let end = &tail[tail.len() - length..];
            std::str::from_utf8(end)
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

/// Text that every server can store: what is not UTF-8, and NUL, which databases refuse, becomes
/// U+FFFD.
fn text_of(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    if text.contains('\0') {
        return text.replace('\0', "\u{fffd}");
    }
    text.into_owned()
}

#[cfg(test)]
mod tests {
    use ambient_shared::clock::Clock;
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "a-secret-of-24-characters";

    fn masker() -> Masker {
        let masker = Masker::new(Clock::system());
        masker.add_secret(SECRET);
        masker
    }

    /// Output that comes in these chunks.
    async fn pieces(chunks: &[Vec<u8>], longest: usize) -> Vec<Piece> {
        let mut from = tokio_test_reader(chunks);
        let mut lines = Lines::new(&mut from, masker(), longest);
        let mut pieces = Vec::new();
        while let Some(piece) = lines.next().await.unwrap() {
            pieces.push(piece);
        }
        pieces
    }

    fn tokio_test_reader(chunks: &[Vec<u8>]) -> impl AsyncRead + Unpin {
        let chunks: Vec<io::Result<std::io::Cursor<Vec<u8>>>> = chunks
            .iter()
            .map(|chunk| Ok(std::io::Cursor::new(chunk.clone())))
            .collect();
        tokio_util::io::StreamReader::new(tokio_stream::iter(chunks))
    }

    fn joined(pieces: &[Piece]) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for piece in pieces {
            if !piece.continued {
                lines.push(String::new());
            }
            lines.last_mut().unwrap().push_str(&piece.text);
        }
        lines
    }

    #[tokio::test]
    async fn the_last_line_needs_no_line_break() {
        let pieces = pieces(&[b"one\r\n\ntw".to_vec(), b"o".to_vec()], 100).await;
        assert_eq!(joined(&pieces), ["one", "", "two"]);
    }

    #[tokio::test]
    async fn a_secret_is_never_split_between_parts() {
        for before in 0..60 {
            let line = format!("{}{SECRET} and more\n", "x".repeat(before));
            let pieces = pieces(&[line.into_bytes()], 40).await;
            let masked = format!("{}[masked] and more", "x".repeat(before));
            assert_eq!(joined(&pieces), [masked]);
        }
    }

    #[tokio::test]
    async fn bytes_that_are_no_text_do_no_harm() {
        let pieces = pieces(&[b"a\xffb\0c\n".to_vec()], 100).await;
        assert_eq!(joined(&pieces), ["a\u{fffd}b\u{fffd}c"]);
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_arrive(
            text in "(\n|[a-zäöü€😀]{0,30}|a-secret-of-24-characters){0,20}",
            cuts in prop::collection::vec(1usize..40, 0..20),
        ) {
            let mut bytes = text.clone().into_bytes();
            let mut chunks = Vec::new();
            for cut in cuts {
                let rest = bytes.split_off(cut.min(bytes.len()));
                chunks.push(std::mem::replace(&mut bytes, rest));
            }
            chunks.push(bytes);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let pieces = runtime.block_on(pieces(&chunks, 64));
            let expected = masker().mask(&text).into_owned();
            let mut expected: Vec<&str> = expected.split('\n').collect();
            if expected.last() == Some(&"") {
                expected.pop();
            }
            prop_assert_eq!(joined(&pieces), expected);
            for piece in &pieces {
                prop_assert!(piece.text.len() <= 64);
            }
        }
    }
}
