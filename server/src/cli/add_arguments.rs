//! A disk as the server is told of it: with whole paths, as it is in another folder than we are.

use std::path::{Path, PathBuf};

use bitmap::Granularity;
use serde::Serialize;

use super::problem::Problem;
use crate::address::Address;
use crate::names::Name;
use crate::served::{DiskSpec, Format};

/// The arguments of `disk-add`.
#[derive(Serialize)]
pub(super) struct AddArguments {
    disk: Name,
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    granularity: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<PathBuf>,
    read_only: bool,
    durability: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reconnect_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_creds: Option<PathBuf>,
}

impl AddArguments {
    /// That say what `spec` does.
    pub(super) fn of(spec: &DiskSpec) -> Result<Self, Problem> {
        let remote = spec.remote.as_ref();
        let path = match remote {
            None => whole(&spec.path)?,
            Some(remote) => {
                if let Address::Unix(socket) = &remote.uri.address
                    && !socket.is_absolute()
                {
                    let message = format!(
                        "the socket '{}' is no path from the root on",
                        socket.display()
                    );
                    return Err(Problem::usage(message));
                }
                spec.path.clone()
            }
        };
        let creds = remote.and_then(|remote| remote.tls_creds.as_deref());
        Ok(Self {
            disk: spec.name.clone(),
            path,
            format: spec.format.map(Format::name),
            granularity: spec.granularity.map(Granularity::bytes),
            state: spec.state.as_deref().map(whole).transpose()?,
            read_only: spec.read_only,
            durability: spec.durability.name(),
            // That of another server's export is not ours to choose.
            cache: remote.is_none().then(|| spec.cache.name()),
            reconnect_ms: remote.map(|remote| remote.patience.as_millis() as u64),
            tls_creds: creds.map(whole).transpose()?,
        })
    }
}

fn whole(path: &Path) -> Result<PathBuf, Problem> {
    let cannot = |why: &str| Problem::usage(format!("'{}' {why}", path.display()));
    let whole = std::path::absolute(path).map_err(|error| cannot(&error.to_string()))?;
    match whole.to_str() {
        Some(_) => Ok(whole),
        None => Err(cannot("is no UTF-8, which is what the server can be told")),
    }
}
