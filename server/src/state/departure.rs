//! A state leaves for another machine.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use block::Cells;

use super::bits::BitsFolder;
use super::journal::{JOURNAL, Journal};
use super::parcel::{Description, Packing, Part, STRETCH_MAX};
use super::{ERAS, HEADER, PAGES, State};
use crate::names::Name;

impl State {
    /// The backups that are open in the state in `dir`, which nobody uses.
    pub(crate) fn open_backups(dir: &Path) -> io::Result<Vec<Name>> {
        let (journal, _) = Journal::open(dir)?;
        let open = journal.ledger().open.values();
        Ok(open.map(|backup| backup.id.clone()).collect())
    }

    /// The names of the checkpoints, the oldest first, and of the persistent bitmaps.
    pub(crate) fn names(&self) -> (Vec<Name>, Vec<String>) {
        let ledger = self.journal.ledger();
        let mut checkpoints: Vec<_> = ledger.checkpoints.values().collect();
        checkpoints.sort_by_key(|checkpoint| checkpoint.era);
        let bitmaps = ledger.bitmaps.iter().map(|bitmap| bitmap.name.clone());
        (
            checkpoints.into_iter().map(|c| c.name.clone()).collect(),
            bitmaps.collect(),
        )
    }

    /// Packs all of it, after its end was recorded. What is gone already, or means something on this
    /// machine alone, stays.
    pub(crate) fn pack(&self, to: impl Write, description: &Description) -> io::Result<()> {
        let mut packing = Packing::begin(to, description)?;
        let files = [
            (Part::Header, HEADER),
            (Part::Eras, ERAS),
            (Part::Pages, PAGES),
            (Part::Journal, JOURNAL),
        ];
        for (part, name) in files {
            pack_file(&mut packing, part, &self.dir.join(name))?;
        }
        let ledger = self.journal.ledger();
        let undecided = ledger.undecided.iter().flat_map(|command| &command.changed);
        let bitmaps = ledger.bitmaps.iter().chain(undecided);
        let mut ids: Vec<_> = bitmaps.map(super::journal::BitmapRecord::bits_id).collect();
        ids.sort_unstable();
        ids.dedup();
        let folder = BitsFolder::of(&self.dir);
        for id in ids {
            let path = folder.path(id);
            // One that is missing is inconsistent, there as here.
            if fs::exists(&path)? {
                pack_file(&mut packing, Part::Bits(id), &path)?;
            }
        }
        packing.finish().map(drop)
    }
}

fn pack_file<W: Write>(packing: &mut Packing<W>, part: Part, path: &Path) -> io::Result<()> {
    let file = Cells::open(path)?;
    let length = file.length()?;
    packing.file(part, length)?;
    let mut buffer = vec![0; STRETCH_MAX];
    let mut at = 0;
    while let Some(stored) = file.stored(at)? {
        at = stored.start;
        while at < stored.end.min(length) {
            let count = (stored.end.min(length) - at).min(STRETCH_MAX as u64) as usize;
            file.load(at, &mut buffer[..count])?;
            packing.bytes(at, &buffer[..count])?;
            at += count as u64;
        }
        at = stored.end;
    }
    Ok(())
}
