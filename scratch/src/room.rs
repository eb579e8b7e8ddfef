use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::granules::GRANULE;
use crate::quota::Quota;

/// Free space of a file system, of which a reserve is left alone.
///
/// Asking a file system costs a system call, so an answer is trusted for some bytes more: never for
/// many, because others write there as well, and never for more than a part of the distance to the
/// reserve.
pub struct Room {
    reserve: u64,
    space: Box<dyn FreeSpace>,
    /// What may still be taken on the last answer.
    credit: AtomicU64,
    /// What has been taken and may not be in the file system's own count yet.
    in_flight: AtomicU64,
    /// What is about to be free.
    going: AtomicU64,
    /// How far the reserve was at the last answer; the most there is if it was never asked.
    left: AtomicU64,
    /// What is kept here, and could come to be.
    pub(crate) kept: Quota,
    /// When it was last asked whether all could be: what was kept, in [`TRUSTED_MAX`], times two, and
    /// one more if so.
    asked: AtomicU64,
}

/// Who knows how much is free.
pub trait FreeSpace: Send + Sync + 'static {
    /// How many bytes can still be written.
    fn free(&self) -> io::Result<u64>;
}

impl Room {
    /// All of `space` but `reserve` bytes. With no reserve nothing is refused: whoever writes to what is
    /// full is told so.
    pub fn new(space: impl FreeSpace, reserve: u64) -> Self {
        Self {
            reserve,
            space: Box::new(space),
            credit: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            going: AtomicU64::new(0),
            left: AtomicU64::new(u64::MAX),
            kept: Quota::new(None),
            asked: AtomicU64::new(NEVER),
        }
    }

    /// As much as anyone wants.
    pub fn endless() -> Self {
        struct Endless;
        impl FreeSpace for Endless {
            fn free(&self) -> io::Result<u64> {
                Ok(u64::MAX)
            }
        }
        Self::new(Endless, 0)
    }

    /// In bytes.
    pub fn reserve(&self) -> u64 {
        self.reserve
    }

    /// How many bytes are free now, the reserve among them.
    pub fn free(&self) -> io::Result<u64> {
        self.space.free()
    }

    /// Whether not even one granule can be taken.
    pub fn is_full(&self) -> io::Result<bool> {
        let least = self.reserve.saturating_add(GRANULE + BOOKKEEPING);
        Ok(self.reserve > 0 && self.free()? < least)
    }

    /// Whether less is free than the reserve.
    pub fn falls_short(&self) -> io::Result<bool> {
        let going = self.going.load(Ordering::Relaxed);
        Ok(self.reserve > 0 && self.free()?.saturating_add(going) < self.reserve)
    }

    /// Up to `bytes` more may come to be kept here.
    pub(crate) fn expect(&self, bytes: u64) {
        self.kept.expect(bytes);
        self.asked.store(NEVER, Ordering::Relaxed);
    }

    /// Whether all that could come to be kept here would fit twice beside the reserve. An answer is
    /// trusted for some MiB.
    ///
    /// Twice is also enough for what guests write meanwhile to holes of images on the same file system.
    pub(crate) fn holds_all(&self) -> bool {
        let used = self.kept.used();
        let part = used / TRUSTED_MAX;
        let asked = self.asked.load(Ordering::Relaxed);
        if asked / 2 == part {
            return asked % 2 == 1;
        }
        let most = self.kept.most().saturating_mul(2);
        let wanted = most
            .saturating_add(most / BOOKKEEPING_PART)
            .saturating_add(self.reserve)
            .saturating_add(TRUSTED_MAX);
        let free = self.space.free().unwrap_or(0);
        let holds = free.saturating_add(used) >= wanted;
        let answer = part * 2 + u64::from(holds);
        // Not if anyone has asked for more meanwhile.
        let _ = self
            .asked
            .compare_exchange(asked, answer, Ordering::Relaxed, Ordering::Relaxed);
        holds
    }

    /// How many bytes lay between what was free and the reserve when that was last asked.
    pub(crate) fn left(&self) -> Option<u64> {
        Some(self.left.load(Ordering::Relaxed)).filter(|left| *left != u64::MAX)
    }

    /// Takes `bytes`, unless the reserve would be touched. What is taken is in flight until
    /// [`landed`](Self::landed).
    pub(crate) fn take(&self, bytes: u64) -> io::Result<bool> {
        if self.reserve == 0 {
            return Ok(true);
        }
        let others = self.in_flight.fetch_add(bytes, Ordering::Relaxed);
        let taken = self.take_credit(bytes) || self.take_anew(bytes, others)?;
        Ok(taken)
    }

    /// What was taken, or was to be, has been written or never will be.
    pub(crate) fn landed(&self, bytes: u64) {
        if self.reserve > 0 {
            self.in_flight.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// So many bytes are about to be free. Where they are waited for, the reserve bridges that.
    pub(crate) fn going(&self, bytes: u64) {
        self.going.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes that were about to be free are.
    pub(crate) fn gone(&self, bytes: u64) {
        self.going.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn take_credit(&self, bytes: u64) -> bool {
        let rest = |credit: u64| credit.checked_sub(bytes);
        self.credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest)
            .is_ok()
    }

    fn take_anew(&self, bytes: u64, others: u64) -> io::Result<bool> {
        let taken = self.reserve.saturating_add(others);
        let going = self.going.load(Ordering::Relaxed);
        let left = self
            .space
            .free()?
            .saturating_add(going)
            .saturating_sub(taken);
        self.left.store(left, Ordering::Relaxed);
        let Some(rest) = left.checked_sub(bytes + BOOKKEEPING) else {
            return Ok(false);
        };
        self.credit
            .store((rest / TRUSTED_PART).min(TRUSTED_MAX), Ordering::Relaxed);
        Ok(true)
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Room")
            .field("reserve", &self.reserve)
            .finish_non_exhaustive()
    }
}

/// After so many new bytes the file system is asked again: a thousand granules for a system call
/// of a microsecond, and little beside the smallest reserve that is taken unasked.
const TRUSTED_MAX: u64 = 4 << 20;

/// Of the distance to the reserve, one part in so many is trusted. What is stored beside a granule
/// (its state, twice, and the old era of its chunk) may take a block each the first time, so four
/// times the bytes that are counted.
const TRUSTED_PART: u64 = 4;

/// No answer is known.
const NEVER: u64 = u64::MAX;

/// What is stored beside all that is kept is less than one part in so many of it, also with chunks of
/// 4 KiB.
const BOOKKEEPING_PART: u64 = 256;

/// What is left for that when the last bytes are taken.
const BOOKKEEPING: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A file system on which only we write, and how often it was asked.
    #[derive(Clone, Default)]
    struct Volume {
        free: Arc<AtomicU64>,
        asked: Arc<AtomicU64>,
    }

    impl FreeSpace for Volume {
        fn free(&self) -> io::Result<u64> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Ok(self.free.load(Ordering::Relaxed))
        }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_reserve_stays_free_and_little_more() {
        let volume = Volume::default();
        volume.free.store(1024 * MIB, Ordering::Relaxed);
        let room = Room::new(volume.clone(), 100 * MIB);
        let mut count = 0_u64;
        while room.take(4096).unwrap() {
            volume.free.fetch_sub(4096, Ordering::Relaxed);
            room.landed(4096);
            count += 1;
        }
        let free = volume.free.load(Ordering::Relaxed);
        assert!((100 * MIB..101 * MIB).contains(&free), "{free}");
        let asked = volume.asked.load(Ordering::Relaxed);
        assert!(asked < count / 500, "asked {asked} times for {count}");
        assert!(room.is_full().unwrap());
    }

    #[test]
    fn what_was_taken_and_is_not_written_yet_counts() {
        let volume = Volume::default();
        volume.free.store(20 * MIB, Ordering::Relaxed);
        let room = Room::new(volume, 10 * MIB);
        assert!(room.take(6 * MIB).unwrap());
        assert!(!room.take(6 * MIB).unwrap());
        room.landed(12 * MIB);
        assert!(room.take(6 * MIB).unwrap());
    }

    #[test]
    fn what_others_write_is_noticed_soon() {
        let volume = Volume::default();
        volume.free.store(1024 * MIB, Ordering::Relaxed);
        let room = Room::new(volume.clone(), 100 * MIB);
        assert!(room.take(4096).unwrap());
        room.landed(4096);
        volume.free.store(100 * MIB, Ordering::Relaxed);
        let mut more = 0;
        while room.take(4096).unwrap() {
            room.landed(4096);
            more += 4096;
        }
        assert!(more <= TRUSTED_MAX, "{more}");
    }
}
