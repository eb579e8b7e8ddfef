use std::fs;

use super::*;

fn checkpoint(number: u32) -> Record {
    Record::Checkpoint(CheckpointRecord {
        name: Name::parse(&format!("cp{number}")).unwrap(),
        uuid: Uuid::from_u128(number.into()),
        created: i64::MAX,
        era: number,
        disks: Vec::new(),
        automatic: false,
    })
}

fn deleted(number: u32) -> Record {
    let uuid = Uuid::from_u128(number.into());
    Record::Deleted {
        uuid,
        disks: Vec::new(),
    }
}

fn records() -> Vec<Record> {
    vec![
        checkpoint(1),
        Record::Started { era: u32::MAX },
        checkpoint(2),
        checkpoint(3),
    ]
}

fn bytes() -> Vec<u8> {
    let frames = records()
        .into_iter()
        .zip(1..)
        .map(|(r, number)| encode(number, &r).unwrap());
    frames.flatten().collect()
}

/// A journal of an empty directory, and the directory.
async fn new_journal() -> (Journal, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    Journal::create(dir.path()).await.unwrap();
    (Journal::open(dir.path()).unwrap().0, dir)
}

/// What the next server reads.
fn reopened(dir: &Path) -> Ledger {
    let (journal, damage) = Journal::open(dir).unwrap();
    assert_eq!(damage, Damage::default());
    journal.ledger().clone()
}

#[test]
fn what_was_appended_is_replayed() {
    assert_eq!(replay(&bytes()), (records(), Damage::default(), 4));
}

#[test]
fn a_damaged_record_costs_itself_and_no_other_and_is_told_from_a_torn_end() {
    let good = bytes();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let (found, damage, _) = replay(&bad);
        let intact = records().into_iter().filter(|r| found.contains(r));
        assert!(intact.count() >= 3, "byte {at}: {found:?}");
        assert!(found.iter().all(|r| records().contains(r)), "byte {at}");
        let is_last = at >= good.len() - BLOCK;
        assert!(damage.within == 0 || !is_last, "byte {at}: {damage:?}");
        assert!(damage.at_end == 0 || is_last, "byte {at}: {damage:?}");
    }
}

#[test]
fn a_torn_end_is_not_replayed() {
    let good = bytes();
    for length in 0..good.len() {
        let (found, damage, _) = replay(&good[..length]);
        assert_eq!(found[..], records()[..found.len()], "{length} bytes");
        assert_eq!(damage.within, 0, "{length} bytes");
    }
}

#[tokio::test]
async fn a_journal_is_as_long_as_what_it_says_and_not_as_what_happened() {
    let (mut journal, dir) = new_journal().await;
    journal.append(&checkpoint(1)).await.unwrap();
    for number in 2..2000 {
        journal.append(&checkpoint(number)).await.unwrap();
        journal.append(&deleted(number)).await.unwrap();
    }
    let length = fs::metadata(dir.path().join(JOURNAL)).unwrap().len();
    assert!(length <= BOUND_MIN, "{length} bytes");
    let ledger = journal.ledger().clone();
    assert_eq!(ledger.checkpoints.len(), 1);
    drop(journal);
    assert_eq!(reopened(dir.path()), ledger);
    // At a start all of it goes that is of no use.
    let (mut journal, _) = Journal::open(dir.path()).unwrap();
    journal.tidy().await.unwrap();
    let length = fs::metadata(dir.path().join(JOURNAL)).unwrap().len();
    assert_eq!(
        length,
        2 * BLOCK as u64,
        "the highest era, and a checkpoint"
    );
    journal.append(&checkpoint(5000)).await.unwrap();
    assert_eq!(reopened(dir.path()), *journal.ledger());
}

#[tokio::test]
async fn whatever_a_rewriting_leaves_behind_when_it_is_cut_off_says_all_that_was_acknowledged() {
    let (mut journal, dir) = new_journal().await;
    for record in records() {
        journal.append(&record).await.unwrap();
    }
    journal.append(&deleted(2)).await.unwrap();
    let expected = journal.ledger().clone();
    let whole = journal.rewritten().unwrap();
    drop(journal);
    let (path, aside) = (dir.path().join(JOURNAL), dir.path().join("journal.new"));
    let old = fs::read(&path).unwrap();
    // Before the rename: the old file, and any part of the new one.
    for length in (0..=whole.len()).step_by(64) {
        fs::write(&path, &old).unwrap();
        fs::write(&aside, &whole[..length]).unwrap();
        assert_eq!(reopened(dir.path()), expected, "{length} bytes are aside");
        assert!(!aside.exists(), "the next start cleans up");
    }
    // After it: the new one.
    fs::write(&path, &whole).unwrap();
    let mut found = reopened(dir.path());
    found.presumed.clone_from(&expected.presumed);
    assert_eq!(found, expected);
}

#[tokio::test]
async fn what_could_not_be_appended_is_not_there_after_the_next_append() {
    let (mut journal, dir) = new_journal().await;
    journal.append(&checkpoint(1)).await.unwrap();
    // As if the sync had failed: it is stored, and nobody was told.
    let lost = encode(journal.number + 1, &checkpoint(2)).unwrap();
    journal.log.store(journal.end, &lost).unwrap();
    journal.end += lost.len() as u64;
    journal.number += 1;
    journal.in_doubt = true;
    assert!(
        reopened(dir.path()).checkpoints.len() == 2,
        "it may be found"
    );
    journal.append(&checkpoint(3)).await.unwrap();
    let found = reopened(dir.path());
    assert_eq!(found, *journal.ledger());
    let eras: Vec<u32> = found.checkpoints.values().map(|c| c.era).collect();
    assert_eq!(eras, [1, 3]);
}

#[tokio::test]
async fn what_is_owed_is_durable_before_anything_later() {
    let (mut journal, dir) = new_journal().await;
    journal.append(&checkpoint(1)).await.unwrap();
    // A directory in its place keeps the file from being written anew.
    let aside = dir.path().join("journal.new");
    fs::create_dir(&aside).unwrap();
    journal.in_doubt = true;
    journal.append_or_owe(&deleted(1)).await.unwrap_err();
    journal.append(&checkpoint(2)).await.unwrap_err();
    assert_eq!(journal.ledger().checkpoints.len(), 0);
    fs::remove_dir(&aside).unwrap();
    journal.append(&checkpoint(3)).await.unwrap();
    let found = reopened(dir.path());
    assert_eq!(found, *journal.ledger());
    assert_eq!(found.checkpoints.len(), 1);
}
