//! Following a file that other programs append to, by lines.

use std::{
    io::{self, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
    sync::mpsc,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// How often the file is looked at.
const PAUSE: Duration = Duration::from_millis(50);

/// Longest line; what is longer comes in pieces.
const LONGEST_LINE: usize = 1024 * 1024;

/// Bytes read at a time.
const CHUNK: usize = 64 * 1024;

/// Sends each line of a file, from its start and as it grows; made anew or cut, it is read from
/// its start again. When `ended` says that nobody writes any more, the rest comes, the last line
/// also without its end, and this returns.
pub(super) async fn lines(
    path: PathBuf,
    ended: CancellationToken,
    lines: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let mut file = None;
    let mut offset = 0;
    let mut pending = Vec::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        // Asked before reading: what was written before the end is then read.
        let is_last = ended.is_cancelled();
        if file.is_none() {
            file = File::open(&path).await.ok();
        }
        if let Some(file) = &mut file {
            if file.metadata().await?.len() < offset {
                file.seek(SeekFrom::Start(0)).await?;
                offset = 0;
            }
            loop {
                let read = file.read(&mut chunk).await?;
                if read == 0 {
                    break;
                }
                offset += read as u64;
                pending.extend_from_slice(&chunk[..read]);
                for line in take_lines(&mut pending) {
                    if lines.send(line).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
        if is_last {
            if !pending.is_empty() {
                // Nobody listening is no failure.
                let _ = lines.send(pending).await;
            }
            return Ok(());
        }
        ended.run_until_cancelled(sleep(PAUSE)).await;
    }
}

/// The lines that are complete, without their ends; what is left in `pending` is not.
fn take_lines(pending: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let complete = match pending.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => end + 1,
        None if pending.len() >= LONGEST_LINE => return vec![std::mem::take(pending)],
        None => return Vec::new(),
    };
    let rest = pending.split_off(complete);
    let taken = std::mem::replace(pending, rest);
    taken
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line).to_vec())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::backend::process::folder::open_log;

    #[tokio::test]
    async fn everything_comes_by_lines_even_the_last_without_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (sender, mut received) = mpsc::channel(4);
        let ended = CancellationToken::new();
        let write = async {
            let mut log = open_log(&path).unwrap();
            log.write_all(b"one\ntw").unwrap();
            assert_eq!(received.recv().await.unwrap(), b"one");
            log.write_all(b"o\n").unwrap();
            assert_eq!(received.recv().await.unwrap(), b"two");
            // Cut, as a log that has grown too large.
            log.set_len(0).unwrap();
            sleep(PAUSE * 3).await;
            log.write_all(b"x\nlast").unwrap();
            assert_eq!(received.recv().await.unwrap(), b"x");
            ended.cancel();
            assert_eq!(received.recv().await.unwrap(), b"last");
            assert_eq!(received.recv().await, None);
        };
        let (followed, ()) = tokio::join!(lines(path.clone(), ended.clone(), sender), write);
        followed.unwrap();
    }
}
