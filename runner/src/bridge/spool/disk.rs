//! The files of a spool: segments with records, and how far they are acknowledged.
//!
//! Segments are only appended to, and removed once all in them is acknowledged. `acknowledged`
//! has two slots that are overwritten in turn, so it needs no room on a full disk and one of them
//! is whole whenever the runner is killed. Memory holds the head alone, however much waits; when
//! the disk takes nothing more, also the one message that it refused.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use ambient_shared::swap::{SECRET_DIR, SECRET_FILE};
use rustix::fs::{FlockOperation, flock};
use tracing::{error, info, warn};

use super::{
    Head, Outgoing, SpoolError,
    record::{self, array, checksum},
};
use crate::bridge::format;

/// A segment that holds this part of the capacity gets no more records: small enough to give space
/// back soon, large enough to be few.
const SEGMENT_PART: u64 = 16;

/// The only segment is removed when it holds this part of the capacity and all in it is
/// acknowledged: making files anew for every message would cost more than it saves.
const WORTH_REMOVING_PART: u64 = 256;

/// Bytes of a slot: number, seq, checksum.
const SLOT: usize = 8 + 8 + 4;

pub(super) struct Disk {
    folder: PathBuf,
    capacity: u64,
    segments: VecDeque<Segment>,
    /// The last segment, when it takes more records.
    active: Option<File>,
    reader: Option<Reader>,
    head: Option<Head>,
    /// The message that did not fit on the disk; it comes after all that did.
    refused: Option<Head>,
    /// Number of the next message.
    next: u64,
    /// Messages below this number were here when the spool was opened.
    first_new: u64,
    waiting_bytes: u64,
    acknowledged: Acknowledged,
    /// Whether a failure was logged that has not passed yet.
    failing: bool,
    _lock: File,
}

struct Segment {
    path: PathBuf,
    /// Number of its last record; of the one before, while it is empty.
    last: u64,
    length: u64,
}

struct Reader {
    path: PathBuf,
    file: BufReader<File>,
}

impl Disk {
    pub(super) fn open(folder: &Path, capacity: u64) -> Result<Self, SpoolError> {
        let broken = |source| SpoolError::Folder {
            folder: folder.to_owned(),
            source,
        };
        let lock = claim(folder)?;
        let mut disk = Self {
            folder: folder.to_owned(),
            capacity,
            segments: VecDeque::new(),
            active: None,
            reader: None,
            head: None,
            refused: None,
            next: 1,
            first_new: 1,
            waiting_bytes: 0,
            acknowledged: Acknowledged::open(&folder.join("acknowledged")).map_err(broken)?,
            failing: false,
            _lock: lock,
        };
        disk.take_up().map_err(broken)?;
        Ok(disk)
    }

    /// Reads what an earlier run left.
    fn take_up(&mut self) -> io::Result<()> {
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.folder)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<_>>()?;
        paths.retain(|path| path.extension().is_some_and(|ending| ending == "log"));
        paths.sort();
        let mut last = self.acknowledged.number;
        for path in paths {
            let mut segment = Segment {
                last,
                length: 0,
                path,
            };
            let whole = fs::metadata(&segment.path)?.len();
            let mut file = BufReader::new(File::open(&segment.path)?);
            let ended = loop {
                let (number, message) = match record::read(&mut file) {
                    Ok(Some(record)) => record,
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                };
                segment.last = number;
                segment.length += record::length(&message);
                if number > self.acknowledged.number {
                    self.waiting_bytes += record::length(&message);
                }
            };
            if let Some(error) = ended {
                let bytes = whole - segment.length;
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    // The runner was killed while it wrote: nobody was told that this was kept.
                    info!(bytes, "the spool ends with a part of a message, dropped");
                } else {
                    error!(%error, bytes, "messages of an earlier run are lost from the spool");
                }
                let file = OpenOptions::new().write(true).open(&segment.path)?;
                file.set_len(segment.length)?;
            }
            last = last.max(segment.last);
            self.segments.push_back(segment);
        }
        self.next = last + 1;
        self.first_new = self.next;
        self.remove_acknowledged();
        if let Some(segment) = self.segments.back() {
            self.active = Some(OpenOptions::new().append(true).open(&segment.path)?);
        }
        let (messages, bytes) = self.waiting();
        if messages > 0 {
            info!(messages, bytes, "messages of an earlier run wait");
        }
        Ok(())
    }

    /// Whether the message was taken; not when the spool is full.
    pub(super) fn append(&mut self, message: &Arc<Outgoing>) -> bool {
        let length = record::length(message);
        let full = self.waiting_bytes > 0 && self.waiting_bytes + length > self.capacity;
        if full || self.refused.is_some() {
            return false;
        }
        match self.write(message) {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    error!(
                        %error,
                        folder = %self.folder.display(),
                        "cannot write to the spool; the agent waits for each message to be pushed"
                    );
                }
                self.refused = Some(Head {
                    number: self.next,
                    message: Arc::clone(message),
                    leftover: false,
                });
            }
        }
        self.next += 1;
        self.waiting_bytes += length;
        true
    }

    fn write(&mut self, message: &Outgoing) -> io::Result<()> {
        if self
            .segments
            .back()
            .is_none_or(|last| last.length >= self.capacity / SEGMENT_PART)
        {
            self.active = None;
        }
        let active = if let Some(file) = &mut self.active {
            file
        } else {
            let path = self.folder.join(format!("{:020}.log", self.next));
            let file = OpenOptions::new()
                .append(true)
                .create_new(true)
                .mode(SECRET_FILE)
                .open(&path)?;
            self.segments.push_back(Segment {
                path,
                last: self.next - 1,
                length: 0,
            });
            self.active.insert(file)
        };
        let Some(segment) = self.segments.back_mut() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if let Err(error) = active.write_all(&record::encode(self.next, message)) {
            // What was written of it must not stand before the next record.
            if active.set_len(segment.length).is_err() {
                self.active = None;
            }
            return Err(error);
        }
        segment.last = self.next;
        segment.length += record::length(message);
        Ok(())
    }

    /// The message whose turn it is.
    ///
    /// # Errors
    /// When it cannot be read now, but maybe later.
    pub(super) fn head(&mut self) -> io::Result<Option<Head>> {
        if self.head.is_none() {
            self.head = self.read_head()?;
        }
        Ok(self.head.clone())
    }

    fn read_head(&mut self) -> io::Result<Option<Head>> {
        let done = self.acknowledged.number;
        let Some(segment) = self.segments.iter().find(|segment| segment.last > done) else {
            return Ok(self.refused.clone());
        };
        let (number, message) = match read_after(&mut self.reader, &segment.path, done) {
            Ok(found) => found,
            Err(error) if is_damage(&error) => {
                let messages = segment.last - done;
                error!(%error, messages, "messages cannot be read back from the spool");
                let what = format!("{messages} messages were damaged on the runner's disk");
                let event = format::lost_message("spool_damaged", &what);
                (segment.last, Outgoing::new(event))
            }
            Err(error) => return Err(error),
        };
        Ok(Some(Head {
            number,
            message: Arc::new(message),
            leftover: number < self.first_new,
        }))
    }

    pub(super) fn acknowledge(&mut self, number: u64, seq: i64) {
        let one_record = number == self.acknowledged.number + 1;
        let head = self.head.take();
        self.acknowledged.set(number, seq);
        self.refused.take_if(|refused| refused.number <= number);
        self.remove_acknowledged();
        match head {
            Some(head) if one_record => {
                let length = record::length(&head.message);
                self.waiting_bytes = self.waiting_bytes.saturating_sub(length);
            }
            // After damage nobody knows what was left of this segment.
            _ => self.count_again(),
        }
    }

    fn count_again(&mut self) {
        let segments = self.segments.iter();
        let on_disk: u64 = segments
            .filter(|segment| segment.last > self.acknowledged.number)
            .map(|segment| segment.length)
            .sum();
        let refused = self.refused.as_ref();
        self.waiting_bytes = on_disk + refused.map_or(0, |head| record::length(&head.message));
    }

    fn remove_acknowledged(&mut self) {
        while let Some(first) = self.segments.front() {
            let last_one = self.segments.len() == 1;
            let wanted = first.last > self.acknowledged.number;
            if wanted || (last_one && first.length < self.capacity / WORTH_REMOVING_PART) {
                return;
            }
            if let Err(error) = fs::remove_file(&first.path) {
                // Harmless: the next start finds it acknowledged, and removes it.
                warn!(%error, "cannot remove a segment of the spool");
            }
            self.segments.pop_front();
            if last_one {
                self.active = None;
                self.reader = None;
            }
        }
    }

    pub(super) fn acknowledged_seq(&self) -> i64 {
        self.acknowledged.seq
    }

    /// How many messages and bytes wait.
    pub(super) fn waiting(&self) -> (u64, u64) {
        let messages = self.next - 1 - self.acknowledged.number.min(self.next - 1);
        (messages, self.waiting_bytes)
    }
}

/// The first record after number `done` in this segment, which has one.
fn read_after(reader: &mut Option<Reader>, path: &Path, done: u64) -> io::Result<(u64, Outgoing)> {
    if reader.as_ref().is_none_or(|reader| reader.path != path) {
        *reader = Some(Reader {
            path: path.to_owned(),
            file: BufReader::new(File::open(path)?),
        });
    }
    let open = reader.as_mut().ok_or(io::ErrorKind::NotFound)?;
    loop {
        match record::read(&mut open.file) {
            Ok(Some((number, message))) if number > done => return Ok((number, message)),
            Ok(Some(_)) => {}
            Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => {
                // The position is lost: start over, should there be another try.
                *reader = None;
                return Err(error);
            }
        }
    }
}

/// Makes the folder, and takes it for as long as what is given lives.
pub(super) fn claim(folder: &Path) -> Result<File, SpoolError> {
    let broken = |source| SpoolError::Folder {
        folder: folder.to_owned(),
        source,
    };
    let mut dir = DirBuilder::new();
    dir.recursive(true).mode(SECRET_DIR);
    dir.create(folder).map_err(broken)?;
    let lock = private_file(&folder.join("lock")).map_err(broken)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SpoolError::InUse {
            folder: folder.to_owned(),
        }),
        Err(error) => Err(broken(error.into())),
    }
}

/// Whether no later try can read it.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), InvalidData | UnexpectedEof | NotFound)
}

fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(SECRET_FILE)
        .open(path)
}

/// How far the messages are acknowledged, in a file with two slots.
struct Acknowledged {
    file: File,
    slot: u64,
    number: u64,
    seq: i64,
}

impl Acknowledged {
    fn open(path: &Path) -> io::Result<Self> {
        let file = private_file(path)?;
        let mut content = [0; 2 * SLOT];
        let length = content
            .len()
            .min(usize::try_from(file.metadata()?.len()).unwrap_or(0));
        file.read_exact_at(&mut content[..length], 0)?;
        let mut acknowledged = Self {
            file,
            slot: 1,
            number: 0,
            seq: 0,
        };
        for (slot, bytes) in (0..).zip(content.chunks_exact(SLOT)) {
            let number = u64::from_le_bytes(array(&bytes[..8]));
            let whole = checksum(&bytes[..16]).to_le_bytes() == bytes[16..];
            if whole && number > acknowledged.number {
                acknowledged.slot = slot;
                acknowledged.number = number;
                acknowledged.seq = i64::from_le_bytes(array(&bytes[8..16]));
            }
        }
        Ok(acknowledged)
    }

    fn set(&mut self, number: u64, seq: i64) {
        self.number = self.number.max(number);
        self.seq = self.seq.max(seq);
        self.slot = 1 - self.slot;
        let mut bytes = [0; SLOT];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        let checksum = checksum(&bytes[..16]);
        bytes[16..].copy_from_slice(&checksum.to_le_bytes());
        if let Err(error) = self.file.write_all_at(&bytes, self.slot * SLOT as u64) {
            // Its id tells our server, should it be sent again after a crash.
            warn!(%error, "cannot record that a message was pushed");
        }
    }
}
