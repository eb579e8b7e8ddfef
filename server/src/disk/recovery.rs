use std::io;
use std::sync::Arc;

use bitmap::{Era, EraMap, Eras, Granularity, PageTable, Regions};
use scratch::Durable;

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

/// The map of a disk as the last server left it, before what may be missing has been marked.
pub struct Recovery<P> {
    map: EraMap<P>,
    table: PageTable<P>,
    /// Pages of which nothing is believed.
    damaged: Vec<u64>,
}

/// What is known of a disk after a restart.
pub struct Recovered<P> {
    /// The map, with everything marked that may have changed.
    pub map: Arc<EraMap<P>>,
    /// The regions, of which all that were active still are.
    pub regions: Regions<P>,
    /// How many pages of the map were damaged, and count as changed.
    pub damaged_pages: usize,
}

impl<P: Durable> Recovery<P> {
    /// Reads what is in `eras` and `table`. An era above `plausible` is damage.
    pub fn load(
        size: u64,
        granularity: Granularity,
        (eras, table): (P, P),
        plausible: Era,
    ) -> io::Result<Self> {
        let map = EraMap::new(size, granularity, eras);
        let pages = map.eras().page_count();
        let (table, mut damaged) = PageTable::load(pages, table)?;
        for page in 0..pages {
            let record = table.record(page);
            if !record.exists {
                continue;
            }
            let sum = map.eras().load_page(page)?;
            // While a region of it is active, nobody knows what a page should sum to.
            let wrong = record.active == 0 && sum != record.checksum;
            if (wrong || map.eras().highest_on(page) > plausible) && !damaged.contains(&page) {
                damaged.push(page);
            }
        }
        for page in &damaged {
            map.eras().disbelieve_page(*page);
        }
        Ok(Self {
            map,
            table,
            damaged,
        })
    }

    /// The highest era that the map is believed to have.
    pub fn highest(&self) -> Era {
        self.map.eras().highest()
    }

    /// Marks what may have changed unnoticed, in `presumed`, an era that nobody has used.
    ///
    /// Interrupted, all of this can be begun again: the regions stay active all the while.
    pub async fn finish(self, ending: Ending, presumed: Era) -> io::Result<Recovered<P>> {
        let Self {
            map,
            table,
            damaged,
        } = self;
        let granularity = map.granularity();
        for page in &damaged {
            // Stored in any case, so that the sector is whole again.
            table.rewrite(*page, |record| {
                record.active = u16::MAX;
                record.exists = true;
            })?;
        }
        let regions = Regions::new(map.eras().page_count(), granularity, table);
        // Before every mark it is durable that the region is active; also of the regions that the
        // last server stored as active and did not live to sync: writers will not ask again.
        regions.table().store().sync().await?;
        for page in &damaged {
            let bytes = granularity.range(&Eras::<P>::chunks_of_page(*page), map.size());
            map.presume(&bytes, presumed)?;
        }
        if ending == Ending::PowerCut {
            for region in regions.all_active() {
                map.presume(&regions.range(region), presumed)?;
            }
        }
        map.eras().store().sync().await?;
        Ok(Recovered {
            map: Arc::new(map),
            regions,
            damaged_pages: damaged.len(),
        })
    }
}
