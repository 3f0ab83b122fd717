use std::{collections::VecDeque, fs, io, sync::mpsc, time::Duration};

use ambient_testing::DEADLINE;
use futures_util::poll;
use proptest::prelude::*;

use super::*;
use crate::bridge::format::MAX_PAYLOAD;

fn session() -> SessionId {
    SessionId::parse("session-of-spool-tests").unwrap()
}

fn says(payload: impl Into<String>) -> Outgoing {
    Outgoing::new((EventType::Assistant, payload.into()))
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("in time")
}

#[tokio::test]
async fn a_message_is_given_out_until_it_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path(), &session(), CAPACITY).unwrap();
    let (one, two) = (says("one"), says("two"));
    spool.append(one.clone()).await;
    spool.append(two.clone()).await;

    for _ in 0..2 {
        let head = within(spool.head()).await.unwrap();
        assert_eq!(*head.message, one);
        assert!(!head.leftover);
    }
    let number = spool.head().await.unwrap().number;
    spool.acknowledge(number, 41).await;
    assert_eq!(*within(spool.head()).await.unwrap().message, two);
    drop(spool);

    let spool = Spool::open(dir.path(), &session(), CAPACITY).unwrap();
    let head = within(spool.head()).await.unwrap();
    assert_eq!(*head.message, two);
    assert!(head.leftover);
    assert_eq!(spool.acknowledged_seq().await, 41);
    spool.acknowledge(head.number, 42).await;
    spool.finish();
    assert!(within(spool.head()).await.is_none());
}

#[tokio::test]
async fn a_full_spool_waits_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path(), &session(), 1000).unwrap();
    spool.append(says("x".repeat(900))).await;
    let blocked = spool.append(says("y".repeat(900)));
    tokio::pin!(blocked);
    let waits = tokio::time::timeout(Duration::from_millis(50), &mut blocked);
    assert!(waits.await.is_err());

    let head = spool.head().await.unwrap();
    spool.acknowledge(head.number, 1).await;
    within(blocked).await;
    let (messages, _) = spool.waiting().await;
    assert_eq!(messages, 1);
}

/// Runs with one thread for all that uses a disk, and that thread busy until the sender is dropped.
pub(in crate::bridge) fn with_a_slow_disk<F: Future>(test: impl FnOnce(mpsc::Sender<()>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let (until_dropped, busy) = mpsc::channel::<()>();
        let disk = tokio::task::spawn_blocking(move || busy.recv());
        within(test(until_dropped)).await;
        assert!(disk.await.unwrap().is_err());
    });
}

#[test]
fn a_closed_spool_is_free_even_when_an_append_was_cut_off() {
    with_a_slow_disk(|disk| async move {
        let dir = tempfile::tempdir().unwrap();
        let open = || Spool::open(dir.path(), &session(), CAPACITY);
        let spool = Arc::new(open().unwrap());
        {
            let append = spool.append(says("cut off"));
            tokio::pin!(append);
            assert!(poll!(append).is_pending());
        }
        let close = spool.close();
        tokio::pin!(close);
        assert!(poll!(&mut close).is_pending());
        drop(disk);
        close.await;
        assert_eq!(open().unwrap().waiting().await.0, 1);
    });
}

#[tokio::test]
async fn a_message_larger_than_the_spool_passes_alone() {
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path(), &session(), 1000).unwrap();
    let large = says("x".repeat(MAX_PAYLOAD));
    within(spool.append(large.clone())).await;
    assert_eq!(*within(spool.head()).await.unwrap().message, large);
}

#[tokio::test]
async fn two_runners_cannot_share_a_spool() {
    let dir = tempfile::tempdir().unwrap();
    let first = Spool::open(dir.path(), &session(), CAPACITY).unwrap();
    assert!(matches!(
        Spool::open(dir.path(), &session(), CAPACITY),
        Err(SpoolError::InUse { .. })
    ));
    let other = SessionId::parse("another-session").unwrap();
    Spool::open(dir.path(), &other, CAPACITY).unwrap();
    drop(first);
    Spool::open(dir.path(), &session(), CAPACITY).unwrap();
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let Err(error) = Spool::open(&file, &session(), CAPACITY) else {
        panic!("a file is no folder");
    };
    let shown = error.to_string();
    assert!(shown.contains(file.to_str().unwrap()), "{shown}");
    assert!(shown.contains("cannot keep messages in "), "{shown}");
}

/// With its folder gone, nothing can be written, as on a full disk.
#[test]
fn what_the_disk_refuses_is_kept_in_memory_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("spool");
    let mut disk = Disk::open(&folder, CAPACITY).unwrap();
    fs::rename(&folder, dir.path().join("gone")).unwrap();

    let one = Arc::new(says("one"));
    let two = Arc::new(says("two"));
    assert!(disk.append(&one));
    assert!(!disk.append(&two), "one message in memory is the most");
    let head = disk.head().unwrap().unwrap();
    assert_eq!(head.message, one);
    disk.acknowledge(head.number, 1);
    assert!(disk.append(&two));
    fs::rename(dir.path().join("gone"), &folder).unwrap();
    assert_eq!(disk.head().unwrap().unwrap().message, two);
    let number = disk.head().unwrap().unwrap().number;
    disk.acknowledge(number, 2);

    // The disk is back: so are the files.
    assert!(disk.append(&one));
    assert!(disk.append(&two));
    assert_eq!(disk.head().unwrap().unwrap().message, one);
    assert_eq!(disk.waiting().0, 2);
}

#[test]
fn a_damaged_segment_is_told_of_and_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let capacity = 16 * 200;
    let mut disk = Disk::open(dir.path(), capacity).unwrap();
    // Two to a segment.
    for n in 0..6 {
        assert!(disk.append(&Arc::new(says(format!("{n}{}", "x".repeat(70))))));
    }
    let first = segments(dir.path()).remove(0);
    let mut bytes = fs::read(&first).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle - 20] ^= 1;
    fs::write(&first, bytes).unwrap();

    let head = disk.head().unwrap().unwrap();
    assert_eq!(head.message.kind, EventType::Error);
    assert!(head.message.payload.contains("2 messages"), "{head:?}");
    disk.acknowledge(head.number, 1);
    let head = disk.head().unwrap().unwrap();
    assert!(head.message.payload.starts_with('2'), "{head:?}");
    assert_eq!(disk.waiting().0, 4);
}

#[test]
fn disk_space_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = Disk::open(dir.path(), 100_000).unwrap();
    for seq in 1..500 {
        assert!(disk.append(&Arc::new(says("x".repeat(1000)))));
        assert!(disk.append(&Arc::new(says("y".repeat(1000)))));
        for _ in 0..2 {
            let head = disk.head().unwrap().unwrap();
            disk.acknowledge(head.number, seq);
        }
        let used: u64 = segments(dir.path())
            .iter()
            .map(|path| fs::metadata(path).unwrap().len())
            .sum();
        assert!(used < 10_000, "{used} bytes for nothing");
    }
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "log"))
        .collect();
    paths.sort();
    paths
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    Acknowledge,
    Reopen,
    /// Killed while it wrote a message of this length, that many bytes before the end.
    KilledInAppend(usize, prop::sample::Index),
    /// Killed while it wrote an acknowledgement.
    KilledInAcknowledge,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0usize..300).prop_map(Step::Append),
        4 => Just(Step::Acknowledge),
        1 => Just(Step::Reopen),
        1 => (0usize..300, any::<prop::sample::Index>())
            .prop_map(|(length, cut)| Step::KilledInAppend(length, cut)),
        1 => Just(Step::KilledInAcknowledge),
    ];
    prop::collection::vec(step, 1..80)
}

/// Cuts the newest segment: the last `bytes` were never written.
fn cut_off(folder: &Path, bytes: u64) -> io::Result<()> {
    let newest = segments(folder).pop().expect("a segment");
    let file = fs::OpenOptions::new().write(true).open(newest)?;
    let length = file.metadata()?.len();
    file.set_len(length - bytes)
}

proptest! {
    #[test]
    fn nothing_is_lost_and_nothing_acknowledged_comes_back(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let open = || Disk::open(dir.path(), 2000).unwrap();
        let mut disk = open();
        let mut waiting: VecDeque<Arc<Outgoing>> = VecDeque::new();
        let mut seq = 0;
        for step in steps {
            match step {
                Step::Append(length) => {
                    let message = Arc::new(says("m".repeat(length)));
                    if disk.append(&message) {
                        waiting.push_back(message);
                    } else {
                        prop_assert!(!waiting.is_empty(), "an empty spool takes anything");
                    }
                }
                Step::Acknowledge => {
                    let head = disk.head().unwrap();
                    let expected = waiting.pop_front();
                    prop_assert_eq!(head.as_ref().map(|head| &head.message), expected.as_ref());
                    if let Some(head) = head {
                        seq += 1;
                        disk.acknowledge(head.number, seq);
                    }
                }
                Step::Reopen => {
                    drop(disk);
                    disk = open();
                }
                Step::KilledInAppend(length, cut) => {
                    let message = Arc::new(says("k".repeat(length)));
                    if disk.append(&message) {
                        drop(disk);
                        let record = record::length(&message);
                        let missing = 1 + cut.index(usize::try_from(record).unwrap()) as u64;
                        cut_off(dir.path(), missing).unwrap();
                        disk = open();
                    }
                }
                Step::KilledInAcknowledge => {
                    if let Some(head) = disk.head().unwrap() {
                        let path = dir.path().join("acknowledged");
                        let before = fs::read(&path).unwrap();
                        let files = segments(dir.path());
                        let kept: Vec<_> = files.iter().map(|f| fs::read(f).unwrap()).collect();
                        disk.acknowledge(head.number, seq + 1);
                        drop(disk);
                        // Half of the slot that changed was written; no segment was removed yet.
                        let mut torn = fs::read(&path).unwrap();
                        let changed = (0..torn.len())
                            .find(|at| before.get(*at) != Some(&torn[*at])).unwrap();
                        torn.truncate(torn.len().max(changed + 1));
                        torn[changed] ^= 0x80;
                        fs::write(&path, torn).unwrap();
                        for (file, content) in files.iter().zip(kept) {
                            fs::write(file, content).unwrap();
                        }
                        disk = open();
                    }
                }
            }
            prop_assert_eq!(disk.waiting().0, waiting.len() as u64);
            let head = disk.head().unwrap();
            prop_assert_eq!(head.as_ref().map(|head| &head.message), waiting.front());
        }
        while let Some(head) = disk.head().unwrap() {
            prop_assert_eq!(Some(head.message), waiting.pop_front());
            seq += 1;
            disk.acknowledge(head.number, seq);
        }
        prop_assert!(waiting.is_empty());
    }
}
