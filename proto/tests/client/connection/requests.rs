//! Requests, many at once.

use bytes::Bytes;

use super::server::{SIZE, contents, entered, entered_with, is_silent};
use crate::proto::Errno;
use crate::proto::client::{Durability, Error, Piece, Zeroing};
use crate::wire::*;

#[tokio::test]
async fn many_requests_are_under_way_at_once_and_answered_in_any_order() {
    let (client, carrying, mut server) = entered(&[]).await;
    let reads: Vec<_> = (0..20)
        .map(|index| {
            let client = client.clone();
            tokio::spawn(async move {
                let start = index * 4096;
                (start, client.read(start..start + 4096).await)
            })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..reads.len() {
        asked.push(server.request().await);
    }
    for asked in asked.iter().rev() {
        server.answer_read(asked).await;
    }
    for read in reads {
        let (start, bytes) = read.await.unwrap();
        assert_eq!(bytes.unwrap(), contents(start, 4096));
    }
    drop(client);
    assert_eq!(server.request().await.kind, 2);
    drop(server);
    carrying.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_long_read_is_cut_into_what_the_server_takes() {
    let (client, _carrying, mut server) = entered_with(&[], [512, 4096, 10_000]).await;
    let serve = async {
        let mut ranges = Vec::new();
        for _ in 0..3 {
            let asked = server.request().await;
            ranges.push((asked.offset, asked.length));
            server.answer_read(&asked).await;
        }
        ranges
    };
    let (ranges, bytes) = tokio::join!(serve, client.read(1024..1024 + 20_480));
    // Whole blocks, though the maximum is none.
    assert_eq!(ranges, [(1024, 9728), (10_752, 9728), (20_480, 1024)]);
    assert_eq!(bytes.unwrap(), contents(1024, 20_480));
}

#[tokio::test]
async fn a_long_write_is_cut_as_well_and_fails_if_a_part_does() {
    let (client, _carrying, mut server) = entered_with(&[], [1, 512, 1000]).await;
    let bytes = contents(0, 2500);
    let serve = async {
        let mut written: Vec<u8> = Vec::new();
        for part in 0..3 {
            let asked = server.request().await;
            written.extend(&asked.payload);
            if part == 1 {
                server.send(&error(asked.cookie, DONE, 28, "full")).await;
            } else {
                server.done(&asked).await;
            }
        }
        written
    };
    let write = client.write(0, Bytes::from(bytes.clone()), Durability::Later);
    let (written, result) = tokio::join!(serve, write);
    assert_eq!(written, bytes);
    let Err(Error::Failed(failure)) = result else {
        panic!("{result:?}");
    };
    assert_eq!(failure.errno, Errno::NoSpc);
}

#[tokio::test]
async fn a_write_of_which_a_part_fails_has_not_ended_before_every_part_has() {
    let (client, _carrying, mut server) = entered_with(&[], [1, 512, 1000]).await;
    let bytes = Bytes::from(contents(0, 2500));
    let write = tokio::spawn(async move { client.write(0, bytes, Durability::Later).await });
    let mut asked = Vec::new();
    for _ in 0..3 {
        asked.push(server.request().await);
    }
    server.send(&error(asked[0].cookie, DONE, 5, "")).await;
    server.done(&asked[1]).await;
    assert!(is_silent(&mut server).await);
    assert!(!write.is_finished(), "the last part may still be done");
    server.done(&asked[2]).await;
    assert!(matches!(write.await.unwrap(), Err(Error::Failed(_))));
}

#[tokio::test]
async fn a_part_without_an_answer_says_more_than_one_that_failed() {
    let (client, _carrying, mut server) = entered_with(&[], [1, 512, 1000]).await;
    let bytes = Bytes::from(contents(0, 2000));
    let write = tokio::spawn(async move { client.write(0, bytes, Durability::Later).await });
    let asked = server.request().await;
    server.request().await;
    server.send(&error(asked.cookie, DONE, 5, "")).await;
    drop(server);
    let outcome = write.await.unwrap();
    assert!(matches!(outcome, Err(Error::Closed)), "{outcome:?}");
}

#[tokio::test]
async fn a_hole_is_a_hole() {
    let (client, _carrying, mut server) = entered(&[]).await;
    let serve = async {
        let asked = server.request().await;
        server.send(&hole(asked.cookie, DONE, 0, 32 << 20)).await;
    };
    let ((), pieces) = tokio::join!(serve, client.read_pieces(0..32 << 20));
    let expected = [Piece::Hole {
        offset: 0,
        length: 32 << 20,
    }];
    assert_eq!(pieces.unwrap(), expected);
}

#[tokio::test]
async fn a_map_is_asked_for_until_its_end() {
    let (client, _carrying, mut server) = entered(&["base:allocation", "qemu:a"]).await;
    let serve = async {
        let mut ranges = Vec::new();
        for extent in [100, 1000, 400] {
            let asked = server.request().await;
            ranges.push(asked.offset..asked.offset + asked.length);
            server
                .send(&status(asked.cookie, 0, 2, &[(extent, 1)]))
                .await;
            server
                .send(&status(asked.cookie, DONE, 1, &[(400, 3)]))
                .await;
        }
        ranges
    };
    let look = async {
        let mut map = client.map(100..1000);
        let mut found = Vec::new();
        while let Some(status) = map.next().await.unwrap() {
            found.push(status.range);
        }
        found
    };
    let (asked, found) = tokio::join!(serve, look);
    assert_eq!(asked, [100..1000, 200..1000, 600..1000]);
    assert_eq!(found, [100..200, 200..600, 600..1000]);
}

#[tokio::test]
async fn nothing_is_asked_for_nothing() {
    let (client, _carrying, mut server) = entered(&[]).await;
    assert!(client.read(7..7).await.unwrap().is_empty());
    client
        .write(SIZE, Bytes::new(), Durability::Now)
        .await
        .unwrap();
    client.trim(0..0, Durability::Later).await.unwrap();
    client.write_zeroes(1..1, Zeroing::default()).await.unwrap();
    assert!(is_silent(&mut server).await);
}

#[tokio::test]
async fn what_lies_outside_of_the_export_is_not_sent() {
    let (client, _carrying, mut server) = entered(&[]).await;
    let bytes = Bytes::from_static(b"hello");
    let (start, end) = (5, 4);
    for result in [
        client.read(SIZE - 1..SIZE + 1).await.map(drop),
        client.read(SIZE + 1..SIZE + 1).await.map(drop),
        client.read(start..end).await.map(drop),
        client.write(u64::MAX - 1, bytes, Durability::Later).await,
        client.cache(0..u64::MAX).await,
        client.block_status(0..1).await.map(drop),
    ] {
        assert!(matches!(result, Err(Error::Refused(_))), "{result:?}");
    }
    assert!(is_silent(&mut server).await);
}
