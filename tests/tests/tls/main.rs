//! TLS on the sockets where NBD is spoken: when it begins, who is let in, and that nothing is said
//! beside it.

mod files;
mod handshake;
mod peers;
mod tools;

use std::path::PathBuf;

use stillpoint_tests::server::{Builder, temporary_directory};
use stillpoint_tests::tls::{Authority, Holder};
use stillpoint_tests::{MIB, Server};
use tempfile::TempDir;

/// An authority, and a directory with outfits of those that it vouches for.
struct Realm {
    authority: Authority,
    directory: TempDir,
}

impl Realm {
    fn new() -> Self {
        Self::of("an authority")
    }

    fn of(authority: &str) -> Self {
        Self {
            authority: Authority::new(authority),
            directory: temporary_directory(),
        }
    }

    fn outfit(&self, holder: Holder, name: &str) -> PathBuf {
        let directory = self.directory.path().join(name);
        self.authority.outfit(&directory, holder, name)
    }

    /// A server of one disk on TCP, live and for backups, with this more on its command line.
    fn serve(&self, args: &[&str]) -> Server {
        self.builder(args).start()
    }

    fn builder(&self, args: &[&str]) -> Builder {
        let creds = self.outfit(Holder::Server, "server");
        let mut builder = Server::builder()
            .disk("vda", 64 * MIB)
            .arg("--live-listen=tcp:127.0.0.1:0")
            .arg("--backup-listen=tcp:127.0.0.1:0")
            .arg(&format!("--tls-creds={}", creds.display()));
        for arg in args {
            builder = builder.arg(arg);
        }
        builder
    }
}
