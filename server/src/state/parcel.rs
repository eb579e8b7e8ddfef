//! A state in one file, to be carried to another machine.
//!
//! Head, description, the files of the state one after the other, each as the stretches of it that are
//! not zero; and at the end the BLAKE3 hash of every byte before. Nothing is believed before that hash
//! is seen to be right; and what it is right of is still not believed to make sense.

use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::bits::BitsId;
use crate::archive::Digest;
use crate::names::Name;

/// What a parcel says of itself, also to people.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Description {
    /// What the disk was called.
    pub(crate) disk: String,
    /// Its identity, which goes with it.
    pub(crate) disk_uuid: Uuid,
    /// In bytes.
    pub(crate) size: u64,
    /// The chunk size of its map, in bytes.
    pub(crate) granularity: u64,
    /// Of every byte of the disk, if they were read.
    pub(crate) image_blake3: Option<Digest>,
    /// In RFC 3339.
    pub(crate) exported_at: String,
    /// The version that wrote it.
    pub(crate) stillpoint: String,
    /// By name.
    pub(crate) checkpoints: Vec<Name>,
    /// The persistent dirty bitmaps, by name.
    pub(crate) bitmaps: Vec<String>,
}

/// A file of a state. They come in this order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Part {
    /// What it is about, and how it was left.
    Header,
    /// The map.
    Eras,
    /// What is known about the map.
    Pages,
    /// What happened.
    Journal,
    /// The bits of a dirty bitmap.
    Bits(BitsId),
}

/// Why a file is no parcel.
#[derive(Debug, Error)]
pub(crate) enum Unfit {
    /// It does not begin like one.
    #[error("it is no exported state")]
    Stranger,
    /// It is whole, and of a version that is not known.
    #[error("it is of version {0}, and only {VERSION} is known")]
    Newer(u32),
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It cannot be read, or what is in it cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Where the parts of a parcel go.
pub(crate) trait Unpacking {
    /// A file of this length, all zeroes, begins.
    fn begin(&mut self, part: Part, length: u64) -> io::Result<()>;

    /// These are some of its bytes.
    fn store(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// A parcel that is being written.
pub(crate) struct Packing<W> {
    to: W,
    hash: blake3::Hasher,
    in_file: bool,
}

impl<W: Write> Packing<W> {
    /// Writes the head and the description.
    pub(crate) fn begin(to: W, description: &Description) -> io::Result<Self> {
        let mut packing = Self {
            to,
            hash: blake3::Hasher::new(),
            in_file: false,
        };
        let text = serde_json::to_vec(description).map_err(io::Error::other)?;
        packing.put(MAGIC)?;
        packing.put(&VERSION.to_le_bytes())?;
        packing.put(&(text.len() as u32).to_le_bytes())?;
        packing.put(&text)?;
        Ok(packing)
    }

    /// Begins a file.
    pub(crate) fn file(&mut self, part: Part, length: u64) -> io::Result<()> {
        self.end_file()?;
        let name = part.name();
        self.put(&(name.len() as u16).to_le_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&length.to_le_bytes())?;
        self.in_file = true;
        Ok(())
    }

    /// Adds bytes of it, behind those before, unless they are all zero.
    pub(crate) fn bytes(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if block::is_zero(bytes) {
            return Ok(());
        }
        self.put(&offset.to_le_bytes())?;
        self.put(&(bytes.len() as u32).to_le_bytes())?;
        self.put(bytes)
    }

    /// Ends it all.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.end_file()?;
        self.put(&0_u16.to_le_bytes())?;
        let hash = self.hash.finalize();
        self.to.write_all(hash.as_bytes())?;
        Ok(self.to)
    }

    fn end_file(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.in_file) {
            self.put(&[0; STRETCH_HEAD])?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.to.write_all(bytes)
    }
}

/// Reads a whole parcel once and compares its hash: how many bytes are before that.
pub(crate) fn verify(parcel: &mut (impl Read + Seek)) -> Result<u64, Unfit> {
    let length = parcel.seek(SeekFrom::End(0))?;
    parcel.seek(SeekFrom::Start(0))?;
    let mut left = length
        .checked_sub(blake3::OUT_LEN as u64)
        .ok_or(Unfit::Stranger)?;
    let (mut hash, body) = (blake3::Hasher::new(), left);
    let mut buffer = vec![0; STRETCH_MAX];
    let mut is_first = true;
    while left > 0 {
        let piece = &mut buffer[..left.min(STRETCH_MAX as u64) as usize];
        parcel.read_exact(piece)?;
        if std::mem::take(&mut is_first) && !piece.starts_with(MAGIC) {
            return Err(Unfit::Stranger);
        }
        hash.update(piece);
        left -= piece.len() as u64;
    }
    let mut told = [0; blake3::OUT_LEN];
    parcel.read_exact(&mut told)?;
    if is_first || hash.finalize() != told {
        return Err(Unfit::Damaged("its hash is not that of its contents"));
    }
    Ok(body)
}

/// Reads the head and the description of a parcel whose hash is right.
pub(crate) fn open(parcel: &mut impl Read) -> Result<Description, Unfit> {
    if take::<8>(parcel)? != *MAGIC {
        return Err(Unfit::Stranger);
    }
    let version = u32::from_le_bytes(take(parcel)?);
    if version != VERSION {
        return Err(Unfit::Newer(version));
    }
    let length = u32::from_le_bytes(take(parcel)?);
    if length > DESCRIPTION_MAX {
        return Err(Unfit::Damaged("its description is too long"));
    }
    let text = bytes(parcel, u64::from(length))?;
    serde_json::from_slice(&text).map_err(|_| Unfit::Damaged("its description makes no sense"))
}

/// Reads the files that follow the description, up to the hash.
pub(crate) fn unpack(parcel: &mut impl Read, into: &mut impl Unpacking) -> Result<(), Unfit> {
    let mut last = None;
    loop {
        let length = u16::from_le_bytes(take(parcel)?);
        if length == 0 {
            break;
        }
        let name = bytes(parcel, length.into())?;
        let part = std::str::from_utf8(&name).ok().and_then(Part::named);
        let part = part.ok_or(Unfit::Damaged("it has a file of a strange name"))?;
        if last.replace(part).is_some_and(|last| last >= part) {
            return Err(Unfit::Damaged("its files are in another order"));
        }
        let length = u64::from_le_bytes(take(parcel)?);
        if length > part.length_max() {
            return Err(Unfit::Damaged("a file in it is too long"));
        }
        into.begin(part, length)?;
        unpack_file(parcel, length, into)?;
    }
    let mut more = [0];
    match (last, parcel.read(&mut more)?) {
        (Some(Part::Journal | Part::Bits(_)), 0) => Ok(()),
        (_, 0) => Err(Unfit::Damaged("it lacks a file")),
        _ => Err(Unfit::Damaged("there is more behind its end")),
    }
}

fn unpack_file(
    parcel: &mut impl Read,
    length: u64,
    into: &mut impl Unpacking,
) -> Result<(), Unfit> {
    let mut at = 0;
    loop {
        let offset = u64::from_le_bytes(take(parcel)?);
        let count = u64::from(u32::from_le_bytes(take(parcel)?));
        if count == 0 {
            return if offset == 0 {
                Ok(())
            } else {
                Err(Unfit::Damaged("a stretch of a file is empty"))
            };
        }
        let end = offset.checked_add(count).filter(|end| *end <= length);
        let (Some(end), true) = (end, offset >= at && count <= STRETCH_MAX as u64) else {
            return Err(Unfit::Damaged("a stretch of a file is where none can be"));
        };
        at = end;
        into.store(offset, &bytes(parcel, count)?)?;
    }
}

impl Part {
    /// Also where it is in a state directory.
    pub(super) fn name(self) -> String {
        match self {
            Self::Header => "header".to_owned(),
            Self::Eras => "eras".to_owned(),
            Self::Pages => "pages".to_owned(),
            Self::Journal => "journal".to_owned(),
            Self::Bits(BitsId { uuid, revision }) => format!("bitmaps/{uuid}-{revision}"),
        }
    }

    /// Only what [`name`](Self::name) returns: a name is a path, and leads nowhere else.
    fn named(name: &str) -> Option<Self> {
        let part = match name {
            "header" => Self::Header,
            "eras" => Self::Eras,
            "pages" => Self::Pages,
            "journal" => Self::Journal,
            _ => {
                let (uuid, revision) = name.strip_prefix("bitmaps/")?.rsplit_once('-')?;
                let uuid = Uuid::try_parse(uuid).ok()?;
                let revision = revision.parse().ok()?;
                Self::Bits(BitsId { uuid, revision })
            }
        };
        Some(part).filter(|part| part.name() == name)
    }

    /// Longer than any that was ever written.
    fn length_max(self) -> u64 {
        match self {
            Self::Header => 4096,
            Self::Eras | Self::Pages => 1 << 42,
            Self::Journal => 64 << 20,
            Self::Bits(_) => 1 << 36,
        }
    }
}

fn take<const N: usize>(from: &mut impl Read) -> Result<[u8; N], Unfit> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map_err(cut_short)?;
    Ok(bytes)
}

/// As many as were promised; what is promised and not there takes no memory.
fn bytes(from: &mut impl Read, length: u64) -> Result<Vec<u8>, Unfit> {
    let mut bytes = Vec::new();
    from.take(length).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < length {
        return Err(cut_short(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(bytes)
}

fn cut_short(error: io::Error) -> Unfit {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Unfit::Damaged("it ends too early"),
        _ => error.into(),
    }
}

const MAGIC: &[u8; 8] = b"SPEXPORT";
const VERSION: u32 = 1;

/// Names of as many checkpoints and bitmaps as a disk can have.
const DESCRIPTION_MAX: u32 = 16 << 20;

/// Offset and length.
const STRETCH_HEAD: usize = 12;

/// The most bytes of a file that are together.
pub(crate) const STRETCH_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[derive(Debug, Default, Eq, PartialEq)]
    struct Files(Vec<(Part, Vec<u8>)>);

    impl Unpacking for Files {
        fn begin(&mut self, part: Part, length: u64) -> io::Result<()> {
            self.0.push((part, vec![0; length as usize]));
            Ok(())
        }

        fn store(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let (_, file) = self.0.last_mut().unwrap();
            file[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
    }

    fn description() -> Description {
        Description {
            disk: "vda".to_owned(),
            disk_uuid: Uuid::from_u128(7),
            size: 1 << 20,
            granularity: 65_536,
            image_blake3: None,
            exported_at: "2026-11-20T21:14:03Z".to_owned(),
            stillpoint: "0.1.0".to_owned(),
            checkpoints: vec![Name::parse("cp1").unwrap()],
            bitmaps: vec!["a b".to_owned()],
        }
    }

    fn files() -> Files {
        let id = BitsId {
            uuid: Uuid::from_u128(9),
            revision: 3,
        };
        let mut eras = vec![0; 3000];
        eras[1024..1030].fill(7);
        eras[2999] = 1;
        Files(vec![
            (Part::Header, vec![1; 4096]),
            (Part::Eras, eras),
            (Part::Pages, vec![]),
            (Part::Journal, vec![0; 512]),
            (Part::Bits(id), vec![5; 70]),
        ])
    }

    fn packed(files: &Files) -> Vec<u8> {
        let mut packing = Packing::begin(Vec::new(), &description()).unwrap();
        for (part, bytes) in &files.0 {
            packing.file(*part, bytes.len() as u64).unwrap();
            for (piece, at) in bytes.chunks(512).zip((0..).step_by(512)) {
                packing.bytes(at, piece).unwrap();
            }
        }
        packing.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(Description, Files), Unfit> {
        let mut parcel = Cursor::new(bytes);
        let body = verify(&mut parcel)?;
        let mut parcel = &bytes[..body as usize];
        let description = open(&mut parcel)?;
        let mut files = Files::default();
        unpack(&mut parcel, &mut files)?;
        Ok((description, files))
    }

    #[test]
    fn what_was_packed_is_unpacked() {
        let packed = packed(&files());
        assert_eq!(read(&packed).unwrap(), (description(), files()));
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_refused() {
        let good = packed(&files());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(read(&bad).is_err(), "byte {at}");
            assert!(read(&good[..at]).is_err(), "{at} bytes");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert!(read(&longer).is_err());
    }

    #[test]
    fn what_is_not_in_order_is_refused_whatever_its_hash() {
        let mut swapped = files();
        swapped.0.swap(1, 2);
        let mut twice = files();
        twice.0[1].0 = Part::Header;
        let lacking = Files(vec![(Part::Header, vec![])]);
        for files in [swapped, twice, lacking, Files::default()] {
            assert!(matches!(read(&packed(&files)), Err(Unfit::Damaged(_))));
        }
    }

    #[test]
    fn a_name_that_is_a_path_elsewhere_is_no_part() {
        let uuid = Uuid::from_u128(9);
        for name in [
            "../header",
            "bitmaps/../header",
            "bitmaps/",
            "/etc/passwd",
            "lease",
            &format!("bitmaps/{uuid}-+3"),
            &format!("bitmaps/{uuid}-03"),
            &format!("bitmaps/{}-3", uuid.simple()),
        ] {
            assert_eq!(Part::named(name), None, "{name}");
        }
        for (part, _) in files().0 {
            assert_eq!(Part::named(&part.name()), Some(part));
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut newer = packed(&files());
        newer[8] = 2;
        let body = newer.len() - blake3::OUT_LEN;
        let hash = blake3::hash(&newer[..body]);
        newer[body..].copy_from_slice(hash.as_bytes());
        assert!(matches!(read(&newer), Err(Unfit::Newer(2))));
    }
}
