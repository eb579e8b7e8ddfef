//! Any bytes as `pages`: a sector that is accepted is stored again as it was; one that is not has
//! every region active.
#![no_main]

use bitmap::{MemoryPages, PageTable};
use libfuzzer_sys::fuzz_target;
use stillpoint_fuzz::sealed;

fuzz_target!(|data: &[u8]| {
    check(data);
    check(&sealed(data));
});

fn check(data: &[u8]) {
    // Two sectors and a bit. What is missing reads as zero.
    let pages = 130;
    let mut data = data.to_vec();
    data.resize(3 * 512, 0);
    let (table, damaged) =
        PageTable::load(pages, MemoryPages::from(data.clone())).expect("memory does not fail");
    for page in 0..pages {
        if damaged.contains(&page) {
            let record = table.record(page);
            assert_eq!(
                (record.active, record.filled),
                (u16::MAX, u16::MAX),
                "page {page}"
            );
            continue;
        }
        table
            .rewrite(page, |_| Ok(()))
            .expect("memory does not fail");
        let sector = page as usize / 63 * 512;
        let stored = table.store().contents();
        assert_eq!(
            stored[sector..][..512],
            data[sector..][..512],
            "page {page}"
        );
    }
}
