//! The value of `--disk`: `NAME=PATH[,key=value]...`, as people know it from QEMU.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use bitmap::Granularity;

use super::units::{parse_duration, parse_size};
use crate::names::Name;
use crate::served::DiskSpec;

/// Reads it; an error says what is wrong.
pub(super) fn parse(text: &OsStr) -> Result<DiskSpec, String> {
    let text = text.as_bytes();
    let Some(at) = text.iter().position(|&byte| byte == b'=') else {
        return Err("not of the form NAME=PATH".to_owned());
    };
    let name =
        Name::parse(&String::from_utf8_lossy(&text[..at])).map_err(|error| error.to_string())?;
    let mut parts = split_at_commas(&text[at + 1..]).into_iter();
    let path = parts.next().unwrap_or_default();
    let mut spec = DiskSpec::new(name, path.into())?;
    let mut seen = Vec::new();
    for part in parts {
        let (key, value) = split_key(&part);
        let key = match key.as_str() {
            "readonly" => "read-only".to_owned(),
            _ => key,
        };
        if seen.contains(&key) {
            return Err(format!("'{key}' is given twice"));
        }
        set(&mut spec, &key, value)?;
        seen.push(key);
    }
    Ok(spec)
}

fn set(spec: &mut DiskSpec, key: &str, value: Option<OsString>) -> Result<(), String> {
    let text = value
        .as_ref()
        .map(|value| value.to_string_lossy().into_owned());
    match (key, text.as_deref()) {
        ("format", Some(name)) => spec.set_format(name)?,
        ("granularity", Some(size)) => {
            let bytes = parse_size(size)?;
            spec.granularity = Some(Granularity::new(bytes).map_err(|error| error.to_string())?);
        }
        ("state", Some(dir)) if !dir.is_empty() => spec.state = value.map(Into::into),
        ("read-only", None | Some("on" | "true" | "yes")) => spec.read_only = true,
        ("read-only", Some("off" | "false" | "no")) => spec.read_only = false,
        ("read-only", Some(other)) => {
            return Err(format!("read-only is on or off, not '{other}'"));
        }
        ("durability", Some(name)) => spec.set_durability(name)?,
        ("cache", Some(name)) => spec.set_cache(name)?,
        ("reconnect", Some(time)) => spec.set_patience(key, parse_duration(time)?)?,
        ("tls-creds", Some(dir)) if !dir.is_empty() => {
            spec.set_tls_creds(key, value.unwrap_or_default().into())?;
        }
        (
            "format" | "granularity" | "state" | "durability" | "cache" | "reconnect" | "tls-creds",
            _,
        ) => {
            return Err(format!("'{key}' needs a value"));
        }
        _ => {
            return Err(format!(
                "unknown key '{key}': the keys are format, granularity, state, durability, cache, \
                 read-only, and for the exports of other servers reconnect, tls-creds"
            ));
        }
    }
    Ok(())
}

/// Splits at single commas; a doubled one stands for itself.
fn split_at_commas(text: &[u8]) -> Vec<OsString> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts.into_iter().map(OsString::from_vec).collect()
}

fn split_key(part: &OsStr) -> (String, Option<OsString>) {
    let bytes = part.as_bytes();
    let at = bytes.iter().position(|&byte| byte == b'=');
    let key = &bytes[..at.unwrap_or(bytes.len())];
    let value = at.map(|at| OsStr::from_bytes(&bytes[at + 1..]).to_owned());
    (String::from_utf8_lossy(key).into_owned(), value)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::served::Format;

    fn parse(text: &str) -> Result<DiskSpec, String> {
        super::parse(OsStr::new(text))
    }

    #[test]
    fn a_path_may_have_commas_and_equals_signs() {
        let spec = parse("vda=/a,,b=c,,,granularity=4k,state=/s,,t").unwrap();
        assert_eq!(spec.name.as_str(), "vda");
        assert_eq!(spec.path, Path::new("/a,b=c,"));
        assert_eq!(spec.granularity.map(Granularity::bytes), Some(4096));
        assert_eq!(spec.state.as_deref(), Some(Path::new("/s,t")));
        assert!(spec.format.is_none() && !spec.read_only);
    }

    #[test]
    fn an_export_of_another_server_is_named_by_its_uri() {
        let spec = parse("vda=nbds://h/x,,y,tls-creds=/c,reconnect=5s").unwrap();
        let remote = spec.remote.unwrap();
        assert_eq!(remote.uri.export, "x,y");
        assert_eq!(remote.tls_creds.as_deref(), Some(Path::new("/c")));
        assert_eq!(remote.patience, Duration::from_secs(5));
        assert!(parse("vda=/nbd://h/x").unwrap().remote.is_none());
    }

    #[test]
    fn read_only_has_the_spellings_that_people_know() {
        for on in ["read-only", "readonly", "read-only=on", "readonly=on"] {
            let spec = parse(&format!("a=/a,format=raw,{on}")).unwrap();
            assert!(spec.format == Some(Format::Raw) && spec.read_only, "{on}");
        }
        assert!(!parse("a=/a,readonly=off").unwrap().read_only);
    }

    #[test]
    fn refusals_say_what_there_is_instead() {
        for (text, expected) in [
            ("/a", "NAME=PATH"),
            ("=/a", "1 to 64"),
            ("a/b=/a", "A-Z"),
            ("a=", "no path"),
            ("a=,format=raw", "no path"),
            ("a=/a,format=vmdk", "only raw and qcow2"),
            ("a=/a,format", "needs a value"),
            ("a=/a,state=", "needs a value"),
            (
                "a=/a,size=1",
                "the keys are format, granularity, state, durability, cache, read-only",
            ),
            ("a=/a,", "the keys are"),
            ("a=/a,granularity=3k", "3072"),
            ("a=/a,granularity=x", "size"),
            ("a=/a,durability=some", "power, process or none"),
            ("a=/a,durability", "needs a value"),
            ("a=/a,cache=writethrough", "writeback or none"),
            ("a=/a,cache", "needs a value"),
            ("a=nbd://h/x,cache=none", "that server's"),
            ("a=nbd://h/x,reconnect=0s", "from 1ms"),
            ("a=/a,reconnect=1s", "other servers"),
            ("a=nbd+unix:///x", "names no socket"),
            ("a=/a,readonly,read-only", "twice"),
            ("a=/a,readonly=maybe", "on or off"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
