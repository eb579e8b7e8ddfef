//! The head of an image, and what is refused for what it says (`qcow2.txt` of QEMU).

use thiserror::Error;

/// What the head of an image says, checked.
///
/// Its offsets are where things should be: whether anything is there is seen when it is read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The size of a cluster, as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// The size of the disk, in bytes.
    pub size: u64,
    /// Where the first table of addresses is.
    pub l1_offset: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Whether the parts of a cluster are there or not each by itself.
    pub extended_l2: bool,
    /// The image behind this one, as it is named here.
    pub backing: Option<Backing>,
    /// Where data is, if not in the image itself.
    pub data_file: Option<DataFile>,
    /// Where its dirty bitmaps are listed.
    pub bitmaps: Option<BitmapDirectory>,
}

/// An image that is named by another. Neither the name nor the format can be trusted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backing {
    /// Its name.
    pub name: Vec<u8>,
    /// Its format, if the image says so.
    pub format: Option<Vec<u8>>,
}

/// A file that holds the data of an image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DataFile {
    /// Its name.
    pub name: Vec<u8>,
    /// Whether everything in it is where it is on the disk.
    pub raw: bool,
}

/// How a cluster is compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Compression {
    /// Deflate, without a head.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Where the dirty bitmaps of an image are listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BitmapDirectory {
    /// How many there are.
    pub count: u32,
    /// How long the list is, in bytes.
    pub bytes: u64,
    /// Where it begins.
    pub offset: u64,
    /// Whether nobody has written the image who does not know of them.
    pub consistent: bool,
}

/// Why an image is not read.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum Refusal {
    /// It does not begin like one.
    #[error("it is no qcow2 image")]
    NotQcow2,
    /// Its version is neither 2 nor 3.
    #[error("it is of version {0} of the format, and only 2 and 3 are known")]
    Version(u32),
    /// Its contents are encrypted.
    #[error("it is encrypted ({0}), and encrypted images are not supported")]
    Encrypted(Encryption),
    /// It needs something that is not known.
    #[error("it needs features that are not known: {0}")]
    UnknownFeatures(String),
    /// It was marked as corrupt.
    #[error("it is marked as corrupt")]
    Corrupt,
    /// It was not closed.
    #[error("it is marked as dirty: whoever wrote it did not close it")]
    Dirty,
    /// What it says cannot be.
    #[error("its header is damaged: {0}")]
    Malformed(&'static str),
}

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Encryption {
    /// QEMU's own, of old.
    #[error("AES")]
    Aes,
    /// LUKS.
    #[error("LUKS")]
    Luks,
    /// One of which only the number is known.
    #[error("method {0}")]
    Other(u32),
}

impl Header {
    /// How many bytes of an image that begins with `start` are its head, for [`parse`](Self::parse).
    pub fn length(start: &[u8; START_BYTES]) -> Result<usize, Refusal> {
        let fields = Fields(start);
        fields.refuse_strangers()?;
        Ok(1 << fields.cluster_bits().unwrap_or(CLUSTER_BITS_MAX))
    }

    /// Reads the head: all of the first cluster, or of a shorter file all.
    pub fn parse(head: &[u8]) -> Result<Self, Refusal> {
        let fields = Fields(head);
        fields.refuse_strangers()?;
        let features = fields.features();
        fields.refuse_by_name(&features)?;

        if fields.u32(4) == 3 && features.header_bytes < HEADER_BYTES_3 {
            return Err(Malformed("it is too short"));
        }
        let cluster_bits = fields.cluster_bits()?;
        let cluster = 1 << cluster_bits;
        let head = &head[..head.len().min(cluster)];
        let fields = Fields(head);
        let extended_l2 = features.incompatible & EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            return Err(Malformed("clusters with parts have at least 16 KiB"));
        }
        let (size, l1_offset) = fields.size_and_table(cluster_bits, extended_l2)?;
        let extensions = fields.extensions(features.header_bytes)?;
        let name = fields.backing_name()?;
        Ok(Self {
            version: fields.u32(4),
            cluster_bits,
            size,
            l1_offset,
            compression: fields.compression(&features)?,
            extended_l2,
            backing: name.map(|name| Backing {
                name: name.to_vec(),
                format: extensions.backing_format.map(<[u8]>::to_vec),
            }),
            data_file: data_file(&features, &extensions)?,
            bitmaps: extensions.bitmaps.map(|directory| BitmapDirectory {
                consistent: features.autoclear & CONSISTENT_BITMAPS != 0,
                ..directory
            }),
        })
    }
}

use Refusal::Malformed;

/// The bits that say what an image needs, and how long the fixed part of its head is.
struct Features {
    incompatible: u64,
    autoclear: u64,
    header_bytes: usize,
}

/// What follows the fixed part, as far as it is of use.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
    feature_names: Option<&'a [u8]>,
    bitmaps: Option<BitmapDirectory>,
}

/// A head, of which all that is not there is zero.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn part<const N: usize>(&self, at: usize) -> [u8; N] {
        let found = self.0.get(at..).and_then(|rest| rest.first_chunk());
        found.copied().unwrap_or([0; N])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.part(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.part(at))
    }

    fn refuse_strangers(&self) -> Result<(), Refusal> {
        if !self.0.starts_with(MAGIC) {
            return Err(Refusal::NotQcow2);
        }
        match self.u32(4) {
            2 | 3 => Ok(()),
            version => Err(Refusal::Version(version)),
        }
    }

    fn features(&self) -> Features {
        if self.u32(4) == 2 {
            return Features {
                incompatible: 0,
                autoclear: 0,
                header_bytes: START_BYTES,
            };
        }
        Features {
            incompatible: self.u64(72),
            autoclear: self.u64(88),
            header_bytes: self.u32(100) as usize,
        }
    }

    /// The refusals that a user can do something about come before all others.
    fn refuse_by_name(&self, features: &Features) -> Result<(), Refusal> {
        match self.u32(32) {
            0 => {}
            1 => return Err(Refusal::Encrypted(Encryption::Aes)),
            2 => return Err(Refusal::Encrypted(Encryption::Luks)),
            other => return Err(Refusal::Encrypted(Encryption::Other(other))),
        }
        let unknown = features.incompatible & !KNOWN;
        if unknown != 0 {
            return Err(Refusal::UnknownFeatures(self.names(unknown, features)));
        }
        if features.incompatible & CORRUPT != 0 {
            return Err(Refusal::Corrupt);
        }
        if features.incompatible & DIRTY != 0 {
            return Err(Refusal::Dirty);
        }
        Ok(())
    }

    /// What the image itself calls these bits, as far as it does.
    fn names(&self, bits: u64, features: &Features) -> String {
        let extensions = self.extensions(features.header_bytes).unwrap_or_default();
        let names = extensions.feature_names.unwrap_or_default();
        let name = |bit: u8| {
            let mut entries = names.chunks_exact(FEATURE_NAME_BYTES);
            let entry = entries.find(|entry| entry[..2] == [INCOMPATIBLE, bit])?;
            let name = entry[2..].split(|&byte| byte == 0).next()?;
            Some(String::from_utf8_lossy(name).escape_debug().to_string())
        };
        let told = (0..64).filter(|bit| bits & 1 << bit != 0).map(|bit| {
            let name = name(bit).map_or_else(String::new, |name| format!(" ('{name}')"));
            format!("bit {bit}{name}")
        });
        told.collect::<Vec<_>>().join(", ")
    }

    fn cluster_bits(&self) -> Result<u32, Refusal> {
        match self.u32(20) {
            bits @ 9..=CLUSTER_BITS_MAX => Ok(bits),
            _ => Err(Malformed("clusters have 512 bytes to 2 MiB")),
        }
    }

    fn size_and_table(&self, cluster_bits: u32, extended: bool) -> Result<(u64, u64), Refusal> {
        let (size, entries, offset) = (self.u64(24), self.u32(36), self.u64(40));
        if self.u32(4) == 3 && self.u32(96) > REFCOUNT_ORDER_MAX {
            return Err(Malformed("reference counts have at most 64 bits"));
        }
        let entry_bits = if extended { 4 } else { 3 };
        // What one entry of the first table is for.
        let covered = 1 << (cluster_bits + cluster_bits - entry_bits);
        let needed = size.div_ceil(covered);
        if needed > L1_ENTRIES_MAX {
            return Err(Malformed("the disk is larger than its tables can be"));
        }
        if u64::from(entries) < needed {
            return Err(Malformed("its first table is too short for the disk"));
        }
        if !offset.is_multiple_of(1 << cluster_bits) || offset > OFFSET_MAX {
            return Err(Malformed("its first table is at no cluster"));
        }
        Ok((size, offset))
    }

    fn compression(&self, features: &Features) -> Result<Compression, Refusal> {
        let kind = if features.header_bytes > HEADER_BYTES_3 {
            self.part::<1>(HEADER_BYTES_3)[0]
        } else {
            0
        };
        if (kind != 0) != (features.incompatible & COMPRESSION != 0) {
            return Err(Malformed("it says two things about its compression"));
        }
        match kind {
            0 => Ok(Compression::Zlib),
            1 => Ok(Compression::Zstd),
            _ => Err(Malformed("its kind of compression is not known")),
        }
    }

    fn backing_name(&self) -> Result<Option<&'a [u8]>, Refusal> {
        let (offset, length) = (self.u64(8), self.u32(16) as usize);
        if offset == 0 || length == 0 {
            return Ok(None);
        }
        let name = usize::try_from(offset).ok();
        let name = name.and_then(|from| self.0.get(from..from.checked_add(length)?));
        match name {
            Some(name) if length <= NAME_MAX => Ok(Some(name)),
            _ => Err(Malformed("the name of its backing file does not fit")),
        }
    }

    fn extensions(&self, from: usize) -> Result<Extensions<'a>, Refusal> {
        let end = match self.u64(8) {
            0 => self.0.len(),
            offset => self.0.len().min(offset as usize),
        };
        let mut found = Extensions::default();
        let mut rest = self.0.get(from..end).unwrap_or_default();
        // A list without an end is one that ends with the cluster.
        while let Some((head, behind)) = rest.split_first_chunk::<8>() {
            let head = Fields(head);
            let (kind, length) = (head.u32(0), head.u32(4) as usize);
            if kind == 0 {
                break;
            }
            let Some(data) = behind.get(..length) else {
                return Err(Malformed("an extension is longer than the header"));
            };
            match kind {
                BACKING_FORMAT => found.backing_format = Some(data),
                DATA_FILE_NAME => found.data_file = Some(data),
                FEATURE_NAMES => found.feature_names = Some(data),
                BITMAPS if length == BITMAPS_BYTES => {
                    let data = Fields(data);
                    found.bitmaps = Some(BitmapDirectory {
                        count: data.u32(0),
                        bytes: data.u64(8),
                        offset: data.u64(16),
                        consistent: false,
                    });
                }
                _ => {}
            }
            rest = behind.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(found)
    }
}

fn data_file(features: &Features, extensions: &Extensions) -> Result<Option<DataFile>, Refusal> {
    if features.incompatible & EXTERNAL_DATA == 0 {
        return Ok(None);
    }
    let name = extensions.data_file.unwrap_or_default();
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Malformed("it does not name the file that has its data"));
    }
    Ok(Some(DataFile {
        name: name.to_vec(),
        raw: features.autoclear & RAW_DATA != 0,
    }))
}

/// `QFI\xfb`.
const MAGIC: &[u8] = b"QFI\xfb";

/// The head of version 2, which all begin with.
pub(crate) const START_BYTES: usize = 72;

/// The least that version 3 has.
const HEADER_BYTES_3: usize = 104;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;

pub(super) const CONSISTENT_BITMAPS: u64 = 1;
pub(super) const RAW_DATA: u64 = 1 << 1;

const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE_NAME: u32 = 0x4441_5441;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const BITMAPS: u32 = 0x2385_2875;
pub(super) const BITMAPS_BYTES: usize = 24;

/// In the table of feature names: a kind, a bit, and 46 bytes of text.
const FEATURE_NAME_BYTES: usize = 48;
const INCOMPATIBLE: u8 = 0;

/// What the format allows for a name, in bytes.
const NAME_MAX: usize = 1023;

/// 2 MiB.
const CLUSTER_BITS_MAX: u32 = 21;

const REFCOUNT_ORDER_MAX: u32 = 6;

/// A part of a cluster has at least 512 bytes, and there are 32.
const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;

/// QEMU's: 32 MiB of table, which is 2 EiB of disk with the largest clusters.
const L1_ENTRIES_MAX: u64 = 4 << 20;

/// No table says more than 56 bits of an offset.
pub(crate) const OFFSET_MAX: u64 = (1 << 56) - 1;
