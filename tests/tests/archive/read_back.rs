//! What is stored is read back while the rest still comes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use rand::{Rng as _, RngCore as _};
use stillpoint::archive::{Archive, ArchiveError, Leftover, Progress};
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::seeds::{Rng, rng, seeds};
use stillpoint_tests::tools::{path, sha256, sha256_of_file};
use stillpoint_tests::{KIB, MIB};

/// Tells each number of bytes that was read back.
struct Teller(Mutex<Sender<u64>>);

impl Progress for Teller {
    fn checked(&self, bytes: u64) {
        // The test may have heard enough.
        let _ = self.0.lock().unwrap().send(bytes);
    }
}

fn teller() -> (Arc<dyn Progress>, Receiver<u64>) {
    let (tell, told) = mpsc::channel();
    (Arc::new(Teller(Mutex::new(tell))), told)
}

/// A disk without zeroes, larger than what is read back at once.
fn full_disk(rng: &mut Rng, size: u64) -> BackupFolder {
    let mut disk = Disk::new("vda", size, 64 * KIB);
    let mut mib = vec![0; MIB as usize];
    rng.fill_bytes(&mut mib);
    for (number, chunk) in (1..).zip(disk.contents.chunks_mut(MIB as usize)) {
        chunk.copy_from_slice(&mib[..chunk.len()]);
        chunk[0] = number;
    }
    BackupFolder::new(vec![disk])
}

#[test]
fn what_has_come_is_read_back_before_the_last_has() {
    let mut rng = rng(1);
    let mut folder = full_disk(&mut rng, 70 * MIB);
    let archive = Archive::open_for_writing(&folder.path()).unwrap();
    let mut draft = archive.begin(folder.plan()).unwrap();
    let (teller, told) = teller();
    draft.follow(&teller);
    let disk = draft.disks()[0].clone();
    let mut chunks: Vec<_> = disk.chunks().collect();
    let last = chunks.pop().unwrap();
    for chunk in chunks {
        let pieces = folder.disks[0].pieces(&chunk, &mut rng);
        disk.put(&chunk, &pieces).unwrap();
    }
    let mut read = 0;
    while read < 64 * MIB {
        read += told.recv_timeout(PATIENCE).expect("it is read back");
    }
    assert_eq!(folder.put_all(&draft, &mut rng), last.bytes());
    let point = draft.finish(&()).unwrap();
    folder.note(&point);
    let size = point.disks[0].file_size;
    assert_eq!(read + told.try_iter().sum::<u64>(), size, "all of it, once");
    folder.stillpoint("verify", &[]).ok();
    let out = folder.beside("out");
    folder.stillpoint("restore", &["-o", path(&out)]).ok();
    assert_eq!(sha256_of_file(&out), sha256(&folder.past[&1]["vda"]));
}

#[test]
fn a_bit_that_flips_before_it_is_read_back_is_found_and_fetched_anew() {
    for seed in seeds(&[1, 2, 3, 4]) {
        let mut rng = rng(seed);
        let mut folder = full_disk(&mut rng, 6 * MIB);
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let mut draft = archive.begin(folder.plan()).unwrap();
        draft.follow(&teller().0);
        let disk = draft.disks()[0].clone();
        let first = disk.chunks().next().unwrap();
        for chunk in disk.chunks().skip(1).collect::<Vec<_>>() {
            disk.put(&chunk, &folder.disks[0].pieces(&chunk, &mut rng))
                .unwrap();
        }
        // Nothing is read back yet, as the first has not come.
        let file = folder.path().join("1.partial/vda.qcow2");
        let file = File::options().read(true).write(true).open(file).unwrap();
        let length = file.metadata().unwrap().len();
        let place = rng.random_range(length - 5 * MIB..length);
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << rng.random_range(0..8)], place)
            .unwrap();
        disk.put(&first, &folder.disks[0].pieces(&first, &mut rng))
            .unwrap();
        drop(disk);
        let error = draft.finish(&()).unwrap_err();
        let is_found = matches!(&error, ArchiveError::Differs { offset, .. } if *offset <= place);
        assert!(is_found, "seed {seed}: {error}, byte {place}");
        drop(archive);
        assert!(Archive::open(&folder.path()).unwrap().points().is_empty());
        folder.go_on(&mut rng);
        folder.stillpoint("verify", &[]).ok();
    }
}

#[test]
fn a_draft_that_is_given_up_while_it_is_read_back_goes_on_later() {
    let mut rng = rng(1);
    let mut folder = full_disk(&mut rng, 3 * MIB);
    folder.disks.push(Disk::new("vdb", MIB, 64 * KIB));
    for is_discarded in [true, false] {
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let mut draft = archive.begin(folder.plan()).unwrap();
        draft.follow(&teller().0);
        let disk = draft.disks()[0].clone();
        let chunk = disk.chunks().next().unwrap();
        disk.put(&chunk, &folder.disks[0].pieces(&chunk, &mut rng))
            .unwrap();
        // Whoever waits for the second chunk waits no more.
        if is_discarded {
            draft.discard().unwrap();
            assert!(matches!(archive.leftover().unwrap(), Leftover::Nothing));
        } else {
            drop(draft);
        }
    }
    folder.go_on(&mut rng);
    folder.stillpoint("verify", &[]).ok();
}
