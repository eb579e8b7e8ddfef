//! qcow2 images that nobody has made.

use std::cell::RefCell;
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use block::qcow2::{Qcow2Image, Room};
use block::{Engine, Storage};
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

/// A folder from which images may name files, and what runs futures.
pub struct World {
    folder: PathBuf,
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("stillpoint-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder of our own");
        let folder = folder.canonicalize().expect("it was made a moment ago");
        fs::write(folder.join("raw"), [0x55; 20_000]).expect("a file in it");
        fs::write(folder.join("data"), [0x66; 70_000]).expect("another");
        let mut runtime = Builder::new_current_thread();
        let runtime = runtime.max_blocking_threads(1).build();
        Self {
            folder,
            runtime: runtime.expect("a runtime"),
        }
    }

    /// Runs a future of ours.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

/// Opens an image and, as `behind`, another that it may name: after two bytes that say how long the first
/// is, and whether each 512 bytes of it are the beginning of 16 KiB, which is the least that clusters with
/// parts have. What is opened is handed on; and it is from where it may be.
pub fn with_image(data: &[u8], then: impl FnOnce(&World, &Qcow2Image)) {
    let Some((length, images)) = data.split_first_chunk() else {
        return;
    };
    let length = u16::from_le_bytes(*length);
    let (image, behind) = images.split_at(images.len().min(usize::from(length & !STRETCHED)));
    let step = if length & STRETCHED == 0 {
        512
    } else {
        16 << 10
    };
    WORLD.with_borrow(|world| {
        let path = world.folder.join("image");
        for (name, bytes, step) in [("image", image, step), ("behind", behind, 512)] {
            let file = File::create(world.folder.join(name)).expect("a file of our own");
            for (part, at) in bytes.chunks(512).zip((0..).step_by(step)) {
                file.write_all_at(part, at).expect("a file of our own");
            }
        }
        let file = File::open(&path).expect("it was made a moment ago");
        let opened = Qcow2Image::open(file, &path, &[], Engine::Threads);
        if let Ok(image) = world.run(opened) {
            for file in image.files() {
                let link = format!("/proc/self/fd/{}", file.file().as_raw_fd());
                let file = fs::read_link(link).expect("an open file");
                assert!(
                    file.starts_with(&world.folder),
                    "{} was opened",
                    file.display()
                );
            }
            then(world, &image);
        }
    });
}

/// Reads parts of an image in several ways, which agree.
pub fn read(world: &World, image: &Qcow2Image) {
    let size = image.size();
    for range in [0..size.min(LOOKED_AT), size.saturating_sub(LOOKED_AT)..size] {
        let whole = bytes(world, image, range.clone());
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + 1000);
            let part = bytes(world, image, at..end);
            if let (Some(whole), Some(part)) = (&whole, part) {
                let from = (at - range.start) as usize;
                assert_eq!(whole[from..from + part.len()], part, "{at}..{end}");
            }
            at = end;
        }
        check_extents(world, image, &range);
        check_depths(world, image, &range);
    }
}

fn bytes(world: &World, image: &Qcow2Image, range: Range<u64>) -> Option<Vec<u8>> {
    let mut buffer = vec![0xee; (range.end - range.start) as usize];
    world.run(image.read(range.start, &mut buffer)).ok()?;
    Some(buffer)
}

fn check_extents(world: &World, image: &Qcow2Image, range: &Range<u64>) {
    let mut at = range.start;
    while at < range.end {
        let Ok(extents) = world.run(image.extents(at..range.end)) else {
            return;
        };
        assert!(!extents.is_empty(), "nothing is told of {at}");
        for extent in extents {
            assert_eq!(extent.range.start, at);
            assert!(extent.range.end > at && extent.range.end <= range.end);
            at = extent.range.end;
            if extent.hole
                && let Some(read) = bytes(world, image, extent.range)
            {
                assert!(read.iter().all(|&byte| byte == 0), "a hole has bytes");
            }
        }
    }
}

fn check_depths(world: &World, image: &Qcow2Image, range: &Range<u64>) {
    let mut at = range.start;
    while at < range.end {
        let Ok(depths) = world.run(image.depths(at..range.end, 3)) else {
            return;
        };
        assert!((1..=3).contains(&depths.len()), "{depths:?}");
        for part in depths {
            assert_eq!(part.range.start, at);
            assert!(part.range.end > at && part.range.end <= range.end);
            at = part.range.end;
            assert!(part.depth <= 3, "two images and what is behind them");
            if part.depth == 0
                && let Some(read) = bytes(world, image, part.range)
            {
                assert!(read.iter().all(|&byte| byte == 0), "nowhere has bytes");
            }
        }
    }
}

/// Reads the dirty bitmaps of an image: what is dirty is in order, and on the disk.
pub fn bitmaps(world: &World, image: &Qcow2Image) {
    let Ok(bitmaps) = world.run(image.bitmaps()) else {
        return;
    };
    let mut room = Room(1 << 20);
    for bitmap in bitmaps {
        assert!(bitmap.granularity.is_power_of_two());
        assert!((512..=2 << 30).contains(&bitmap.granularity));
        if bitmap.inconsistent.is_some() {
            continue;
        }
        assert!((1..=1023).contains(&bitmap.name.len()));
        let (mut at, mut told) = (0, 0);
        let dirty = image.dirty(&bitmap, &mut room, |range| {
            assert!(range.start >= at && range.start < range.end);
            assert!(range.start.is_multiple_of(bitmap.granularity) && range.start < image.size());
            at = range.end;
            told += range.end - range.start;
        });
        let _ = world.run(dirty);
        assert!(told <= image.size() + 8 * bitmap.granularity * (2 << 20));
    }
}

/// In the length of an image.
const STRETCHED: u16 = 1 << 15;

/// How much of each end of a disk is looked at.
const LOOKED_AT: u64 = 96 << 10;
