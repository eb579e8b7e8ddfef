//! What `disk-add` is told about a disk: what `--disk` takes, by members instead of keys.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitmap::Granularity;

use super::arguments::{Arguments, bad_argument};
use super::request::Refusal;
use crate::address::Address;
use crate::served::DiskSpec;

/// Reads all of it.
pub(super) fn spec(arguments: &mut Arguments) -> Result<DiskSpec, Refusal> {
    let name = arguments.required_name("disk")?;
    let path = arguments.required_text("path")?.into();
    let mut spec = DiskSpec::new(name, path).map_err(bad_argument)?;
    match &spec.remote {
        Some(remote) => {
            if let Address::Unix(socket) = &remote.uri.address {
                whole(socket)?;
            }
        }
        None => whole(&spec.path)?,
    }
    if let Some(format) = arguments.text("format")? {
        spec.set_format(&format).map_err(bad_argument)?;
    }
    if let Some(bytes) = arguments.number("granularity", u64::MAX)? {
        let granularity = Granularity::new(bytes);
        spec.granularity = Some(granularity.map_err(|error| bad_argument(error.to_string()))?);
    }
    spec.state = folder(arguments, "state")?;
    spec.read_only = arguments.flag("read_only")?;
    if let Some(durability) = arguments.text("durability")? {
        spec.set_durability(&durability).map_err(bad_argument)?;
    }
    if let Some(cache) = arguments.text("cache")? {
        spec.set_cache(&cache).map_err(bad_argument)?;
    }
    if let Some(patience) = arguments.number("reconnect_ms", u64::MAX)? {
        let patience = Duration::from_millis(patience);
        let set = spec.set_patience("reconnect_ms", patience);
        set.map_err(bad_argument)?;
    }
    if let Some(dir) = folder(arguments, "tls_creds")? {
        let set = spec.set_tls_creds("tls_creds", dir);
        set.map_err(bad_argument)?;
    }
    Ok(spec)
}

fn folder(arguments: &mut Arguments, key: &str) -> Result<Option<PathBuf>, Refusal> {
    let folder: Option<PathBuf> = arguments.text(key)?.map(Into::into);
    folder.as_deref().map_or(Ok(()), whole)?;
    Ok(folder)
}

/// The server is in no folder that its clients know of.
fn whole(path: &Path) -> Result<(), Refusal> {
    if path.is_absolute() {
        return Ok(());
    }
    let path = path.display();
    Err(bad_argument(format!(
        "'{path}' is no path from the root on"
    )))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::disk::Durability;
    use crate::served::{Cache, Format};

    fn read(arguments: &Value) -> Result<DiskSpec, String> {
        let mut arguments =
            Arguments::nested(arguments.as_object().unwrap().clone(), String::new());
        let read = spec(&mut arguments).and_then(|spec| arguments.finish().map(|()| spec));
        read.map_err(|refusal| match refusal {
            Refusal::NotFound(reason) => reason,
            Refusal::Failure(failure) => failure.message,
        })
    }

    #[test]
    fn a_disk_is_what_its_members_say() {
        let spec = read(&json!({"disk": "vdb", "path": "/a,b", "format": "raw",
            "granularity": 4096, "state": "/s", "read_only": true, "durability": "process",
            "cache": "none"}));
        let spec = spec.unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.path.as_path()),
            ("vdb", Path::new("/a,b"))
        );
        assert_eq!(spec.granularity.map(Granularity::bytes), Some(4096));
        assert_eq!(spec.state.as_deref(), Some(Path::new("/s")));
        assert!(spec.read_only && spec.format == Some(Format::Raw));
        assert_eq!(
            (spec.durability, spec.cache),
            (Durability::Process, Cache::None)
        );

        let spec = read(
            &json!({"disk": "a", "path": "nbds://h/x", "reconnect_ms": 500,
            "tls_creds": "/c"}),
        );
        let remote = spec.unwrap().remote.unwrap();
        assert_eq!(remote.patience, Duration::from_millis(500));
        assert_eq!(remote.tls_creds.as_deref(), Some(Path::new("/c")));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        for (more, expected) in [
            (json!({"disk": "a/b"}), "A-Z"),
            (json!({"path": ""}), "no path"),
            (json!({"path": "a"}), "root on"),
            (json!({"path": "nbd+unix:///?socket=s"}), "root on"),
            (json!({"state": "s"}), "root on"),
            (json!({"format": "vmdk"}), "only raw and qcow2"),
            (json!({"granularity": 3}), "3"),
            (json!({"durability": "some"}), "power, process or none"),
            (json!({"cache": "writethrough"}), "writeback or none"),
            (json!({"reconnect_ms": 1}), "other servers"),
            (json!({"path": "nbd://h/x", "reconnect_ms": 0}), "from 1ms"),
            (json!({"size": 1}), "'size' is unexpected"),
        ] {
            let mut arguments = json!({"disk": "a", "path": "/a"});
            let members = more.as_object().unwrap().clone();
            arguments.as_object_mut().unwrap().extend(members);
            let error = read(&arguments).unwrap_err();
            assert!(error.contains(expected), "{more}: {error}");
        }
    }
}
