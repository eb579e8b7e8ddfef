//! The servers that the rows are held against, brought into the situations that the rows need.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use stillpoint_tests::peers::OtherServer;
use stillpoint_tests::raw_nbd::errno;
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{MIB, RawNbd, Server};
use tempfile::TempDir;

/// The size of an export, where nothing else is said.
pub(crate) const SIZE: u64 = 4 * MIB;

/// The name of the export, where nothing else is said.
pub(crate) const EXPORT: &str = "vda";

/// A server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Peer {
    /// Ours.
    Stillpoint,
    /// QEMU's.
    QemuNbd,
    /// That of libnbd's authors.
    Nbdkit,
}

impl Peer {
    /// The program.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Stillpoint => "stillpoint",
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
        }
    }

    /// An empty writable export of [`SIZE`].
    pub(crate) fn serve(self) -> Served {
        self.serve_size(SIZE)
    }

    /// An empty writable export of this size.
    pub(crate) fn serve_size(self, size: u64) -> Served {
        match self {
            Self::Stillpoint => Served::ours(Server::with_disk(size), Server::live),
            other => Served::others(size, |image| other.start(image, &[])),
        }
    }

    /// A read-only export of [`SIZE`], of ones in its first MiB. Ours is a frozen one.
    pub(crate) fn serve_read_only(self) -> Served {
        match self {
            Self::Stillpoint => {
                let server = Server::with_disk(SIZE);
                let mut guest = server.open_live("vda");
                guest.write(0, &vec![1; MIB as usize]).unwrap();
                server.begin("b1", &[]);
                Served::ours(server, Server::frozen)
            }
            other => Served::others(SIZE, |image| {
                let mut file = File::options().write(true).open(image).expect("our file");
                file.write_all(&vec![1; MIB as usize]).expect("room");
                other.start(image, &["-r"])
            }),
        }
    }

    /// An export of [`SIZE`] of which nothing can be read. Ours is one of a broken backup.
    pub(crate) fn serve_failing(self) -> Served {
        match self {
            Self::Stillpoint => {
                let server = Server::with_disk(SIZE);
                let mut guest = server.open_live("vda");
                guest.write(0, &vec![1; MIB as usize]).unwrap();
                server.begin("b1", &["--scratch-limit", "4k"]);
                guest.write(0, &vec![2; MIB as usize]).unwrap();
                let broken = server.open_frozen("vda", &[]).read(0, 512);
                assert_eq!(broken, Err(errno::EIO), "the backup has broken");
                Served::ours(server, Server::frozen)
            }
            Self::QemuNbd => Served::others(SIZE, |image| {
                // It does not read what it knows to be a hole.
                std::fs::write(image, vec![1; SIZE as usize]).expect("room");
                let image = format!(
                    "driver=raw,file.driver=blkdebug,file.image.driver=file,\
                     file.image.filename={},file.inject-error.0.event=read_aio,\
                     file.inject-error.0.errno=5",
                    path(image)
                );
                let args = ["--shared=0", "-x", EXPORT, "-A", "--image-opts", &image];
                OtherServer::qemu_nbd(&args)
            }),
            Self::Nbdkit => Served::others(SIZE, |image| {
                let fails = ["error-pread=EIO", "error-pread-rate=100%"];
                nbdkit(&["--filter=error"], image, &fails)
            }),
        }
    }

    /// Two writable exports of [`SIZE`], `vda` and `vdb`; `qemu-nbd` has no more than one.
    pub(crate) fn serve_two(self) -> Option<Served> {
        match self {
            Self::Stillpoint => {
                let builder = Server::builder().disk("vda", SIZE).disk("vdb", SIZE);
                Some(Served::ours(builder.start(), Server::live))
            }
            Self::QemuNbd => None,
            Self::Nbdkit => Some(Served::others(SIZE, |image| {
                nbdkit(&[], image, &["exportname=vdb"])
            })),
        }
    }

    fn start(self, image: &Path, args: &[&str]) -> OtherServer {
        match self {
            Self::Stillpoint => unreachable!("it has a harness of its own"),
            Self::QemuNbd => {
                let always = ["--shared=0", "-x", EXPORT, "-A", "-D", "a disk"];
                let raw = ["-f", "raw", "--discard=unmap", path(image)];
                OtherServer::qemu_nbd(&[&always[..], args, &raw].concat())
            }
            Self::Nbdkit => nbdkit(args, image, &[]),
        }
    }
}

/// Without the filter any name would be the export's.
fn nbdkit(args: &[&str], image: &Path, parameters: &[&str]) -> OtherServer {
    let file = format!("file={}", path(image));
    let plugin = ["--filter=exportname", "file", &file];
    let names = [
        "exportname=vda",
        "exportname-strict=true",
        "exportname-list=explicit",
    ];
    OtherServer::nbdkit(&[args, &plugin[..], &names, parameters].concat())
}

/// A server that runs, and its export.
pub(crate) struct Served {
    socket: PathBuf,
    size: u64,
    ours: Option<Server>,
    _others: Option<(OtherServer, TempDir)>,
}

impl Served {
    fn ours(server: Server, socket: impl FnOnce(&Server) -> PathBuf) -> Self {
        let socket = socket(&server);
        Self {
            size: RawNbd::connect(&socket)
                .info(EXPORT)
                .expect("it is there")
                .size,
            socket,
            ours: Some(server),
            _others: None,
        }
    }

    fn others(size: u64, start: impl FnOnce(&Path) -> OtherServer) -> Self {
        let directory = stillpoint_tests::server::temporary_directory();
        let image = directory.path().join("vda.raw");
        sparse_file(&image, size);
        let server = start(&image);
        Self {
            socket: server.socket(),
            size,
            ours: None,
            _others: Some((server, directory)),
        }
    }

    /// Where it serves.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// How large the export is.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The block sizes of the export: who tells none has those that every client may presume.
    pub(crate) fn block_sizes(&self) -> [u32; 3] {
        let told = self
            .connect()
            .info(EXPORT)
            .expect("it is there")
            .block_sizes;
        told.unwrap_or([1, 4096, 32 << 20])
    }

    /// A client that has been greeted and has answered the flags of the handshake.
    pub(crate) fn connect(&self) -> RawNbd {
        RawNbd::connect(&self.socket)
    }

    /// The same with structured replies.
    pub(crate) fn structured(&self) -> RawNbd {
        let mut nbd = self.connect();
        nbd.structured_replies();
        nbd
    }

    /// A client in transmission, with structured replies and `base:allocation`.
    pub(crate) fn open(&self) -> RawNbd {
        RawNbd::open(&self.socket, EXPORT, &["base:allocation"])
    }

    /// A client in transmission, with simple replies.
    pub(crate) fn open_simple(&self) -> RawNbd {
        let mut nbd = self.connect();
        nbd.go(EXPORT).expect("the export");
        nbd
    }

    /// Sees that the server goes on, whatever a client has done.
    #[track_caller]
    pub(crate) fn is_well(&self) {
        self.open().disconnect();
        if let Some(server) = &self.ours {
            server.is_well();
        }
    }
}
