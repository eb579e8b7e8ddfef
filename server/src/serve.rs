//! A server from start to stop.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::LocalSet;

use crate::address::Address;
use crate::control::{Control, converse};
use crate::failure::Failure;
use crate::served::{DiskSpec, ServedDisk};
use crate::service::Service;

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The disks; at least one.
    pub disks: Vec<DiskSpec>,
    /// Where the sockets are.
    pub run_dir: PathBuf,
    /// Where scratch goes, if not beside each disk's state.
    pub scratch_dir: Option<PathBuf>,
    /// More places where live exports are offered.
    pub live_listen: Vec<Address>,
    /// More places where frozen exports are offered.
    pub backup_listen: Vec<Address>,
    /// Who may connect to the Unix sockets.
    pub socket_mode: u32,
    /// The group that the Unix sockets belong to.
    pub socket_group: Option<String>,
    /// Data may go over networks unencrypted.
    pub allow_plaintext: bool,
    /// How long a freeze waits for writes in flight.
    pub freeze_timeout: Duration,
}

/// Serves until told to stop over the control socket.
pub fn run(options: ServeOptions) -> Result<(), Failure> {
    #[expect(clippy::needless_pass_by_value, reason = "a function for map_err")]
    fn system(error: std::io::Error) -> Failure {
        Failure::new("system", error.to_string())
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let serve = async {
        std::fs::create_dir_all(&options.run_dir).map_err(system)?;
        let mut disks = Vec::new();
        for spec in options.disks.clone() {
            disks.push(ServedDisk::open(spec, options.scratch_dir.as_deref())?);
        }
        let path = options.run_dir.join("control.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(system)?;
        let own = |name: &str| Address::Unix(options.run_dir.join(name));
        let (stop, mut stopping) = watch::channel(false);
        let control = Rc::new(Control {
            service: Arc::new(Service::new(disks, options.freeze_timeout)),
            live_addresses: [vec![own("live.sock")], options.live_listen.clone()].concat(),
            backup_addresses: [vec![own("backup.sock")], options.backup_listen.clone()].concat(),
            run_dir: options.run_dir.clone(),
            stop,
        });
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.map_err(system)?;
                    tokio::task::spawn_local(converse(stream, Rc::clone(&control)));
                }
                _ = stopping.wait_for(|stop| *stop) => return Ok(()),
            }
        }
    };
    LocalSet::new().block_on(&runtime.map_err(system)?, serve)
}
