//! Stdio of an agent whose messages go nowhere but the runner's own stdio, masked on the way out.
//!
//! In: the runner's stdin. Out: the agent's output without secrets, as it comes: what is held
//! back is only an end that may be the start of a secret.

use std::{borrow::Cow, io};

use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite,
    AsyncWriteExt as _, BufReader, Stdin,
};

use super::mask::Masker;

/// Bytes that are read at once.
const CHUNK: usize = 16 * 1024;

/// The runner's stdin, for one agent after the other. What one did not get, the next gets.
pub(crate) struct Input(BufReader<Stdin>);

impl Input {
    /// The runner's stdin; nothing is read yet.
    pub(crate) fn stdin() -> Self {
        Self(BufReader::with_capacity(CHUNK, tokio::io::stdin()))
    }

    /// Writes `first`, then what comes in, then closes the agent's stdin at the end of input.
    ///
    /// Cancel-safe, but for what the agent's pipe had not taken yet.
    ///
    /// # Errors
    /// When the agent no longer reads, or the input breaks.
    pub(crate) async fn feed(
        &mut self,
        first: Option<String>,
        agent: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        feed(&mut self.0, first, agent).await
    }
}

async fn feed(
    input: &mut (impl AsyncBufRead + Unpin),
    first: Option<String>,
    mut agent: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    if let Some(first) = first {
        agent.write_all(first.as_bytes()).await?;
    }
    loop {
        let chunk = input.fill_buf().await?;
        if chunk.is_empty() {
            return agent.shutdown().await;
        }
        let written = agent.write(chunk).await?;
        input.consume(written);
    }
}

/// Copies until the end, with the known secrets masked.
///
/// # Errors
/// When either side breaks.
pub(crate) async fn copy_masked(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    masker: Masker,
) -> io::Result<()> {
    let mut held = Vec::with_capacity(CHUNK);
    loop {
        // At most a chunk beyond the longest secret, which has a limit of its own.
        held.reserve(CHUNK);
        let at_end = from.read_buf(&mut held).await? == 0;
        // Masked first: the end of a whole secret may look like the start of another.
        if let Cow::Owned(masked) = masker.mask_bytes(&held) {
            held = masked;
        }
        let open = if at_end { 0 } else { masker.unfinished(&held) };
        let ready = held.len() - open;
        to.write_all(&held[..ready]).await?;
        to.flush().await?;
        held.drain(..ready);
        if at_end {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use ambient_shared::clock::Clock;
    use proptest::prelude::*;

    use super::*;

    #[tokio::test]
    async fn a_prompt_goes_first_and_the_end_of_input_closes() {
        let mut input = &b"typed\n"[..];
        let (agent, mut reads) = tokio::io::duplex(4);
        let feeding = feed(&mut input, Some("prompt\n".to_owned()), agent);
        let mut got = String::new();
        let (fed, read) = tokio::join!(feeding, reads.read_to_string(&mut got));
        fed.unwrap();
        read.unwrap();
        assert_eq!(got, "prompt\ntyped\n");
    }

    proptest! {
        /// However the output is cut into chunks, it leaves as if it had been masked whole.
        #[test]
        fn chunks_do_not_matter(
            parts in prop::collection::vec(
                prop_oneof!["[a-c \n]{0,8}", Just("topsecret".to_owned()), Just("tops".to_owned())],
                0..12,
            ),
            size in 1_usize..12,
        ) {
            let masker = Masker::new(Clock::system());
            masker.add_secret("topsecret");
            let text = parts.concat();
            let whole = masker.mask(&text).into_owned();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let copied = runtime.block_on(async {
                let (mut writer, reader) = tokio::io::duplex(size);
                let mut out = Vec::new();
                let (written, copied) = tokio::join!(
                    async { writer.write_all(text.as_bytes()).await?; drop(writer); io::Result::Ok(()) },
                    copy_masked(reader, &mut out, masker),
                );
                written.unwrap();
                copied.unwrap();
                out
            });
            prop_assert_eq!(String::from_utf8(copied).unwrap(), whole);
        }
    }
}
