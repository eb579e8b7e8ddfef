//! Prints what one metadata context says about an export: without a dirty bitmap what is
//! allocated, with one what has changed.
//!
//! ```text
//! map SOCKET EXPORT [CONTEXT]
//! map backup.sock vda@b1 qemu:dirty-bitmap:cp1
//! ```

use std::error::Error;

use stillpoint_proto::client::{Client, Haggling};
use tokio::net::UnixStream;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (socket, export, context) = match &args[..] {
        [socket, export] => (socket, export, "base:allocation"),
        [socket, export, context] => (socket, export, &context[..]),
        _ => return Err("usage: map SOCKET EXPORT [CONTEXT]".into()),
    };

    let stream = UnixStream::connect(socket).await?;
    let haggling = Haggling::begin(stream).await?;
    let (client, connection) = haggling.enter(export, &[context]).await?;
    let carrying = tokio::spawn(connection);
    print(&client, context).await?;
    client.disconnect().await?;
    Ok(carrying.await??)
}

async fn print(client: &Client, context: &str) -> Result<(), Box<dyn Error>> {
    let context = client.context(context)?;
    let mut map = client.map(0..client.info().size);
    while let Some(status) = map.next().await? {
        let mut offset = status.range.start;
        for extent in status.extents(context).unwrap_or_default() {
            println!("{offset:>16} {:>16} {}", extent.length, extent.flags);
            offset += extent.length;
        }
    }
    Ok(())
}
