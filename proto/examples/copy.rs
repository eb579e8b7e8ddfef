//! Copies an export into a file: all of it, or with a dirty bitmap only what has changed, so that
//! the copy of a checkpoint becomes that of now. A new file stays sparse where the export is.
//!
//! ```text
//! copy SOCKET EXPORT FILE [CONTEXT]
//! copy backup.sock vda@b1 vda.raw qemu:dirty-bitmap:cp1
//! ```

use std::error::Error;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stillpoint_proto::DIRTY;
use stillpoint_proto::client::{Client, Haggling, Piece};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

/// How long a read is, and how many of them are under way.
const READ: u64 = 1 << 20;
const READS: usize = 16;

type Anything = Box<dyn Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Anything> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (socket, export, file, context) = match &args[..] {
        [socket, export, file] => (socket, export, file, None),
        [socket, export, file, context] => (socket, export, file, Some(&context[..])),
        _ => return Err("usage: copy SOCKET EXPORT FILE [CONTEXT]".into()),
    };

    let stream = UnixStream::connect(socket).await?;
    let haggling = Haggling::begin(stream).await?;
    let (client, connection) = haggling.enter(export, context.as_slice()).await?;
    let carrying = tokio::spawn(connection);

    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(file)?;
    file.set_len(client.info().size)?;
    let copied = copy(&client, &Arc::new(file), context).await?;
    client.disconnect().await?;
    carrying.await??;
    println!("{copied} bytes");
    Ok(())
}

/// Copies a stretch of the map at a time, so that no more than that is remembered.
async fn copy(client: &Client, file: &Arc<File>, context: Option<&str>) -> Result<u64, Anything> {
    let whole = 0..client.info().size;
    let Some(context) = context else {
        return copy_runs(client, file, vec![whole]).await;
    };
    let context = client.context(context)?;
    let (mut map, mut copied) = (client.map(whole), 0);
    while let Some(status) = map.next().await? {
        let (mut offset, mut dirty) = (status.range.start, Vec::new());
        for extent in status.extents(context).unwrap_or_default() {
            let run = offset..offset + extent.length;
            offset = run.end;
            if extent.flags & u64::from(DIRTY) != 0 {
                dirty.push(run);
            }
        }
        copied += copy_runs(client, file, dirty).await?;
    }
    Ok(copied)
}

async fn copy_runs(
    client: &Client,
    file: &Arc<File>,
    runs: Vec<Range<u64>>,
) -> Result<u64, Anything> {
    let mut reads = JoinSet::new();
    let mut copied = 0;
    for run in runs {
        copied += run.end - run.start;
        for start in (run.start..run.end).step_by(READ as usize) {
            if reads.len() == READS {
                // An error of a read is an error of the copy.
                reads.join_next().await.expect("there are reads")??;
            }
            let range = start..run.end.min(start + READ);
            reads.spawn(copy_range(client.clone(), Arc::clone(file), range));
        }
    }
    while let Some(read) = reads.join_next().await {
        read??;
    }
    Ok(copied)
}

async fn copy_range(client: Client, file: Arc<File>, range: Range<u64>) -> Result<(), Anything> {
    for piece in client.read_pieces(range).await? {
        match piece {
            Piece::Data { offset, data } => file.write_all_at(&data, offset)?,
            Piece::Hole { offset, length } => clear(&file, offset, length)?,
        }
    }
    Ok(())
}

/// Zeroes a range, unless it is zero.
fn clear(file: &File, offset: u64, length: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; length.min(READ) as usize];
    let mut at = offset;
    while at < offset + length {
        let size = (offset + length - at).min(READ) as usize;
        file.read_exact_at(&mut buffer[..size], at)?;
        if buffer[..size].iter().any(|byte| *byte != 0) {
            buffer[..size].fill(0);
            file.write_all_at(&buffer[..size], at)?;
        }
        at += size as u64;
    }
    Ok(())
}
