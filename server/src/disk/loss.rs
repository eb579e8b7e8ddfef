use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use bitmap::Era;
use block::SharedSync;
use scratch::Durable;
use tokio::sync::Notify;

/// What becomes of a write that cannot be tracked.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OnTrackingError {
    /// It fails, and nothing has been written.
    #[default]
    FailWrite,
    /// It goes on, and what changed since any checkpoint so far is not known any more.
    StopTracking,
}

/// That tracking was lost, and in which era, durable before the first write that nobody tracked.
///
/// The record has a place of its own, which was written when the state was made: storing it takes no
/// room. Checkpoints of that era and before are of no use. The next era tries again.
pub struct Loss<P> {
    store: P,
    policy: OnTrackingError,
    /// The era, by number, once that is durable.
    era: AtomicU32,
    reason: Mutex<String>,
    syncs: SharedSync,
    told: Notify,
}

/// What the record says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LossRecord {
    /// The last era with a write that nobody tracked.
    pub era: Era,
    /// Why, in words.
    pub reason: String,
}

impl<P: Durable> Loss<P> {
    /// Where in the store the record is.
    pub const OFFSET: u64 = 3 * SECTOR_BYTES as u64;

    /// The sector of a disk that was always tracked.
    pub fn empty() -> [u8; SECTOR_BYTES] {
        encode(Era::NEVER, "")
    }

    /// Reads the record in `store`; `None` if it is damaged. Whatever it is, it is durable after.
    pub async fn open(store: P, policy: OnTrackingError) -> io::Result<(Self, Option<LossRecord>)> {
        let mut bytes = [0; SECTOR_BYTES];
        store.load(Self::OFFSET, &mut bytes)?;
        let found = decode(&bytes);
        let record = found.clone().unwrap_or(LossRecord {
            era: Era::NEVER,
            reason: String::new(),
        });
        let loss = Self {
            store,
            policy,
            era: AtomicU32::new(record.era.number()),
            reason: Mutex::new(record.reason.clone()),
            syncs: SharedSync::default(),
            told: Notify::new(),
        };
        if record.era > Era::NEVER {
            // The sync of the last server may have failed.
            loss.save(record.era, &record.reason).await?;
        }
        Ok((loss, found))
    }

    /// What is lost, if anything.
    pub fn record(&self) -> Option<LossRecord> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        let era = Era::from_number(self.era.load(Ordering::Acquire));
        (era > Era::NEVER).then(|| LossRecord {
            era,
            reason: reason.clone(),
        })
    }

    /// Whether a write that cannot be tracked goes on.
    pub(super) fn goes_on(&self) -> bool {
        self.policy == OnTrackingError::StopTracking
    }

    /// A write in `era`, which does not end before this returns, cannot be tracked. An error says
    /// that it must not be issued.
    pub(super) async fn lose(&self, era: Era, error: io::Error) -> io::Result<()> {
        if !self.goes_on() {
            return Err(error);
        }
        if self.is_lost_in(era) {
            return Ok(());
        }
        self.syncs
            .run(|| async {
                if self.is_lost_in(era) {
                    return Ok(());
                }
                let reason = format!("changes could not be recorded: {error}");
                self.save(era, &reason).await?;
                let mut told = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
                *told = reason;
                self.era.store(era.number(), Ordering::Release);
                drop(told);
                self.told.notify_one();
                Ok(())
            })
            .await
    }

    /// Whether something was written in `era` that nobody tracked.
    pub(super) fn is_lost_in(&self, era: Era) -> bool {
        self.era.load(Ordering::Acquire) == era.number()
    }

    /// Waits until tracking is lost once more.
    pub(super) async fn lost(&self) {
        self.told.notified().await;
    }

    /// Stored anew each time, so that a sync that succeeds proves it whatever happened before.
    async fn save(&self, era: Era, reason: &str) -> io::Result<()> {
        self.store.store(Self::OFFSET, &encode(era, reason))?;
        self.store.sync().await
    }
}

/// CRC-32 of all that follows, era, length of the reason, reason.
fn encode(era: Era, reason: &str) -> [u8; SECTOR_BYTES] {
    let mut length = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(length) {
        length -= 1;
    }
    let mut bytes = [0; SECTOR_BYTES];
    bytes[4..8].copy_from_slice(&era.number().to_le_bytes());
    bytes[8..16].copy_from_slice(&(length as u64).to_le_bytes());
    bytes[HEAD_BYTES..HEAD_BYTES + length].copy_from_slice(&reason.as_bytes()[..length]);
    let sum = crc32fast::hash(&bytes[4..]);
    bytes[..4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; SECTOR_BYTES]) -> Option<LossRecord> {
    let sum = u32::from_le_bytes(bytes[..4].try_into().ok()?);
    let era = u32::from_le_bytes(bytes[4..8].try_into().ok()?);
    let length = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
    let length = usize::try_from(length).ok()?.min(REASON_MAX);
    let reason = String::from_utf8_lossy(&bytes[HEAD_BYTES..HEAD_BYTES + length]);
    (sum == crc32fast::hash(&bytes[4..])).then(|| LossRecord {
        era: Era::from_number(era),
        reason: reason.into_owned(),
    })
}

const SECTOR_BYTES: usize = 512;
const HEAD_BYTES: usize = 16;
/// As long as that of a header.
const REASON_MAX: usize = 300;
