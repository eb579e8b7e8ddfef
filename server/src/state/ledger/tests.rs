use super::super::journal::RequestRecord;
use super::*;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn uuid(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn checkpoint(number: u32) -> Record {
    Record::Checkpoint(CheckpointRecord {
        name: name(&format!("cp{number}")),
        uuid: uuid(number.into()),
        created: number.into(),
        era: number,
        disks: Vec::new(),
        automatic: false,
    })
}

/// A backup of a consumer, whose checkpoint has ten times its number.
fn begun(number: u32) -> Record {
    let checkpoint = 10 * number;
    Record::Begun(Box::new(BackupRecord {
        id: name(&format!("b{number}")),
        uuid: uuid(1000 + u128::from(number)),
        frozen_at: number.into(),
        pause_us: 0,
        era: number,
        disks: vec![uuid(1), uuid(2)],
        has_disk_name: true,
        request: RequestRecord {
            consumer: Some(name("nightly")),
            ..RequestRecord::default()
        },
        since: None,
        base: Some(Ok(number - 1)),
        checkpoint: Some((name(&format!("cp{checkpoint}")), uuid(checkpoint.into()))),
        expires_at: None,
        scratch_limit: None,
        size: None,
        bitmaps: Vec::new(),
    }))
}

fn committed(number: u32) -> Record {
    let uuid = uuid(1000 + u128::from(number));
    Record::Committed { uuid }
}

fn aborted(number: u32) -> Record {
    let uuid = uuid(1000 + u128::from(number));
    Record::Aborted { uuid }
}

/// A command that changes one bitmap, and records for it which command it was.
fn bitmaps(number: u32, disks: Vec<Uuid>) -> Record {
    Record::Bitmaps(Box::new(BitmapsRecord {
        uuid: uuid(number.into()),
        disks,
        era: number,
        changed: vec![BitmapRecord {
            name: "dirty".to_owned(),
            uuid: uuid(99),
            granularity: 65_536,
            revision: number.into(),
            era: number,
            since: None,
        }],
        removed: Vec::new(),
    }))
}

fn some_of_everything() -> Vec<Record> {
    let disks = vec![uuid(1), uuid(2)];
    vec![
        Record::Started { era: 2 },
        checkpoint(5),
        checkpoint(6),
        Record::Checkpoint(CheckpointRecord {
            disks: disks.clone(),
            ..match checkpoint(7) {
                Record::Checkpoint(record) => record,
                _ => unreachable!("it is one"),
            }
        }),
        Record::Deleted {
            uuid: uuid(5),
            disks,
        },
        begun(11),
        begun(12),
        begun(13),
        begun(14),
        committed(11),
        aborted(12),
        Record::Broken {
            uuid: uuid(1013),
            reason: "full".to_owned(),
        },
        Record::Broken {
            uuid: uuid(1012),
            reason: "ended since".to_owned(),
        },
        Record::Consumer(ConsumerRecord {
            consumer: name("weekly"),
            checkpoint: name("cp6"),
            uuid: uuid(6),
            created: 6,
        }),
        Record::Forgotten {
            consumer: name("weekly"),
            at: vec![uuid(6)],
        },
        bitmaps(1, vec![]),
        bitmaps(2, vec![uuid(1), uuid(2)]),
        bitmaps(3, vec![]),
        Record::BitmapsSettled {
            uuid: uuid(2),
            counts: true,
        },
        bitmaps(4, vec![uuid(1), uuid(2)]),
        Record::BitmapsSettled {
            uuid: uuid(4),
            counts: false,
        },
        Record::Lost {
            reason: "damaged".to_owned(),
        },
        Record::Started { era: 20 },
    ]
}

#[test]
fn a_journal_that_is_written_anew_says_the_same_after_any_of_its_records() {
    let all = some_of_everything();
    for length in 0..=all.len() {
        let ledger: Ledger = all[..length].iter().collect();
        let mut again: Ledger = ledger.records().iter().collect();
        // Of the presumed eras, those that somebody may ask for.
        assert!(
            again
                .presumed
                .iter()
                .all(|era| ledger.presumed.contains(era))
        );
        again.presumed.clone_from(&ledger.presumed);
        assert_eq!(again, ledger, "after {length} records");
        // And whatever comes next means the same.
        let mut rest: Ledger = ledger.records().iter().collect();
        all[length..].iter().for_each(|record| rest.take(record));
        rest.presumed.clear();
        let mut expected: Ledger = all.iter().collect();
        expected.presumed.clear();
        assert_eq!(rest, expected, "after {length} records");
    }
}

#[test]
fn one_record_makes_the_checkpoint_a_base_moves_the_consumer_and_ends_the_backup() {
    let mut ledger: Ledger = [begun(11)].iter().collect();
    assert!(ledger.checkpoints.is_empty() && ledger.consumers.is_empty());
    ledger.take(&committed(11));
    assert_eq!(ledger.checkpoints[&uuid(110)].era, 11);
    assert!(ledger.checkpoints[&uuid(110)].automatic);
    assert_eq!(ledger.consumers["nightly"].uuid, uuid(110));
    assert!(ledger.open.is_empty());
    assert_eq!(ledger.outcome(uuid(1011)), Some(Outcome::Committed));
}

#[test]
fn an_abort_moves_nothing() {
    let before: Ledger = [checkpoint(5)].iter().collect();
    let after: Ledger = [checkpoint(5), begun(11), aborted(11)].iter().collect();
    assert_eq!(after.checkpoints, before.checkpoints);
    assert_eq!(after.consumers, before.consumers);
    assert_eq!(after.outcome(uuid(1011)), Some(Outcome::Aborted));
}

#[test]
fn presumed_eras_stay_for_as_long_as_a_checkpoint_is_older() {
    let eras = |records: &[Record]| {
        let ledger: Ledger = records.iter().collect();
        let again: Ledger = ledger.records().iter().collect();
        again.presumed
    };
    let started = |era| Record::Started { era };
    assert_eq!(eras(&[started(2), checkpoint(4), started(6)]), [6]);
    assert_eq!(eras(&[started(4), checkpoint(4)]), [4]);
    let gone = Record::Deleted {
        uuid: uuid(4),
        disks: Vec::new(),
    };
    assert_eq!(eras(&[checkpoint(4), started(6), gone]), [0; 0]);
    // The base of an open backup, which may have been deleted since.
    assert_eq!(eras(&[started(10), begun(11)]), [10]);
}

#[test]
fn what_is_remembered_is_bounded_and_the_oldest_goes_first() {
    let mut ledger = Ledger::default();
    for number in 1..ENDED_MAX as u32 + 10 {
        ledger.take(&begun(number));
        ledger.take(&aborted(number));
        let disks = vec![uuid(1), uuid(2)];
        let uuid = uuid(number.into());
        ledger.take(&Record::Deleted { uuid, disks });
    }
    assert_eq!(ledger.ended.len(), ENDED_MAX);
    assert_eq!(ledger.ended[0].uuid, uuid(1010));
    assert_eq!(ledger.deletions.len(), DELETIONS_TOLD_MAX);
    // No era is used again, though nothing names it any more.
    let again: Ledger = ledger.records().iter().collect();
    assert_eq!(again.highest_era, ENDED_MAX as u32 + 9);
}
