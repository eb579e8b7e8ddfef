//! Futures that are dropped, and what is kept for servers that are slow.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use super::server::{contents, entered, is_silent};
use crate::proto::client::{BYTES_MAX, Durability, REQUESTS_MAX};

#[tokio::test]
async fn a_dropped_request_leaves_the_connection_in_step() {
    let (client, _carrying, mut server) = entered(&[]).await;
    let other = client.clone();
    let read = tokio::spawn(async move { other.read(0..4096).await });
    let abandoned = server.request().await;
    read.abort();
    assert!(read.await.unwrap_err().is_cancelled());

    let serve = async {
        let asked = server.request().await;
        server.answer_read(&abandoned).await;
        server.answer_read(&asked).await;
    };
    let ((), bytes) = tokio::join!(serve, client.read(8192..12_288));
    assert_eq!(bytes.unwrap(), contents(8192, 4096));
}

#[tokio::test]
async fn a_request_dropped_before_it_was_sent_is_never_sent() {
    let (client, _carrying, mut server) = entered(&[]).await;
    {
        // Polled once, while the task that carries it has no turn.
        let bytes = Bytes::from_static(b"hello");
        let write = pin!(client.write(0, bytes, Durability::Later));
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(write.poll(&mut context), Poll::Pending));
    }
    assert!(is_silent(&mut server).await);
}

#[tokio::test]
async fn no_more_requests_are_sent_than_the_limit_until_one_is_answered() {
    let (client, _carrying, mut server) = entered(&[]).await;
    let flushes: Vec<_> = (0..=REQUESTS_MAX)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.flush().await })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..REQUESTS_MAX {
        asked.push(server.request().await);
    }
    assert!(is_silent(&mut server).await);
    server.done(&asked.pop().unwrap()).await;
    asked.push(server.request().await);
    for asked in asked {
        server.done(&asked).await;
    }
    for flush in flushes {
        flush.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn no_more_bytes_are_asked_for_than_the_limit_until_some_have_come() {
    const READ: u64 = 16 << 20;
    let (client, _carrying, mut server) = entered(&[]).await;
    let fit = BYTES_MAX as u64 / READ;
    let reads: Vec<_> = (0..=fit)
        .map(|index| {
            let client = client.clone();
            let range = index * READ..(index + 1) * READ;
            tokio::spawn(async move { client.read(range).await.map(|bytes| bytes.len()) })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..fit {
        asked.push(server.request().await);
    }
    assert!(is_silent(&mut server).await);
    server.answer_read(&asked.remove(0)).await;
    asked.push(server.request().await);
    for asked in asked {
        server.answer_read(&asked).await;
    }
    for read in reads {
        assert_eq!(read.await.unwrap().unwrap() as u64, READ);
    }
}

#[tokio::test]
async fn a_server_that_does_not_listen_still_gets_its_answers_heard() {
    // More than the stream between them holds, so that the write is stuck.
    let (client, _carrying, mut server) = entered(&[]).await;
    let other = client.clone();
    let read = tokio::spawn(async move { other.read(0..4096).await });
    let asked = server.request().await;
    let bytes = Bytes::from(vec![7; 1 << 20]);
    let write = tokio::spawn(async move { client.write(0, bytes, Durability::Later).await });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    server.answer_read(&asked).await;
    assert_eq!(read.await.unwrap().unwrap(), contents(0, 4096));
    let asked = server.request().await;
    server.done(&asked).await;
    write.await.unwrap().unwrap();
}
