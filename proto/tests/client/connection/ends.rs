//! How connections end, and what everyone who waits is told.

use super::server::{contents, entered, is_silent};
use crate::proto::Errno;
use crate::proto::client::{Client, Error, ServerViolation};
use crate::wire::*;

#[tokio::test]
async fn a_server_that_closes_in_the_middle_fails_everything_that_is_under_way() {
    // In the middle of a header, of data, between chunks.
    let asked_first = 1;
    for sent in [
        vec![],
        chunk_header(asked_first, 0, OFFSET_DATA, 8 + 4096),
        data(asked_first, 0, 0, &[7; 2048]),
        data(asked_first, DONE, 0, &[7; 4096])[..4000].to_vec(),
    ] {
        let (client, carrying, mut server) = entered(&[]).await;
        let reads = [read(&client, 0), read(&client, 4096)];
        assert_eq!(server.request().await.cookie, asked_first);
        server.request().await;
        server.send(&sent).await;
        drop(server);
        for read in reads {
            assert!(matches!(
                read.await.unwrap(),
                Err(Error::Closed | Error::Io(_))
            ));
        }
        assert!(matches!(
            carrying.await.unwrap(),
            Err(Error::Closed | Error::Io(_))
        ));
        assert!(matches!(
            client.flush().await,
            Err(Error::Closed | Error::Io(_))
        ));
    }
}

#[tokio::test]
async fn a_violation_fails_everything_and_names_itself() {
    let (client, carrying, mut server) = entered(&[]).await;
    let reads = [read(&client, 0), read(&client, 4096)];
    let (first, second) = (server.request().await, server.request().await);
    server.send(&data(first.cookie, DONE, 0, &[7; 4095])).await;
    server.answer_read(&second).await;
    for read in reads {
        assert!(matches!(
            read.await.unwrap(),
            Err(Error::Violation(ServerViolation::MissingData(1)))
        ));
    }
    assert!(matches!(carrying.await.unwrap(), Err(Error::Violation(_))));
    assert!(matches!(client.read(0..1).await, Err(Error::Violation(_))));
    assert!(matches!(
        client.disconnect().await,
        Err(Error::Violation(_))
    ));
}

#[tokio::test]
async fn an_error_fails_one_request_and_no_other() {
    let (client, _carrying, mut server) = entered(&[]).await;
    let reads = [read(&client, 0), read(&client, 4096)];
    let (first, second) = (server.request().await, server.request().await);
    server
        .send(&error(first.cookie, DONE, 5, "bad sector"))
        .await;
    server.answer_read(&second).await;
    let [first, second] = reads;
    let Err(Error::Failed(failure)) = first.await.unwrap() else {
        panic!("no failure");
    };
    assert_eq!(
        (failure.errno, &failure.text[..]),
        (Errno::Io, "bad sector")
    );
    assert_eq!(second.await.unwrap().unwrap(), contents(4096, 4096));
}

#[tokio::test]
async fn goodbye_is_said_when_everything_has_been_answered() {
    let (client, carrying, mut server) = entered(&[]).await;
    let under_way = read(&client, 0);
    let asked = server.request().await;
    let other = client.clone();
    let goodbye = tokio::spawn(client.disconnect());
    assert!(is_silent(&mut server).await);
    server.answer_read(&asked).await;
    assert_eq!(under_way.await.unwrap().unwrap(), contents(0, 4096));
    assert_eq!(server.request().await.kind, 2);
    assert!(server.rest().await.is_empty());
    goodbye.await.unwrap().unwrap();
    carrying.await.unwrap().unwrap();
    assert!(matches!(other.read(0..1).await, Err(Error::Ended)));
}

#[tokio::test]
async fn a_server_that_is_shutting_down_is_told_goodbye() {
    let (client, carrying, mut server) = entered(&[]).await;
    let reads = [read(&client, 0), read(&client, 4096)];
    let (first, second) = (server.request().await, server.request().await);
    server.send(&error(first.cookie, DONE, 108, "")).await;
    server.answer_read(&second).await;
    let [first, second] = reads;
    assert!(matches!(first.await.unwrap(), Err(Error::Failed(_))));
    assert!(second.await.unwrap().is_ok());
    assert!(matches!(client.flush().await, Err(Error::Leaving)));
    assert_eq!(server.request().await.kind, 2);
    drop(server);
    carrying.await.unwrap().unwrap();
}

#[tokio::test]
async fn nobody_waits_for_a_connection_that_was_dropped() {
    let (client, carrying, mut server) = entered(&[]).await;
    let under_way = read(&client, 0);
    server.request().await;
    carrying.abort();
    assert!(matches!(under_way.await.unwrap(), Err(Error::Ended)));
    assert!(matches!(client.read(0..1).await, Err(Error::Ended)));
}

fn read(client: &Client, start: u64) -> tokio::task::JoinHandle<Result<bytes::Bytes, Error>> {
    let client = client.clone();
    tokio::spawn(async move { client.read(start..start + 4096).await })
}
