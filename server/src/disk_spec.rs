//! What may be said about a disk, whoever says it: the command line, or a client of the control socket.

use std::path::PathBuf;
use std::time::Duration;

use crate::disk::Durability;
use crate::image::RemoteSpec;
use crate::names::Name;
use crate::served::{Cache, DiskSpec, Format};

impl DiskSpec {
    /// The disk `name` on the file or the device at `path`, or on the export of another server whose URI
    /// that is; with everything else by default.
    pub(crate) fn new(name: Name, path: PathBuf) -> Result<Self, String> {
        if path.as_os_str().is_empty() {
            return Err("no path is given".to_owned());
        }
        let uri = path.to_str().filter(|text| is_uri(text));
        let remote = uri.map(|text| text.parse().map(RemoteSpec::new));
        let remote = remote.transpose().map_err(|error| error.to_string())?;
        Ok(Self {
            name,
            path,
            remote,
            format: None,
            allow_backing: Vec::new(),
            granularity: None,
            state: None,
            read_only: false,
            durability: Durability::default(),
            cache: Cache::default(),
        })
    }

    /// Says what its bytes mean.
    pub(crate) fn set_format(&mut self, name: &str) -> Result<(), String> {
        let refusal = || format!("format '{name}' is not supported: only raw and qcow2 are");
        self.format = Some(Format::named(name).ok_or_else(refusal)?);
        Ok(())
    }

    /// Says what its tracking survives.
    pub(crate) fn set_durability(&mut self, name: &str) -> Result<(), String> {
        let refusal = || format!("durability is power, process or none, not '{name}'");
        self.durability = Durability::named(name).ok_or_else(refusal)?;
        Ok(())
    }

    /// Says whether it is read and written through the page cache.
    pub(crate) fn set_cache(&mut self, name: &str) -> Result<(), String> {
        if self.remote.is_some() {
            return Err("the cache of another server's export is that server's".to_owned());
        }
        let refusal = || format!("cache is writeback or none, not '{name}'");
        self.cache = Cache::named(name).ok_or_else(refusal)?;
        Ok(())
    }

    /// Says how long a request waits for the server that has it; `key` is what that is called.
    pub(crate) fn set_patience(&mut self, key: &str, patience: Duration) -> Result<(), String> {
        let remote = self.of_remote(key)?;
        if patience.is_zero() || patience > PATIENCE_MAX {
            return Err(format!("'{key}' is from 1ms to 1d, not {patience:?}"));
        }
        remote.patience = patience;
        Ok(())
    }

    /// Says where the certificates for the server are that has it; `key` is what that is called.
    pub(crate) fn set_tls_creds(&mut self, key: &str, dir: PathBuf) -> Result<(), String> {
        self.of_remote(key)?.tls_creds = Some(dir);
        Ok(())
    }

    /// What is said about another server's export.
    fn of_remote(&mut self, key: &str) -> Result<&mut RemoteSpec, String> {
        let refusal =
            || format!("'{key}' is for the exports of other servers, as in nbd://HOST/NAME");
        self.remote.as_mut().ok_or_else(refusal)
    }
}

impl Format {
    const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// As QEMU calls them, and nothing else.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// As QEMU calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Whether it is meant as a URI and not as a path.
fn is_uri(text: &str) -> bool {
    let schemes = ["nbd", "nbds", "nbd+unix", "nbds+unix"];
    text.split_once("://")
        .is_some_and(|(scheme, _)| schemes.contains(&scheme))
}

const PATIENCE_MAX: Duration = Duration::from_secs(86_400);
