//! A client on a server's socket.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use proto::Headers;
use stillpoint_tests::Extent;
use stillpoint_tests::tools::merged;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::client::{Client, Error, Haggling};

/// Enters an export, does something, and says goodbye; all of which has to succeed.
#[track_caller]
pub(crate) fn with_client<T>(
    socket: &Path,
    (export, contexts): (&str, &[&str]),
    then: impl AsyncFnOnce(&Client) -> T,
) -> T {
    with_client_at_most(Headers::Extended, socket, (export, contexts), then)
}

/// The same with no newer form of messages than this.
#[track_caller]
pub(crate) fn with_client_at_most<T>(
    headers: Headers,
    socket: &Path,
    (export, contexts): (&str, &[&str]),
    then: impl AsyncFnOnce(&Client) -> T,
) -> T {
    run(async {
        let haggling = begin(socket).await.expect("a server").at_most(headers);
        let (client, connection) = haggling.enter(export, contexts).await.expect("an export");
        let carrying = tokio::spawn(connection);
        let result = then(&client).await;
        client.disconnect().await.expect("a goodbye");
        carrying.await.expect("no panic").expect("a good end");
        result
    })
}

/// The greeting of whoever listens on a socket.
pub(crate) async fn begin(socket: &Path) -> Result<Haggling<UnixStream>, Error> {
    Haggling::begin(UnixStream::connect(socket).await?).await
}

/// Runs something that must not take for ever.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    runtime().block_on(async {
        let patience = Duration::from_secs(100);
        let outcome = tokio::time::timeout(patience, future).await;
        outcome.expect("an end within 100 s")
    })
}

fn runtime() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
}

/// The map of a whole export, neighbours merged.
pub(crate) async fn map(client: &Client, context: &str) -> Vec<Extent> {
    let context = client.context(context).expect("it was selected");
    let mut map = client.map(0..client.info().size);
    let mut extents: Vec<Extent> = Vec::new();
    while let Some(status) = map.next().await.expect("a map") {
        let mut offset = status.range.start;
        for extent in status.extents(context).expect("it was asked for") {
            extents.push((offset, extent.length, extent.flags as u32));
            offset += extent.length;
        }
    }
    merged(extents)
}

/// All of an export.
pub(crate) async fn read_all(client: &Client) -> Bytes {
    client.read(0..client.info().size).await.expect("a read")
}
