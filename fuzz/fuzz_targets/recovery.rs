//! Any bytes as `pages` and `eras`, and a start with them: it marks what is damaged, so that the next
//! start finds the same eras and nothing damaged.
#![no_main]

use std::io;

use bitmap::{ERAS_PER_PAGE, Era, Granularity, MemoryPages, Salt};
use libfuzzer_sys::fuzz_target;
use stillpoint::disk::{Before, Chronicle, Durability, Ending, Recovered, Recovery, Running};
use stillpoint_fuzz::{now, sealed};

/// Two pages of the map, and a bit.
const SIZE: u64 = (2 * ERAS_PER_PAGE + 7) * 4096 + 512;
const SALT: Salt = Salt::from_number(7);

struct Forgetful;

impl Chronicle for Forgetful {
    async fn runs(&mut self, _: Running) -> io::Result<()> {
        Ok(())
    }

    async fn started(&mut self, _: Era) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((how, files)) = data.split_first() else {
        return;
    };
    let (pages, eras) = files.split_at(files.len().min(512));
    let ending = [Ending::Clean, Ending::Killed, Ending::PowerCut][usize::from(how % 3)];
    let pages = if how & 4 == 0 {
        pages.to_vec()
    } else {
        sealed(pages)
    };
    let first = start(ending, Era::from_number(100), eras.to_vec(), pages);
    let (eras, table) = (
        first.map.eras().store().contents(),
        first.regions.table().store().contents(),
    );
    let second = start(Ending::Killed, first.eras.guests, eras, table);
    assert_eq!(second.damaged_bytes, 0, "marked, and damaged");
    for chunk in 0..SIZE.div_ceil(4096) {
        let before = first.map.era(chunk);
        let after = second.map.era(chunk);
        assert_eq!(
            after.max(Era::FIRST),
            before.max(Era::FIRST),
            "chunk {chunk}"
        );
    }
});

fn start(ending: Ending, known: Era, eras: Vec<u8>, pages: Vec<u8>) -> Recovered<MemoryPages> {
    let granularity = Granularity::new(4096).expect("4 KiB is a granularity");
    let plausible = Era::from_number(known.number() + 1000);
    let files = (MemoryPages::from(eras), MemoryPages::from(pages));
    let recovery = Recovery::load(SIZE, granularity, SALT, files, plausible);
    let recovery = recovery.expect("memory does not fail");
    let before = Before {
        ending,
        durability: Durability::Power,
        known,
    };
    let recovered = now(recovery.start(before, Durability::Power, &mut Forgetful));
    recovered.expect("memory does not fail, and there are enough eras")
}
