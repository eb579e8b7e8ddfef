//! Where a server's sockets are, by one rule for the server and for its clients.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::problem::Problem;

/// The run directory; `wanted` is what the command line says.
pub(super) fn find(wanted: Option<PathBuf>) -> Result<PathBuf, Problem> {
    let surroundings = Surroundings {
        variable: std::env::var_os("STILLPOINT_RUN_DIR"),
        runtime_dir: std::env::var_os("XDG_RUNTIME_DIR"),
        is_root: rustix::process::geteuid().is_root(),
    };
    let found = choose(wanted, surroundings)?;
    // URIs name sockets for programs that run elsewhere.
    std::path::absolute(&found).map_err(|error| {
        let message = format!("the run directory '{}': {error}", found.display());
        Problem::new("no-run-dir", message)
    })
}

struct Surroundings {
    variable: Option<OsString>,
    runtime_dir: Option<OsString>,
    is_root: bool,
}

fn choose(wanted: Option<PathBuf>, surroundings: Surroundings) -> Result<PathBuf, Problem> {
    let given = |text: &OsString| !text.is_empty();
    if let Some(wanted) = wanted {
        return Ok(wanted);
    }
    if let Some(variable) = surroundings.variable.filter(given) {
        return Ok(variable.into());
    }
    if surroundings.is_root {
        return Ok("/run/stillpoint".into());
    }
    if let Some(runtime_dir) = surroundings.runtime_dir.filter(given) {
        return Ok(Path::new(&runtime_dir).join("stillpoint"));
    }
    let message = "no run directory: neither STILLPOINT_RUN_DIR nor XDG_RUNTIME_DIR is set";
    Err(Problem::new("no-run-dir", message).hint("add --run-dir DIR"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Surroundings {
        Surroundings {
            variable: None,
            runtime_dir: None,
            is_root: false,
        }
    }

    #[test]
    fn what_is_said_most_plainly_counts_first() {
        let all = || Surroundings {
            variable: Some("/v".into()),
            runtime_dir: Some("/x".into()),
            is_root: true,
        };
        let found = |wanted, surroundings| choose(wanted, surroundings).unwrap();
        assert_eq!(found(Some("/w".into()), all()), Path::new("/w"));
        assert_eq!(found(None, all()), Path::new("/v"));
        let mut less = all();
        less.variable = Some("".into());
        assert_eq!(found(None, less), Path::new("/run/stillpoint"));
        let user = Surroundings {
            runtime_dir: Some("/x".into()),
            ..nothing()
        };
        assert_eq!(found(None, user), Path::new("/x/stillpoint"));
        assert_eq!(choose(None, nothing()).unwrap_err().code(), "no-run-dir");
    }
}
