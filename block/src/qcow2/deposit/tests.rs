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

/// What an image counts of each cluster, 16 bits wide.
fn counts(dir: &tempfile::TempDir) -> Vec<u16> {
    let bytes = std::fs::read(dir.path().join("image")).unwrap();
    let table = be64(&bytes, 48) as usize;
    let block = be64(&bytes, table) as usize;
    let block = &bytes[block..block + 4096];
    let pairs = block.chunks_exact(2);
    pairs
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
        .collect()
}

/// What is done to an image whose list of bitmaps is there.
type Damage<'a> = &'a dyn Fn(&File, u64);

#[tokio::test]
async fn a_strange_bitmap_is_replaced_and_nothing_of_it_is_given_back() {
    let replace = |dir: &tempfile::TempDir| {
        let bitmap = NewBitmap {
            name: "a",
            granularity: 65_536,
            recording: true,
            dirty: &[65_536..65_537],
        };
        store_bitmap(&reopen(dir), SIZE, &bitmap, Existing::Goes).unwrap();
    };
    let replaced = |damage: Damage<'_>| {
        let (dir, file) = image(4096);
        store(&dir, "a", &[0..1]).unwrap();
        let head = Head::read(&file).unwrap();
        let list = head.header().bitmaps.unwrap().offset;
        damage(&file, list);
        let before = counts(&dir);
        replace(&dir);
        let after = counts(&dir);
        let given_back: Vec<_> = (0..before.len())
            .filter(|at| before[*at] > after[*at])
            .map(|at| at as u64)
            .collect();
        (dir, given_back, list / 4096)
    };
    let (_, given_back, list) = replaced(&|_, _| {});
    assert_eq!(given_back, [list - 2, list - 1, list], "bits, table, list");

    let put = |at: u64, bytes: &'static [u8]| {
        move |file: &File, list: u64| file.write_all_at(bytes, list + at).unwrap()
    };
    let first_table: fn(&File, u64) = |file, list| {
        let first_table = Head::read(file).unwrap().first_table().0;
        file.write_all_at(&first_table.to_be_bytes(), list).unwrap();
    };
    let in_table = |entry: u64| {
        move |file: &File, list: u64| {
            file.write_all_at(&entry.to_be_bytes(), list - 4096)
                .unwrap();
        }
    };
    let cases: [(&str, Damage<'_>); 12] = [
        ("a table at no place", &put(0, &[0; 8])),
        ("a table at no cluster", &put(6, &[2])),
        ("a table behind the end", &put(4, &[1])),
        ("the first table of the disk", &first_table),
        ("more clusters", &put(11, &[2])),
        ("unknown flags", &put(15, &[10])),
        ("another kind", &put(16, &[2])),
        ("too fine a granularity", &put(17, &[8])),
        ("no granularity", &put(17, &[64])),
        ("an entry with more bits", &in_table(1 << 63 | 4096)),
        ("an entry at no cluster", &in_table(512)),
        ("an entry behind the end", &in_table(1 << 40)),
    ];
    for (what, damage) in cases {
        let (dir, given_back, list) = replaced(damage);
        assert_eq!(given_back, [list], "{what}");
        assert_eq!(dirty(&dir, "a").await, [65_536..131_072], "{what}");
    }
    // What is counted twice, or is the head, is somebody else's.
    let (_, given_back, list) = replaced(&in_table(0));
    assert_eq!(given_back, [list - 1, list]);
    let (_, given_back, list) = replaced(&|file: &File, list: u64| {
        let bytes = 2_u16.to_be_bytes();
        let head = Head::read(file).unwrap();
        let table = read_at(file, head.refcount_table().0, 8).unwrap();
        let counted = be64(&table, 0) + 2 * (list / 4096 - 2);
        file.write_all_at(&bytes, counted).unwrap();
    });
    assert_eq!(given_back, [list - 1, list], "bits that are counted twice");
}
