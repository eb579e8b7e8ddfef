use bitmap::Era;

use super::*;
use crate::state::{BackupRecord, BitmapRecord, CheckpointRecord, RequestRecord};

const VDA: &str = "vda";
const VDB: &str = "vdb";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn disk_uuid(disk: &str) -> Uuid {
    Uuid::from_u128(if disk == VDA { 1 } else { 2 })
}

fn both() -> Vec<Uuid> {
    vec![disk_uuid(VDA), disk_uuid(VDB)]
}

fn checkpoint() -> Record {
    Record::Checkpoint(CheckpointRecord {
        name: name("cp"),
        uuid: CHECKPOINT,
        created: 0,
        era: Era::FIRST.number(),
        disks: both(),
        automatic: false,
    })
}

/// Backups of one consumer; a later one has a higher era.
fn begun(number: u32) -> Record {
    Record::Begun(Box::new(BackupRecord {
        id: name(&format!("b{number}")),
        uuid: backup(number),
        frozen_at: 0,
        pause_us: 0,
        era: number,
        disks: both(),
        has_disk_name: true,
        request: RequestRecord {
            consumer: Some(name("nightly")),
            ..RequestRecord::default()
        },
        since: None,
        base: None,
        checkpoint: Some((name(&format!("made{number}")), made(number))),
        expires_at: None,
        scratch_limit: None,
        size: None,
        bitmaps: Vec::new(),
    }))
}

fn backup(number: u32) -> Uuid {
    Uuid::from_u128(1000 + u128::from(number))
}

fn made(number: u32) -> Uuid {
    Uuid::from_u128(2000 + u128::from(number))
}

/// What the disks say that are served, when they agree; and again, to see that nothing is owed then.
fn agreed(parts: &[(&str, &[Record])]) -> BTreeMap<String, Ledger> {
    let tell = |(disk, records): &(&str, &[Record])| {
        (name(disk), (disk_uuid(disk), records.iter().collect()))
    };
    let mut told: Told = parts.iter().map(tell).collect();
    let mut recorded = told.clone();
    for (disk, record) in agree(&mut told) {
        recorded
            .get_mut(&disk)
            .expect("it is served")
            .1
            .take(&record);
    }
    assert_eq!(recorded, told, "what is recorded is what is so");
    assert_eq!(agree(&mut recorded), [], "they agree: {recorded:?}");
    let ledgers = told.into_iter();
    ledgers
        .map(|(disk, (_, ledger))| (disk.to_string(), ledger))
        .collect()
}

const CHECKPOINT: Uuid = Uuid::from_u128(77);

#[test]
fn a_checkpoint_that_was_interrupted_is_on_all_its_disks_or_on_none() {
    let complete = Record::Complete { uuid: CHECKPOINT };
    let one = [checkpoint()];
    let sure = [checkpoint(), complete];
    for (vda, vdb, expected) in [
        (&one[..], &[][..], false),
        (&[], &one, false),
        (&one, &one, true),
        (&sure, &one, true),
        // Damage took it from there; what the other disk knows is good.
        (&sure, &[], true),
    ] {
        let ledgers = agreed(&[(VDA, vda), (VDB, vdb)]);
        let has = |disk: &str| ledgers[disk].checkpoints.contains_key(&CHECKPOINT);
        assert_eq!(has(VDA), expected && !vda.is_empty(), "{vda:?} {vdb:?}");
        assert_eq!(has(VDB), expected && !vdb.is_empty(), "{vda:?} {vdb:?}");
    }
}

#[test]
fn of_a_disk_that_is_not_served_the_others_believe_the_best() {
    let ledgers = agreed(&[(VDA, &[checkpoint()])]);
    assert!(ledgers[VDA].checkpoints.contains_key(&CHECKPOINT));
    // Once that is recorded, it stays so when the disk is back without it.
    let known: Vec<Record> = ledgers[VDA].records();
    let ledgers = agreed(&[(VDA, &known), (VDB, &[])]);
    assert!(ledgers[VDA].checkpoints.contains_key(&CHECKPOINT));
}

#[test]
fn a_deletion_that_was_interrupted_is_finished() {
    let complete = Record::Complete { uuid: CHECKPOINT };
    let deleted = Record::Deleted {
        uuid: CHECKPOINT,
        disks: both(),
    };
    let gone = [checkpoint(), complete.clone(), deleted];
    let still = [checkpoint(), complete];
    for (vda, vdb) in [
        (&gone[..], &still[..]),
        (&still, &gone),
        (&gone, &gone[..1]),
    ] {
        let ledgers = agreed(&[(VDA, vda), (VDB, vdb)]);
        assert!(ledgers.values().all(|ledger| ledger.checkpoints.is_empty()));
    }
}

#[test]
fn a_commit_on_one_disk_is_one_on_all_and_moves_the_consumer_everywhere() {
    let committed = Record::Committed { uuid: backup(5) };
    let decided = [begun(5), committed];
    for (vda, vdb) in [(&decided[..], &decided[..1]), (&decided[..1], &decided)] {
        let ledgers = agreed(&[(VDA, vda), (VDB, vdb)]);
        for ledger in ledgers.values() {
            assert_eq!(ledger.consumers["nightly"].uuid, made(5));
            assert!(ledger.checkpoints.contains_key(&made(5)) && ledger.open.is_empty());
        }
    }
}

#[test]
fn a_beginning_that_was_interrupted_is_none() {
    let ledgers = agreed(&[(VDA, &[begun(5)]), (VDB, &[])]);
    assert!(ledgers[VDA].open.is_empty());
    assert_eq!(ledgers[VDA].outcome(backup(5)), Some(Outcome::Aborted));
    let ledgers = agreed(&[(VDA, &[begun(5)])]);
    assert!(
        !ledgers[VDA].open.is_empty(),
        "the other disk is not served"
    );
}

#[test]
fn a_commit_that_failed_and_was_aborted_does_not_come_true() {
    let failed = [begun(5), Record::Committed { uuid: backup(5) }];
    let aborted = [begun(5), Record::Aborted { uuid: backup(5) }];
    let ledgers = agreed(&[(VDA, &aborted), (VDB, &[begun(5)])]);
    assert!(ledgers.values().all(|ledger| ledger.consumers.is_empty()));
    // Whatever one of them still says, the other's consumer has not moved.
    let ledgers = agreed(&[(VDA, &failed), (VDB, &aborted)]);
    assert!(ledgers[VDB].consumers.is_empty());
}

#[test]
fn where_the_order_of_two_commits_is_not_known_the_consumer_is_at_the_older() {
    let commits = [5, 6].map(|number| Record::Committed {
        uuid: backup(number),
    });
    let knows = [&[begun(5), begun(6)][..], &commits].concat();
    let ledgers = agreed(&[(VDA, &knows), (VDB, &[begun(5), begun(6)])]);
    assert_eq!(ledgers[VDA].consumers["nightly"].uuid, made(6));
    assert_eq!(ledgers[VDB].consumers["nightly"].uuid, made(5));
}

#[test]
fn a_command_on_bitmaps_that_was_interrupted_counts_on_all_its_disks_or_on_none() {
    let command = |number: u128, since| {
        Record::Bitmaps(Box::new(BitmapsRecord {
            uuid: Uuid::from_u128(number),
            disks: both(),
            era: 5,
            changed: vec![BitmapRecord {
                name: "dirty".to_owned(),
                uuid: Uuid::from_u128(99),
                granularity: 65_536,
                revision: 1,
                era: 5,
                since: Some(since),
            }],
            removed: Vec::new(),
        }))
    };
    let settled = |number, counts| {
        let uuid = Uuid::from_u128(number);
        Record::BitmapsSettled { uuid, counts }
    };
    let alone = [command(1, 5)];
    let sure = [command(1, 5), settled(1, true)];
    let undone = [command(1, 5), settled(1, false)];
    for (vda, vdb, expected) in [
        (&alone[..], &[][..], [None, None]),
        (&alone, &alone, [Some(5), Some(5)]),
        (&sure, &alone, [Some(5), Some(5)]),
        (&alone, &undone, [None, None]),
    ] {
        let ledgers = agreed(&[(VDA, vda), (VDB, vdb)]);
        let since = |disk: &str| ledgers[disk].bitmaps.first().and_then(|b| b.since);
        assert_eq!([since(VDA), since(VDB)], expected, "{vda:?} {vdb:?}");
    }
    // Where damage took the word on an earlier one, the later one still comes after it.
    let damaged = [command(1, 5), command(2, 7), settled(2, true)];
    let ledgers = agreed(&[(VDA, &damaged), (VDB, &sure)]);
    assert_eq!(ledgers[VDA].bitmaps[0].since, Some(7));
}

#[test]
fn a_consumer_is_forgotten_where_it_has_not_moved_on_since() {
    let at = |number| {
        [
            begun(number),
            Record::Committed {
                uuid: backup(number),
            },
        ]
    };
    let forgotten = Record::Forgotten {
        consumer: name("nightly"),
        at: vec![made(5)],
    };
    let vda = [&at(5)[..], &[forgotten]].concat();
    let ledgers = agreed(&[(VDA, &vda), (VDB, &at(5))]);
    assert!(ledgers.values().all(|ledger| ledger.consumers.is_empty()));
    let moved = [&at(5)[..], &at(6)].concat();
    let ledgers = agreed(&[(VDA, &[&vda[..], &at(6)].concat()), (VDB, &moved)]);
    let is_at_6 = |ledger: &Ledger| ledger.consumers["nightly"].uuid == made(6);
    assert!(ledgers.values().all(is_at_6));
}
