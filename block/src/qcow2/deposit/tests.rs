//! Images of our own making; those of QEMU's are in `tests/tests/carry`.

use super::*;
use crate::Engine;
use crate::qcow2::{BitmapFile, Layout, Room};

const SIZE: u64 = 8 << 20;

/// An empty image with clusters of this size.
fn image(cluster: u64) -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let options = || {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options
    };
    let file = options().open(dir.path().join("image")).unwrap();
    let layout = Layout::new(SIZE, cluster, &[], &[]).unwrap();
    let mut part = vec![0; cluster as usize];
    for at in (0..layout.metadata_size()).step_by(part.len()) {
        layout.fill(at, &mut part);
        file.write_all_at(&part, at).unwrap();
    }
    (dir, file)
}

fn reopen(dir: &tempfile::TempDir) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true);
    options.open(dir.path().join("image")).unwrap()
}

/// What is dirty in a bitmap of the image.
async fn dirty(dir: &tempfile::TempDir, name: &str) -> Vec<Range<u64>> {
    let image = BitmapFile::open(reopen(dir), Engine::Threads)
        .await
        .unwrap();
    let bitmaps = image.bitmaps().await.unwrap();
    let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == name).unwrap();
    assert_eq!(bitmap.inconsistent, None);
    let mut found = Vec::new();
    let mut room = Room(64 << 20);
    image
        .dirty(bitmap, &mut room, |range| found.push(range))
        .await
        .unwrap();
    found
}

fn store(dir: &tempfile::TempDir, name: &str, dirty: &[Range<u64>]) -> Result<(), NotStored> {
    let bitmap = NewBitmap {
        name,
        granularity: 65_536,
        recording: true,
        dirty,
    };
    store_bitmap(&reopen(dir), SIZE, &bitmap, Existing::Stays)
}

#[tokio::test]
async fn what_is_stored_is_read_again_beside_what_was_there() {
    for cluster in [4096, 65_536] {
        let (dir, file) = image(cluster);
        drop(file);
        store(&dir, "a", &[0..1, 200_000..400_000, SIZE - 1..SIZE]).unwrap();
        store(&dir, "b", &[]).unwrap();
        store(&dir, "c", &[0..SIZE]).unwrap();
        let expected = [0..65_536, 196_608..458_752, SIZE - 65_536..SIZE];
        assert_eq!(dirty(&dir, "a").await, expected);
        assert_eq!(dirty(&dir, "b").await, []);
        assert_eq!(dirty(&dir, "c").await, [0..SIZE]);
    }
}

#[tokio::test]
async fn one_of_the_same_name_is_replaced_only_where_that_is_wanted() {
    let (dir, _) = image(4096);
    store(&dir, "a", &[0..1]).unwrap();
    assert!(matches!(
        store(&dir, "a", &[]).unwrap_err(),
        NotStored::Exists
    ));
    assert_eq!(dirty(&dir, "a").await, [0..65_536]);
    let bitmap = NewBitmap {
        name: "a",
        granularity: 65_536,
        recording: false,
        dirty: &[65_536..65_537],
    };
    store_bitmap(&reopen(&dir), SIZE, &bitmap, Existing::Goes).unwrap();
    assert_eq!(dirty(&dir, "a").await, [65_536..131_072]);
}

#[test]
fn what_cannot_be_stored_is_refused_and_the_image_stays_as_it_was() {
    let (dir, _) = image(4096);
    let before = std::fs::read(dir.path().join("image")).unwrap();
    let bitmap = |name: &'static str, granularity, dirty: &'static [Range<u64>], size| {
        let bitmap = NewBitmap {
            name,
            granularity,
            recording: true,
            dirty,
        };
        store_bitmap(&reopen(&dir), size, &bitmap, Existing::Stays).unwrap_err()
    };
    for (error, why) in [
        (bitmap("", 65_536, &[], SIZE), "1 to 1023"),
        (bitmap("a\0", 65_536, &[], SIZE), "1 to 1023"),
        (bitmap("a", 256, &[], SIZE), "granularity"),
        (bitmap("a", 1000, &[], SIZE), "granularity"),
        (bitmap("a", 65_536, &[512..512], SIZE), "not in order"),
        (
            bitmap("a", 65_536, &[512..1024, 0..512], SIZE),
            "not in order",
        ),
        (bitmap("a", 65_536, &[0..SIZE + 1], SIZE), "not in order"),
        (bitmap("a", 65_536, &[], SIZE + 512), "of a disk of"),
    ] {
        assert!(error.to_string().contains(why), "{error}");
    }
    let held = reopen(&dir);
    let _lock = ImageLock::take(&held).unwrap();
    let error = bitmap("a", 65_536, &[], SIZE);
    assert!(matches!(error, NotStored::Lock(_)), "{error}");
    assert_eq!(std::fs::read(dir.path().join("image")).unwrap(), before);
}

#[test]
fn bits_are_set_across_bytes() {
    for range in [0..0, 0..1, 3..5, 0..8, 7..9, 1..64, 8..24, 5..61] {
        let mut bits = [0; 8];
        set(&mut bits, range.clone());
        let all = u64::from_le_bytes(bits);
        for bit in 0..64 {
            assert_eq!(
                all >> bit & 1 != 0,
                range.contains(&bit),
                "{range:?}, {bit}"
            );
        }
    }
}
