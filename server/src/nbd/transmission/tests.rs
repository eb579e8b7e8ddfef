use std::fs::File;
use std::sync::Arc;

use block::Engine;
use bytes::Bytes;
use proto::{BlockSize, Cookie, ExportInfo, Headers, TransmissionFlags, command};
use tempfile::TempDir;
use tokio::io::{BufWriter, DuplexStream, duplex};

use super::*;
use crate::clients::Clients;
use crate::disk::{Durability, OnTrackingError};
use crate::export::Export;
use crate::names::Name;
use crate::served::{Cache, DiskSpec, ServedDisk};

/// A connection that has entered an export, before anything is asked.
struct Scene {
    connection: Connection,
    clients: Arc<Clients>,
    seat: Seat,
    _folder: TempDir,
}

impl Scene {
    /// In one in which time passes only while everybody waits.
    async fn new(role: Role) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vda.raw");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let spec = DiskSpec {
            name: Name::parse("vda").unwrap(),
            path: image,
            remote: None,
            format: None,
            allow_backing: Vec::new(),
            granularity: None,
            state: None,
            read_only: false,
            durability: Durability::None,
            cache: Cache::default(),
        };
        let terms = (OnTrackingError::default(), Engine::Threads);
        let (disk, _) = ServedDisk::open(&spec, None, terms, None).await.unwrap();
        let session = proto::Session {
            export: Export::Live(Arc::new(disk)),
            info: ExportInfo {
                name: "vda".to_owned(),
                description: None,
                size: SIZE,
                flags: TransmissionFlags::HAS_FLAGS,
                block_size: BlockSize::default(),
            },
            headers: Headers::Simple,
            contexts: Vec::new(),
        };
        let limits = Limits {
            handshake: Duration::MAX,
            connections: 1,
            peer_connections: 1,
            requests: 256,
            request_bytes: 64 << 20,
            buffers: 512 << 20,
            idle: None,
            stall: Duration::from_secs(300),
        };
        let entrance = Entrance::new(role, &limits, &Arc::default());
        let clients = Clients::new();
        let seat = clients.enter(role, "a client".to_owned()).unwrap();
        tokio::time::pause();
        Self {
            connection: Connection::new(session, BytesMut::new(), "a client".to_owned(), &entrance),
            clients,
            seat,
            _folder: folder,
        }
    }

    /// A request that is under way until it is answered here.
    fn pending(&self) -> Pending {
        let connection = &self.connection;
        let (replies, origin) = (connection.target.replies, origin(PENDING));
        Pending::new(&connection.under_way, replies, origin, 0)
    }

    /// Serves whoever has the other end of a pipe that holds little, through a stream that takes in
    /// more than that.
    async fn serve(mut self, pipe: DuplexStream) -> Result<(), Ended> {
        let stream = BufWriter::with_capacity(64 << 10, pipe);
        let line = Line::default();
        self.connection.run((stream, line), &mut self.seat).await
    }
}

fn origin(cookie: u64) -> Origin {
    Origin {
        cookie: Cookie(cookie),
        offset: 0,
    }
}

fn request(kind: u16, offset: u64, length: usize) -> BytesMut {
    let mut message = BytesMut::new();
    let request = Request {
        cookie: Cookie(7),
        kind,
        flags: 0,
        offset,
        length: length as u64,
        data: Bytes::from(vec![7; if kind == command::WRITE { length } else { 0 }]),
    };
    request.encode(Headers::Simple, &mut message);
    message
}

/// Requests that are refused without asking the storage.
fn refused(count: usize) -> Vec<u8> {
    request(command::READ, SIZE, 512).repeat(count)
}

#[tokio::test]
async fn who_has_said_goodbye_takes_its_answers_at_its_own_pace() {
    let scene = Scene::new(Role::Live).await;
    let (mut own, server) = duplex(PIPE);
    let slow = async {
        own.write_all(&refused(2000)).await.unwrap();
        let goodbye = request(command::DISCONNECT, 0, 0);
        own.write_all(&goodbye).await.unwrap();
        let (mut heard, mut piece) = (0, [0; PIPE]);
        loop {
            sleep(Duration::from_secs(1)).await;
            match own.read(&mut piece).await.unwrap() {
                0 => return heard,
                more => heard += more,
            }
        }
    };
    let (outcome, heard) = tokio::join!(scene.serve(server), slow);
    outcome.unwrap();
    assert_eq!(heard, 2000 * REPLY);
}

#[tokio::test]
async fn a_server_that_stops_does_not_wait_for_who_has_said_goodbye() {
    let scene = Scene::new(Role::Live).await;
    let everybody = Arc::clone(&scene.clients);
    let (mut own, server) = duplex(PIPE);
    let deaf = async {
        own.write_all(&refused(2000)).await.unwrap();
        let goodbye = request(command::DISCONNECT, 0, 0);
        own.write_all(&goodbye).await.unwrap();
        sleep(Duration::from_secs(10)).await;
        everybody.dismiss("stopping");
        Instant::now()
    };
    let (outcome, dismissed) = tokio::join!(scene.serve(server), deaf);
    outcome.unwrap();
    assert!(dismissed.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn the_end_of_what_is_ready_does_not_wait_for_what_is_not() {
    let scene = Scene::new(Role::Live).await;
    let pending = scene.pending();
    let (mut own, server) = duplex(PIPE);
    let asks = async {
        own.write_all(&refused(2000)).await.unwrap();
        let mut heard = vec![0; 2000 * REPLY];
        let all = timeout(Duration::from_secs(60), own.read_exact(&mut heard)).await;
        all.expect("the end does not come").unwrap();
        drop(pending);
        own.shutdown().await.unwrap();
        assert_eq!(own.read_to_end(&mut heard).await.unwrap(), REPLY);
    };
    let (outcome, ()) = tokio::join!(scene.serve(server), asks);
    outcome.unwrap();
}

#[tokio::test]
async fn who_reads_a_backup_is_told_to_leave_whatever_it_asks_at_a_stop() {
    let scene = Scene::new(Role::Backup).await;
    let everybody = Arc::clone(&scene.clients);
    let (mut own, server) = duplex(PIPE);
    let asks = async {
        // The first is in the middle of its payload when the server stops.
        let write = request(command::WRITE, 0, 10_000);
        own.write_all(&write[..5000]).await.unwrap();
        everybody.dismiss("stopping");
        is_heard().await;
        own.write_all(&write[5000..]).await.unwrap();
        for next in [
            request(command::READ, 0, 512),
            request(command::WRITE, 0, 2 << 20),
            request(command::FLUSH, 0, 0),
        ] {
            assert_eq!(error_of_reply(&mut own).await, ESHUTDOWN);
            own.write_all(&next).await.unwrap();
        }
        assert_eq!(error_of_reply(&mut own).await, ESHUTDOWN);
        let told = Instant::now();
        let goodbye = request(command::DISCONNECT, 0, 0);
        own.write_all(&goodbye).await.unwrap();
        assert_eq!(own.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(
            told.elapsed(),
            Duration::ZERO,
            "who leaves is not waited for"
        );
    };
    let (outcome, ()) = tokio::join!(scene.serve(server), asks);
    outcome.unwrap();
}

#[tokio::test]
async fn a_guest_is_not_answered_what_is_not_performed_at_a_stop() {
    let scene = Scene::new(Role::Live).await;
    let everybody = Arc::clone(&scene.clients);
    let pending = scene.pending();
    let (mut own, server) = duplex(PIPE);
    let asks = async {
        own.write_all(&refused(1)).await.unwrap();
        assert_eq!(error_of_reply(&mut own).await, EINVAL);
        everybody.dismiss("stopping");
        is_heard().await;
        own.write_all(&refused(1)).await.unwrap();
        pending.answer(Reply::new(BytesMut::from(&b"done"[..])));
        let mut heard = Vec::new();
        own.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"done");
    };
    let (outcome, ()) = tokio::join!(scene.serve(server), asks);
    outcome.unwrap();
}

#[tokio::test]
async fn whoever_waits_at_a_stop_for_what_is_under_way_is_answered() {
    for role in [Role::Live, Role::Backup] {
        let scene = Scene::new(role).await;
        let everybody = Arc::clone(&scene.clients);
        let pending = scene.pending();
        let (mut own, server) = duplex(PIPE);
        let waits = async {
            everybody.dismiss("stopping");
            sleep(Duration::from_secs(10)).await;
            let ended = Instant::now();
            pending.answer(Reply::new(BytesMut::from(&b"done"[..])));
            let mut heard = Vec::new();
            own.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"done", "{role:?}");
            ended
        };
        let (outcome, ended) = tokio::join!(scene.serve(server), waits);
        outcome.unwrap();
        assert!(ended.elapsed() < Duration::from_secs(1), "{role:?}");
        tokio::time::resume();
    }
}

/// Returns when the server waits for something again: only then does time pass.
async fn is_heard() {
    sleep(Duration::from_millis(1)).await;
}

async fn error_of_reply(stream: &mut DuplexStream) -> u32 {
    let mut reply = [0; REPLY];
    stream.read_exact(&mut reply).await.unwrap();
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

const SIZE: u64 = 1 << 20;

const EINVAL: u32 = 22;

const ESHUTDOWN: u32 = 108;

/// What the way to a client holds.
const PIPE: usize = 1 << 10;

/// A simple reply without data.
const REPLY: usize = 16;

const PENDING: u64 = 99;
