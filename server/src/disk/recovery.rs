use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bitmap::{Chunks, Era, EraMap, Eras, Granularity, PageTable, Region, Regions, Salt};
use block::Storage;
use scratch::Durable;

use super::durability::Durability;
use super::growth::Growth;

/// How the last server of a disk ended, as far as what it left can be believed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// It recorded its end last, after everything had been synced.
    Clean,
    /// It was killed, and what it had handed to the kernel is there.
    Killed,
    /// The machine, or the mount, is another; or a sync had failed. Anything that was not durable
    /// may be missing.
    PowerCut,
}

impl Ending {
    /// How it ended: whether it recorded a `clean` end; whether this is the `same_machine` and the
    /// same mounts, so that what it had stored is there; and whether it left things `in_doubt`.
    pub async fn of(clean: bool, same_machine: bool, in_doubt: bool, image: &impl Storage) -> Self {
        if clean {
            return Self::Clean;
        }
        // What the last server wrote may have failed to reach the disk since; a sync tells.
        if same_machine && !in_doubt && image.sync().await.is_ok() {
            Self::Killed
        } else {
            Self::PowerCut
        }
    }
}

/// Where a server records that it starts. Each of these returns when it is durable.
pub trait Chronicle {
    /// A server runs.
    fn runs(&mut self, running: Running) -> impl Future<Output = io::Result<()>>;

    /// Things are presumed in `presumed`. Whatever the last server recorded and did not live to
    /// sync is durable with it.
    fn started(&mut self, presumed: Era) -> impl Future<Output = io::Result<()>>;
}

/// What whoever comes next has to know of a server that did not end in good order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Running {
    /// It uses these, and none above.
    pub eras: NewEras,
    /// Nothing that is not durable can be believed.
    pub in_doubt: bool,
    /// What its tracking survives, and what is left of the tracking before it.
    pub durability: Durability,
}

/// What the last server left behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Before {
    /// How it ended.
    pub ending: Ending,
    /// What its tracking survived.
    pub durability: Durability,
    /// No era above this was recorded.
    pub known: Era,
}

/// The eras of a server that starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NewEras {
    /// In which nothing is written, but presumed.
    pub presumed: Era,
    /// In which guests write.
    pub guests: Era,
}

impl NewEras {
    /// Those that follow everything that is known; `None` where the numbers are used up.
    fn after(known: Era, marked: Era) -> Option<Self> {
        let presumed = known.max(marked).max(Era::FIRST).next()?;
        Some(Self {
            presumed,
            guests: presumed.next()?,
        })
    }
}

/// The map of a disk as the last server left it, before what may be missing has been marked.
pub struct Recovery<P> {
    map: EraMap<P>,
    table: PageTable<P>,
    damage: Damage,
    /// The disk was smaller, and not everything that is new need be marked.
    grown_from: Option<u64>,
}

/// What of a map is not believed.
#[derive(Default)]
struct Damage {
    /// Whole pages, because what is known of them is damaged, or they are not what they should be.
    pages: BTreeSet<u64>,
    /// Entries of other pages.
    chunks: Vec<(Region, Chunks)>,
}

/// What is known of a disk after a restart.
pub struct Recovered<P> {
    /// The map, with everything marked that may have changed.
    pub map: Arc<EraMap<P>>,
    /// The regions, of which all that were active still are.
    pub regions: Regions<P>,
    /// How many bytes count as changed because the map was damaged.
    pub damaged_bytes: u64,
    /// The eras that begin now.
    pub eras: NewEras,
}

impl<P: Durable> Recovery<P> {
    /// Reads what is in `table` and, under `salt`, in `eras`. An era above `plausible` is damage.
    pub fn load(
        size: u64,
        granularity: Granularity,
        salt: Salt,
        (eras, table): (P, P),
        plausible: Era,
    ) -> io::Result<Self> {
        let map = EraMap::new(size, granularity, salt, eras);
        let pages = map.eras().page_count();
        let (table, unknown) = PageTable::load(pages, table)?;
        let mut damage = Damage::default();
        damage.pages.extend(unknown);
        for page in 0..pages {
            let record = table.record(page);
            if record.filled == 0 || damage.pages.contains(&page) {
                continue;
            }
            let lacking = map.eras().load_page(page)?;
            // While a region of it is active, nobody knows what a page should sum to; but each entry
            // has a sum of its own.
            let wrong = record.active == 0 && map.eras().checksum(page) != record.checksum;
            if wrong || map.eras().highest_on(page) > plausible {
                damage.pages.insert(page);
                continue;
            }
            let filled = lacking.iter().flat_map(Region::cut);
            damage
                .chunks
                .extend(filled.filter(|(region, _)| record.is_filled(*region)));
        }
        for page in &damage.pages {
            map.eras().disbelieve_page(*page);
        }
        Ok(Self {
            map,
            table,
            damage,
            grown_from: None,
        })
    }

    /// Whether nothing was written to `range` in `era` or later, as far as that can be believed after
    /// such an `ending`.
    pub fn is_unchanged(&self, range: &Range<u64>, era: Era, ending: Ending) -> bool {
        let chunks = self.map.granularity().chunks(range);
        let is_active = |region: Region| self.table.record(region.page()).is_active(region);
        let may_lack_marks =
            ending == Ending::PowerCut && Region::cut(&chunks).any(|(region, _)| is_active(region));
        !may_lack_marks && self.map.changes(range.clone(), era).all(|run| !run.dirty)
    }

    /// Whether nothing of the map is damaged.
    pub fn is_whole(&self) -> bool {
        self.damage.pages.is_empty() && self.damage.chunks.is_empty()
    }

    /// The same of a disk that was being enlarged to the size that it has, if it was: a start marks
    /// all that is new.
    #[must_use]
    pub fn ending(mut self, growth: Option<Growth>) -> Self {
        let Some(Growth { from, .. }) = growth else {
            return self;
        };
        // Of what is new nothing need be there yet, also where its region was filled once: a power cut
        // may have taken entries behind the end of the disk, which nobody has missed.
        let new = from / self.map.granularity().bytes();
        for (_, chunks) in &mut self.damage.chunks {
            chunks.end = chunks.end.min(new);
        }
        self.damage.chunks.retain(|(_, chunks)| !chunks.is_empty());
        self.grown_from = Some(from);
        self
    }

    /// Starts after what was `before`, with a tracking that survives what `durability` says.
    pub async fn start(
        mut self,
        before: Before,
        durability: Durability,
        chronicle: &mut impl Chronicle,
    ) -> io::Result<Recovered<P>> {
        let ending = before.ending;
        let eras = NewEras::after(before.known, self.map.eras().highest())
            .ok_or_else(|| io::Error::other("all eras are used up: begin a new state"))?;
        if ending == Ending::PowerCut {
            // What was not durable there is marked with all else.
            let active = |region: Region| self.table.record(region.page()).is_active(region);
            self.damage.chunks.retain(|(region, _)| !active(*region));
        }
        let lost = before.durability.why_lost(ending).is_some();
        let done = Running {
            eras,
            in_doubt: false,
            durability,
        };
        // Until everything in doubt is marked, whoever comes next has the same doubt. For a damaged
        // page too: once its regions are active, it has no sum that would tell. And until what a
        // weaker server stored is durable, whoever comes next is after that one as well.
        let begun = Running {
            in_doubt: ending == Ending::PowerCut || !lost && !self.damage.is_empty(),
            durability: match ending {
                Ending::Clean => Durability::Power,
                Ending::Killed | Ending::PowerCut => before.durability,
            },
            ..done
        };
        chronicle.runs(begun).await?;
        chronicle.started(eras.presumed).await?;
        let recovered = if lost {
            self.begin_anew(eras).await?
        } else {
            self.finish(ending, eras).await?
        };
        if begun != done {
            // Before the first write that is tracked in this way.
            chronicle.runs(done).await?;
        }
        Ok(recovered)
    }

    /// Begins with a map of no change: of what there was, any part may be missing, and what is left
    /// would be taken for damage later.
    async fn begin_anew(self, eras: NewEras) -> io::Result<Recovered<P>> {
        let map = &self.map;
        let granularity = map.granularity();
        let fresh = map.eras().store().successor()?;
        let table = PageTable::create(map.eras().page_count(), self.table.store().successor()?)?;
        fresh.sync().await?;
        table.store().sync().await?;
        // Interrupted between these, all is lost once more.
        fresh.succeed()?;
        table.store().succeed()?;
        fresh.sync_place().await?;
        table.store().sync_place().await?;
        let map = EraMap::new(map.size(), granularity, map.eras().salt(), fresh);
        Ok(Recovered {
            regions: Regions::new(map.eras().page_count(), granularity, table),
            map: Arc::new(map),
            damaged_bytes: 0,
            eras,
        })
    }

    /// Marks what may have changed unnoticed, in an era that nobody has used.
    ///
    /// Interrupted, all of this can be begun again: the regions stay active all the while.
    async fn finish(self, ending: Ending, eras: NewEras) -> io::Result<Recovered<P>> {
        let Self {
            map,
            table,
            damage,
            grown_from,
        } = self;
        let granularity = map.granularity();
        // With the chunk in which the disk ended.
        let new =
            grown_from.map(|size| size / granularity.bytes() * granularity.bytes()..map.size());
        for page in &damage.pages {
            // Stored in any case, so that the sector is whole again.
            table.rewrite(*page, |record| {
                record.active = u16::MAX;
                record.filled = u16::MAX;
                Ok(())
            })?;
        }
        for (region, _) in &damage.chunks {
            table.update(region.page(), |record| record.activate(*region))?;
        }
        let new_chunks = new.clone().map(|new| granularity.chunks(&new));
        let calm = new_chunks.map_or(Ok(BTreeSet::new()), |new| activate(&new, &map, &table))?;
        let regions = Regions::new(map.eras().page_count(), granularity, table);
        // A sync may have failed without anyone having lived to record it, and what the last server
        // stored be in memory only: stored again, it is durable after a sync that succeeds.
        let believed = |region: &Region| !damage.pages.contains(&region.page());
        for region in regions.all_active().filter(believed) {
            regions.table().rewrite(region.page(), |_| Ok(()))?;
            // After a power cut all of it is marked below.
            if ending != Ending::PowerCut {
                let chunks = granularity.chunks(&regions.range(region));
                for whole in damage.spared(chunks) {
                    map.eras().store_again(&whole)?;
                }
            }
        }
        // Before every mark it is durable that the region is active; also of the regions that the
        // last server stored as active and did not live to sync: writers will not ask again.
        regions.table().store().sync().await?;
        // Nor may the file be another after a power cut, where it was being written anew.
        regions.table().store().sync_place().await?;
        map.eras().store().sync_place().await?;
        let mut damaged_bytes = 0;
        for chunks in damage.all::<P>() {
            let range = granularity.range(&chunks, map.size());
            map.presume(&range, eras.presumed)?;
            damaged_bytes += range.end - range.start;
        }
        if ending == Ending::PowerCut {
            // Where nobody had written, only what is new has changed.
            for region in regions.all_active().filter(|r| !calm.contains(r)) {
                map.presume(&regions.range(region), eras.presumed)?;
            }
        }
        if let Some(new) = new {
            // That it is new is certain. No checkpoint has the guests' era yet.
            map.presume(&new, eras.guests)?;
        }
        map.eras().store().sync().await?;
        Ok(Recovered {
            map: Arc::new(map),
            regions,
            damaged_bytes,
            eras,
        })
    }
}

/// Makes every region active that has some of `new`, as whoever writes there first, and returns those
/// that were not.
fn activate<P: Durable>(
    new: &Chunks,
    map: &EraMap<P>,
    table: &PageTable<P>,
) -> io::Result<BTreeSet<Region>> {
    let mut calm = BTreeSet::new();
    for (region, _) in Region::cut(new) {
        table.rewrite(region.page(), |record| {
            // The one in which the disk ended may have been written before.
            if !record.is_filled(region) {
                map.eras().fill(&region.chunks())?;
            }
            if !record.is_active(region) {
                calm.insert(region);
            }
            record.activate(region);
            Ok(())
        })?;
    }
    Ok(calm)
}

impl Damage {
    fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.chunks.is_empty()
    }

    /// What of `chunks` is not damaged. The rest is not stored again as it is read, which is clean:
    /// whoever comes next must find the same damage, unless it is marked by then.
    fn spared(&self, chunks: Chunks) -> Vec<Chunks> {
        let damaged = self.chunks.iter().map(|(_, damaged)| damaged);
        damaged.fold(vec![chunks], |spared, damaged| {
            let around = |piece: Chunks| {
                let before = piece.start..damaged.start.clamp(piece.start, piece.end);
                let after = damaged.end.clamp(piece.start, piece.end)..piece.end;
                [before, after]
            };
            let pieces = spared.into_iter().flat_map(around);
            pieces.filter(|piece| !piece.is_empty()).collect()
        })
    }

    fn all<P: Durable>(self) -> impl Iterator<Item = Chunks> {
        let pages = self.pages.into_iter().map(Eras::<P>::chunks_of_page);
        pages.chain(self.chunks.into_iter().map(|(_, chunks)| chunks))
    }
}

#[cfg(test)]
mod tests;
