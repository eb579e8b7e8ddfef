//! State files, changed behind a server's back; their layout as the documentation has it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Server;
use crate::server::named;
use crate::tools::{path, tool};

/// The state directory of a disk made with [`crate::server::Builder::disk`].
pub fn directory(server: &Server, disk: &str) -> PathBuf {
    server.path(&format!("{disk}.raw.stillpoint"))
}

/// Makes the next start take what it finds for the leftovers of another boot: a power cut.
pub fn pretend_power_cut(state: &Path) {
    for sector in 1..=2 {
        // Its sum, its number, whether the end was clean, whether in doubt; then the boot.
        change_sector(state, sector, |bytes| bytes[14] ^= 0xff);
    }
}

/// Moves the end of the lease back to the beginning of time.
pub fn end_lease(state: &Path) {
    let file = state.join("lease");
    let mut bytes = fs::read(&file).expect("the lease");
    bytes[..8].fill(0);
    let sum = crc32fast::hash(&bytes[..8]).to_le_bytes();
    bytes[8..12].copy_from_slice(&sum);
    fs::write(&file, bytes).expect("the lease");
    age_image(state);
}

/// Moves the image's time of change, as it was when the server began, back to the beginning of time.
pub fn age_image(state: &Path) {
    for sector in 1..=2 {
        // In seconds.
        change_sector(state, sector, |bytes| bytes[86..94].fill(0));
    }
}

/// Changes a sector of the header, if it is whole, and sums it up again.
pub fn change_sector(state: &Path, sector: usize, change: impl FnOnce(&mut [u8])) {
    let file = state.join("header");
    let mut header = fs::read(&file).expect("the header");
    let bytes = &mut header[sector * 512..][..512];
    if crc32fast::hash(&bytes[4..]).to_le_bytes() != bytes[..4] {
        return;
    }
    change(bytes);
    let sum = crc32fast::hash(&bytes[4..]).to_le_bytes();
    bytes[..4].copy_from_slice(&sum);
    fs::write(&file, header).expect("the header");
}

/// Damages a sector of the header.
pub fn damage_sector(state: &Path, sector: usize) {
    let file = state.join("header");
    let mut header = fs::read(&file).expect("the header");
    header[sector * 512 + 100] ^= 1;
    fs::write(&file, header).expect("the header");
}

/// Makes `to` a copy of the directory `from`, whatever it was.
pub fn copy_directory(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    tool("cp", &["-a", "--sparse=always", path(from), path(to)]).ok();
}

/// What `backup begin --since` came to on one disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Begun {
    /// The map since the checkpoint, and how many bytes are only presumed to have changed.
    Incremental {
        /// As `nbdinfo` has it.
        map: Vec<crate::Extent>,
        /// In bytes.
        uncertain: u64,
    },
    /// Full, and why.
    Full {
        /// In words.
        reason: String,
    },
}

/// Begins a backup since a checkpoint, looks at one disk of it, and aborts it.
#[track_caller]
pub fn begin_since(server: &Server, id: &str, disk: &str, since: &str) -> Begun {
    let args = ["backup", "begin", "--id", id, "--since", since, "--json"];
    let output = server.cli(&args);
    let code = output.code();
    assert!(code == 3 || code == 0, "{output}\n{}", server.stderr());
    let answer: serde_json::Value = serde_json::from_str(&output.stdout).expect("JSON");
    let part = named(&answer["disks"], "disks", "disk", disk).expect("the disk");
    let full = part["mode"] == "full";
    assert!(code == 3 || !full, "{output}");
    let begun = if full {
        assert_eq!(part["changed_bytes"], part["size"], "{output}");
        let reason = part["reason"].as_str().expect("a reason").to_owned();
        assert!(!reason.is_empty(), "{output}");
        Begun::Full { reason }
    } else {
        assert_eq!(part["mode"], "incremental", "{output}");
        let context = format!("qemu:dirty-bitmap:{since}");
        let mut export = server.open_frozen(&format!("{disk}@{id}"), &[&context]);
        Begun::Incremental {
            map: export.map(&context),
            uncertain: part["uncertain_bytes"].as_u64().expect("a number"),
        }
    };
    server.abort(id);
    begun
}

/// A record of a journal: where it begins, where the next may, and what it says.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// In bytes.
    pub at: usize,
    /// In bytes.
    pub end: usize,
    /// Its JSON.
    pub says: serde_json::Value,
}

/// The records of a journal, as far as they are whole.
pub fn journal(state: &Path) -> Vec<Recorded> {
    let bytes = fs::read(state.join("journal")).expect("the journal");
    let mut records = Vec::new();
    let mut at = 0;
    while at + 24 <= bytes.len() {
        let length: [u8; 8] = bytes[at + 16..at + 24].try_into().expect("eight bytes");
        let end = at + 24 + u64::from_le_bytes(length) as usize;
        let is_record = bytes[at..].starts_with(b"SPJR") && end <= bytes.len();
        let says = is_record.then(|| serde_json::from_slice(&bytes[at + 24..end]).ok());
        let Some(says) = says.flatten() else {
            at += 512;
            continue;
        };
        let next = end.next_multiple_of(512);
        let end = next;
        records.push(Recorded { at, end, says });
        at = next;
    }
    records
}
