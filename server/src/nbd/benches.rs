//! A block status without a client, for measuring.

use std::cell::Cell;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bitmap::Granularity;
use block::Engine;
use bytes::{Bytes, BytesMut};
use proto::{Command, ContextId, Cookie, Headers, Origin, Replies};
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use super::output::Reply;
use super::perform::Target;
use crate::disk::{Durability, OnTrackingError};
use crate::export::{self, Role};
use crate::names::Name;
use crate::served::{Cache, DiskSpec, ServedDisk};
use crate::service::{BeginRequest, Reserve, ScratchOptions, Service};

/// A frozen disk. In every other chunk, something takes space and has changed since a checkpoint.
pub struct FragmentedDisk {
    target: Target,
    _service: Arc<Service>,
}

impl FragmentedDisk {
    /// Such a disk of `chunks` chunks, in `folder`, whose client speaks in this form.
    pub async fn create(folder: &Path, chunks: u64, headers: Headers) -> Self {
        let service = serve(folder, chunks).await;
        let name = |text| Name::parse(text).expect("letters are a name");
        let created = service.create_checkpoint(name("cp"), None).await;
        created.expect("there is no other");
        let disk = Arc::clone(&service.disks()["vda"].disk);
        for chunk in (1..chunks).step_by(2) {
            let written = disk.write(chunk * CHUNK, Bytes::from_static(&[7; WRITTEN as usize]));
            written.await.expect("the image can be written");
        }
        // Or the answers would take another time once the file system has done so by itself.
        disk.flush().await.expect("the image can be synced");
        let request = BeginRequest {
            id: Some(name("b")),
            since: Some("cp".to_owned()),
            ..BeginRequest::default()
        };
        let begun = service.begin_backup(request).await;
        begun.expect("there is room for a backup");
        Self {
            target: target(&service, headers),
            _service: service,
        }
    }

    /// Appends to `reply` what all contexts that it lists say of the whole disk.
    pub async fn block_status(&self, reply: BytesMut) -> BytesMut {
        let origin = Origin {
            cookie: Cookie(1),
            offset: 0,
        };
        let command = Command::BlockStatus {
            range: 0..self.target.export.size(),
            contexts: self.target.contexts.iter().map(|(id, _)| *id).collect(),
            one: false,
        };
        let reply = Reply::new(reply);
        self.target.perform(origin, command, reply).await.into_one()
    }
}

async fn serve(folder: &Path, chunks: u64) -> Arc<Service> {
    let path = folder.join("vda.raw");
    let image = File::create(&path).expect("the folder can be written");
    image.set_len(chunks * CHUNK).expect("holes take no space");
    let spec = DiskSpec {
        name: Name::parse("vda").expect("letters are a name"),
        path,
        remote: None,
        format: None,
        allow_backing: Vec::new(),
        granularity: None,
        state: None,
        read_only: false,
        // What is measured does not depend on it, and each write is the first in its region.
        durability: Durability::None,
        cache: Cache::default(),
    };
    let opened = ServedDisk::open(
        &spec,
        None,
        (OnTrackingError::default(), Engine::Threads),
        None,
    )
    .await;
    let Ok(opened) = opened else {
        panic!("a new image can be served");
    };
    let (clock, patience) = (OffsetDateTime::now_utc, Duration::from_secs(1));
    // How full the file system is decides nothing here.
    let scratch = ScratchOptions {
        reserve: Reserve::Bytes(0),
        ..ScratchOptions::default()
    };
    let service = Service::new(vec![opened], patience, clock, scratch);
    let service = service.expect("there is nothing to restore");
    service.settle().await.expect("the journal can be written");
    service
}

fn target(service: &Service, headers: Headers) -> Target {
    let export = export::find(service, Role::Backup, "vda@b").expect("it has just begun");
    let names = export.contexts(service);
    let contexts = names.iter().zip(1..).map(|(name, id)| {
        let context = export.context(service, name).expect("it is listed");
        (ContextId(id), context)
    });
    Target {
        peer: String::new(),
        name: String::new(),
        contexts: contexts.collect(),
        export,
        replies: Replies::new(headers),
        leaving: Cell::new(false),
        asking: Semaphore::new(1),
    }
}

/// How much of each is written, in bytes.
pub const WRITTEN: u64 = 4096;

const CHUNK: u64 = Granularity::DEFAULT.bytes();
