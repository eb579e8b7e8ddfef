//! Pages of tables, kept in memory within a bound.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{FileStorage, Storage};

/// The pages of tables that were asked for last, of all images of a chain.
///
/// An image is never written while it is read, so what was read once stays true. Each page has
/// few places where it can be, so a lookup costs the same however many there are.
pub(crate) struct Tables(Vec<Mutex<Set>>);

/// The places that some pages share.
#[derive(Default)]
struct Set {
    pages: [Option<(Key, Page)>; PLACES],
    next: usize,
}

/// Which image of the chain, and which page of it.
type Key = (usize, u64);

/// A page of a file; shorter where the file ends in it.
pub(crate) type Page = Arc<[u8]>;

impl Default for Tables {
    fn default() -> Self {
        Self((0..SETS).map(|_| Mutex::default()).collect())
    }
}

impl Tables {
    /// The page that has byte `at` of `file`, which is image number `image` of the chain.
    pub(crate) async fn page(&self, image: usize, file: &FileStorage, at: u64) -> io::Result<Page> {
        let key = (image, at / PAGE);
        if let Some(page) = self.set(key).find(key) {
            return Ok(page);
        }
        let start = at / PAGE * PAGE;
        let length = file.size().saturating_sub(start).min(PAGE);
        let mut bytes = vec![0; length as usize];
        file.read(start, &mut bytes).await?;
        let page = Page::from(bytes);
        self.set(key).put(key, &page);
        Ok(page)
    }

    /// Never held while something is waited for.
    fn set(&self, key: Key) -> std::sync::MutexGuard<'_, Set> {
        let (image, page) = key;
        // Neighbours have places beside each other; images of a chain, which are alike, do not meet.
        let at = page.wrapping_add((image as u64).wrapping_mul(SCATTER)) % SETS as u64;
        let set = &self.0[at as usize];
        set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Set {
    fn find(&self, key: Key) -> Option<Page> {
        let mut pages = self.pages.iter().flatten();
        pages
            .find(|(found, _)| *found == key)
            .map(|(_, page)| Arc::clone(page))
    }

    fn put(&mut self, key: Key, page: &Page) {
        self.pages[self.next] = Some((key, Arc::clone(page)));
        self.next = (self.next + 1) % PLACES;
    }
}

/// What is read at once: with clusters of 64 KiB the addresses of 32 MiB.
pub(crate) const PAGE: u64 = 4096;

/// With as many places each, 32 MiB of tables: with clusters of 64 KiB those of 256 GiB.
const SETS: usize = 2048;
const PLACES: usize = 4;

/// A large odd number.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;
