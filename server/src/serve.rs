//! A server from start to stop.

mod disks;
mod signals;

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use crate::address::Address;
use crate::control::{Control, converse, turn_away};
use crate::disk::OnTrackingError;
use crate::export::Role;
use crate::failure::Failure;
use crate::handed_over;
use crate::hooks::wall_clock;
use crate::io_engine::IoEngine;
use crate::limits::Limits;
use crate::listen;
use crate::listeners::{self, Door, Listener, Listeners};
use crate::lock_file::LockFile;
use crate::nbd::{Client, Entrance, Peer, Stream, Workers};
use crate::notify;
use crate::push::Jobs;
use crate::served::DiskSpec;
use crate::service::{Opening, ScratchOptions, Service};
use crate::tls::{Terms, Tls, TlsOptions};
use signals::{Signals, Wish};

/// How to serve.
#[derive(Clone, Debug)]
pub(crate) struct ServeOptions {
    /// The disks; at least one.
    pub(crate) disks: Vec<DiskSpec>,
    /// Where the sockets are.
    pub(crate) run_dir: PathBuf,
    /// From where else than its own folder an image may have the files that it names.
    pub(crate) allow_backing: Vec<PathBuf>,
    /// Where scratch goes, if not beside each disk's state.
    pub(crate) scratch_dir: Option<PathBuf>,
    /// More places where live exports are offered.
    pub(crate) live_listen: Vec<Address>,
    /// More places where frozen exports are offered.
    pub(crate) backup_listen: Vec<Address>,
    /// Who may connect to the Unix sockets.
    pub(crate) socket_mode: u32,
    /// The group that the Unix sockets belong to.
    pub(crate) socket_group: Option<String>,
    /// TLS, if there is any.
    pub(crate) tls: Option<TlsOptions>,
    /// Data may go over networks unencrypted.
    pub(crate) allow_plaintext: bool,
    /// How long a freeze waits for writes in flight.
    pub(crate) freeze_timeout: Duration,
    /// How much scratch backups may take.
    pub(crate) scratch: ScratchOptions,
    /// What becomes of a write that cannot be tracked.
    pub(crate) on_tracking_error: OnTrackingError,
    /// What does what waits for a device.
    pub(crate) io_engine: IoEngine,
    /// What clients may take.
    pub(crate) limits: Limits,
}

/// Serves until told to stop, by a signal or over the control socket.
pub(crate) fn run(options: ServeOptions) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| cannot("start", &error))?;
    LocalSet::new().block_on(&runtime, serve(options))
}

async fn serve(options: ServeOptions) -> Result<(), Failure> {
    let tls = options.tls.as_ref().map(TlsOptions::read).transpose()?;
    let handed_over = handed_over::take()?;
    listeners::refuse_plaintext(&options, &handed_over, tls.as_ref())?;
    options.limits.check()?;
    allow_descriptors();
    // From here on a signal is a wish, also one that comes before the first client.
    let mut signals = Signals::watch().map_err(|error| cannot("wait for signals", &error))?;
    let _run_dir = claim_run_dir(&options.run_dir)?;
    let engine = options.io_engine.choose()?;
    let opening = Opening {
        scratch_dir: options.scratch_dir.clone(),
        allow_backing: options.allow_backing.clone(),
        on_tracking_error: options.on_tracking_error,
        engine,
    };
    let Some(disks) = disks::open(&options.disks, &opening, &mut signals).await? else {
        return Ok(());
    };
    let service = Service::new(disks, options.freeze_timeout, wall_clock, options.scratch)
        .map_err(|error| cannot("restore backups", &error))?;
    let settled = service.settle().await;
    settled.map_err(|error| cannot("record what was found", &error))?;
    for disk in service.disks().values() {
        service.keep(disk);
    }
    let mut keepers = tokio::task::JoinSet::new();
    keepers.spawn_local(Arc::clone(&service).keep_to_expiry());
    let guarded = Arc::clone(&service);
    keepers.spawn_local(async move { guarded.guard_reserves().await });
    let listeners = Listeners::bind(&options, handed_over, tls.as_ref()).await?;
    let made = listeners.made.clone();
    let (stop, stopping) = watch::channel(false);
    let workers = Workers::start(worker_count(), &service, &stopping)
        .map_err(|error| cannot("start worker threads", &error))?;

    let control = Rc::new(Control {
        service: Arc::clone(&service),
        live_addresses: listeners.endpoints(Role::Live),
        backup_addresses: listeners.endpoints(Role::Backup),
        run_dir: options.run_dir.clone(),
        opening,
        jobs: Rc::new(Jobs::new(
            Arc::clone(&service),
            options.run_dir.to_string_lossy().into_owned(),
        )),
        stop,
    });
    print_table(&control, &listeners.control_path).map_err(|error| cannot("print", &error))?;
    notify::ready();
    let waiting = Arc::default();
    let entrances =
        [Role::Live, Role::Backup].map(|role| Entrance::new(role, &options.limits, &waiting));
    let workers = accept(
        listeners,
        workers,
        entrances,
        &control,
        (stopping, signals),
        tls.as_ref(),
    )
    .await;

    notify::stopping();
    // Nobody finds the server any more from here on; a file that is gone already is as good.
    for path in made {
        let _ = std::fs::remove_file(path);
    }
    // What a job has published it still commits, for which instants must be free.
    control.jobs.rest().await;
    // The workers have been told. What they wait for may be a task of this thread, which goes on meanwhile: a sync
    // that all share, or a gate that is about to reopen.
    if let Err(error) = tokio::task::spawn_blocking(move || workers.join()).await {
        tracing::error!(%error, "workers cannot be waited for");
    }
    keepers.shutdown().await;
    // What a control client has begun may still go on, whether or not that client is there.
    let _at_rest = service.rest().await;
    service.let_all_go().await;
    let mut outcome = Ok(());
    for disk in service.disks().values() {
        if let Err(error) = disk.close().await {
            let message = format!(
                "disk '{}': not everything could be made durable: {error}",
                disk.name
            );
            // The others end in good order all the same.
            if outcome.is_err() {
                tracing::error!("{message}");
            } else {
                outcome = Err(Failure::new("not-durable", message));
            }
        }
    }
    outcome
}

/// Hands every client to where it is served, until the server is to stop.
async fn accept(
    listeners: Listeners,
    mut workers: Workers,
    [live, backup]: [Arc<Entrance>; 2],
    control: &Rc<Control>,
    (mut stopping, mut signals): (watch::Receiver<bool>, Signals),
    tls: Option<&Terms>,
) -> Workers {
    let (queue, mut clients) = mpsc::channel(CLIENTS_WAITING_MAX);
    let mut loops = tokio::task::JoinSet::new();
    for Door {
        listener,
        role,
        tls,
        ..
    } in listeners.doors
    {
        let entrance = Arc::clone(match role {
            Role::Live => &live,
            Role::Backup => &backup,
        });
        loops.spawn_local(accept_data(listener, tls, entrance, queue.clone()));
    }
    let mut conversations = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            Some(client) = clients.recv() => workers.serve(client),
            accepted = listeners.control.accept() => match accepted {
                Ok((stream, _)) if conversations.len() >= CONTROL_CLIENTS_MAX => {
                    turn_away(stream, CONTROL_CLIENTS_MAX);
                }
                Ok((stream, _)) => {
                    conversations.spawn_local(converse(stream, Rc::clone(control)));
                }
                Err(error) => pause_after(&error).await,
            },
            Some(_) = conversations.join_next() => {}
            wish = signals.next() => match wish {
                Wish::ReadAgain => read_again(tls),
                Wish::Stop => break,
            },
            _ = stopping.wait_for(|stop| *stop) => break,
        }
    }
    tracing::info!("stopping");
    loops.shutdown().await;
    // Whoever is being told something on the control socket hears the end of it.
    control.stop.send_replace(true);
    control.service.dismiss_clients();
    while conversations.join_next().await.is_some() {}
    workers
}

/// For the connections to come; those that are there go on as they are.
fn read_again(tls: Option<&Terms>) {
    match tls.map(Terms::read_again) {
        None => tracing::info!("SIGHUP: there is no TLS certificate to read again"),
        Some(Ok(())) => {}
        Some(Err(failure)) => {
            let hint = failure.hint.as_deref().unwrap_or_default();
            tracing::error!(
                hint,
                "SIGHUP: the TLS certificate stays as it was: {failure}"
            );
        }
    }
}

async fn accept_data(
    listener: Listener,
    tls: Tls,
    entrance: Arc<Entrance>,
    queue: mpsc::Sender<Client>,
) {
    loop {
        // The room before the client: who finds none waits outside, and takes no descriptor.
        entrance.handshakes.room().await;
        let accepted = match &listener {
            Listener::Unix(listener) => accept_unix(listener).await,
            Listener::Tcp(listener) => accept_tcp(listener).await,
        };
        match accepted {
            Ok((stream, peer)) => {
                let client = Client {
                    stream,
                    visitor: entrance.enter(peer),
                    tls: tls.clone(),
                };
                if queue.send(client).await.is_err() {
                    return;
                }
            }
            Err(error) => pause_after(&error).await,
        }
    }
}

async fn accept_unix(listener: &UnixListener) -> io::Result<(Stream, Peer)> {
    let (stream, _) = listener.accept().await?;
    let peer = stream
        .peer_cred()
        .map_or(Peer::Unknown, |cred| Peer::Process {
            uid: cred.uid(),
            pid: cred.pid(),
        });
    Ok((Stream::Unix(stream.into_std()?), peer))
}

async fn accept_tcp(listener: &TcpListener) -> io::Result<(Stream, Peer)> {
    let (stream, address) = listener.accept().await?;
    Ok((Stream::Tcp(stream.into_std()?), Peer::Address(address)))
}

/// Without descriptors to accept with, trying again at once would only burn time.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a client");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

fn claim_run_dir(dir: &Path) -> Result<LockFile, Failure> {
    listen::check_length(&dir.join("control.sock"))?;
    make_run_dir(dir).map_err(|error| {
        Failure::new(
            "cannot-write",
            format!("cannot make '{}': {error}", dir.display()),
        )
    })?;
    let path = dir.join("lock");
    let lock = LockFile::take(&path).map_err(|error| {
        Failure::new(
            "cannot-write",
            format!("cannot write '{}': {error}", path.display()),
        )
    })?;
    lock.map_err(|holder| {
        let message = format!(
            "the run directory '{}' is in use by another server{holder}",
            dir.display()
        );
        let hint = "one server per run directory: choose another with --run-dir";
        Failure::new("locked", message).hint(hint)
    })
}

/// The sockets say who may connect, so everyone may look for them, whatever the mask is. A directory
/// that is there already is as its owner wants it.
fn make_run_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(RUN_DIR_MODE))
}

/// What a person needs next: what to paste where.
fn print_table(control: &Control, control_path: &Path) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for disk in control.service.disks().values() {
        let size = disk.disk.size();
        writeln!(
            out,
            "disk {}  {}  {size} bytes",
            disk.name,
            disk.path.display()
        )?;
        for endpoint in &control.live_addresses {
            writeln!(out, "  live     {}", endpoint.uri(disk.name.as_str()))?;
        }
        for endpoint in &control.backup_addresses {
            writeln!(
                out,
                "  backups  {}",
                endpoint.uri(&format!("{}@ID", disk.name))
            )?;
        }
    }
    writeln!(out, "control  {}", control_path.display())?;
    writeln!(out, "ready")?;
    out.flush()
}

/// Takes as many descriptors as the system allows. With fewer, accepting waits until some are free.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "cannot raise the number of open files");
        }
    }
}

fn worker_count() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn cannot(what: &str, error: &io::Error) -> Failure {
    Failure::new("system", format!("cannot {what}: {error}"))
}

const RUN_DIR_MODE: u32 = 0o755;

/// Clients of the control socket: some times what watches a server and works with it. Whoever comes
/// on top is told so at once, since a command that waits outside looks like a server that hangs.
const CONTROL_CLIENTS_MAX: usize = 128;

/// Clients that have been accepted and not yet been given to a worker.
const CLIENTS_WAITING_MAX: usize = 16;

/// Long enough that a full descriptor table does not make a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
