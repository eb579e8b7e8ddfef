use std::io;
use std::ops::Range;
use std::sync::Mutex;

/// Where eras go so that they outlive the process: a file, seen as an array of bytes.
///
/// What was never stored reads as zero.
pub trait PageStore: Send + Sync + 'static {
    /// Hands `bytes` to whatever outlives the process; returns when they would survive a kill.
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Fills `bytes` with what was stored at `offset`.
    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// The first stretch at or after `offset` in which something may have been stored, if any.
    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Makes room for `length` bytes in all, where that can be told from what is stored: later stores
    /// there do not fail for want of it.
    fn make_room(&self, length: u64) -> io::Result<()> {
        let _ = length;
        Ok(())
    }
}

/// Pages in memory: for tests, and for what need not outlive the process.
#[derive(Debug, Default)]
pub struct MemoryPages(Mutex<Vec<u8>>);

impl MemoryPages {
    /// What has been stored so far.
    pub fn contents(&self) -> Vec<u8> {
        self.0.lock().expect("no one panics while storing").clone()
    }
}

impl From<Vec<u8>> for MemoryPages {
    fn from(contents: Vec<u8>) -> Self {
        Self(Mutex::new(contents))
    }
}

impl PageStore for MemoryPages {
    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let contents = self.0.lock().expect("no one panics while storing");
        let stored = contents.get(offset as usize..).unwrap_or_default();
        let length = stored.len().min(bytes.len());
        bytes[..length].copy_from_slice(&stored[..length]);
        bytes[length..].fill(0);
        Ok(())
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.0.lock().expect("no one panics while storing").len() as u64;
        Ok((offset < end).then_some(offset..end))
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut contents = self.0.lock().expect("no one panics while storing");
        let end = offset as usize + bytes.len();
        if contents.len() < end {
            contents.resize(end, 0);
        }
        contents[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }
}
