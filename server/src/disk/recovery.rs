use std::io;
use std::sync::Arc;

use bitmap::{Era, EraMap, Eras, Granularity, PageTable, Regions};
use block::Storage;
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
    /// A server runs that uses `eras` and none above; while it is `in_doubt`, nothing that is not
    /// durable can be believed by whoever comes after it.
    fn runs(&mut self, eras: NewEras, in_doubt: bool) -> impl Future<Output = io::Result<()>>;

    /// Things are presumed in `presumed`. Whatever the last server recorded and did not live to
    /// sync is durable with it.
    fn started(&mut self, presumed: Era) -> impl Future<Output = io::Result<()>>;
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
    /// The eras that begin now.
    pub eras: NewEras,
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

    /// Starts after a server that ended like `ending` and recorded no era above `known`.
    pub async fn start(
        self,
        ending: Ending,
        known: Era,
        chronicle: &mut impl Chronicle,
    ) -> io::Result<Recovered<P>> {
        let eras = NewEras::after(known, self.map.eras().highest())
            .ok_or_else(|| io::Error::other("all eras are used up: begin a new state"))?;
        // Until everything in doubt is marked, whoever comes next has the same doubt.
        let in_doubt = ending == Ending::PowerCut;
        chronicle.runs(eras, in_doubt).await?;
        chronicle.started(eras.presumed).await?;
        let recovered = self.finish(ending, eras).await?;
        if in_doubt {
            chronicle.runs(eras, false).await?;
        }
        Ok(recovered)
    }

    /// Marks what may have changed unnoticed, in an era that nobody has used.
    ///
    /// Interrupted, all of this can be begun again: the regions stay active all the while.
    async fn finish(self, ending: Ending, eras: NewEras) -> io::Result<Recovered<P>> {
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
            map.presume(&bytes, eras.presumed)?;
        }
        if ending == Ending::PowerCut {
            for region in regions.all_active() {
                map.presume(&regions.range(region), eras.presumed)?;
            }
        }
        map.eras().store().sync().await?;
        Ok(Recovered {
            map: Arc::new(map),
            regions,
            damaged_pages: damaged.len(),
            eras,
        })
    }
}
