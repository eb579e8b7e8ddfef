//! From a stream to an export, or to a reason why not.

use tokio::io::{AsyncWriteExt, duplex};

use super::server::Server;
use crate::proto::Headers;
use crate::proto::client::{Error, Haggling, Reason, ServerViolation};
use crate::wire::*;

#[tokio::test]
async fn extended_headers_are_asked_for_first_and_simple_replies_are_what_is_left() {
    let (near, far) = duplex(4096);
    let mut server = Server::new(far);
    let serve = async {
        server.greet().await;
        server.option(EXTENDED_HEADERS).await;
        server.send(&answer(EXTENDED_HEADERS, ERR_UNSUP, b"")).await;
        server.option(STRUCTURED_REPLY).await;
        server.send(&answer(STRUCTURED_REPLY, ERR_UNSUP, b"")).await;
        server.option(GO).await;
        server.send(&answer(GO, ERR_UNSUP, b"")).await;
        assert_eq!(server.option(1).await, b"vda");
        server.send(&[0; 8]).await;
        server.send(&HAS_FLAGS.to_be_bytes()).await;
    };
    let enter = async {
        let haggling = Haggling::begin(near).await?;
        haggling.enter("vda", &["base:allocation"]).await
    };
    let ((), entered) = tokio::join!(serve, enter);
    let (client, _connection) = entered.unwrap();
    assert_eq!(client.headers(), Headers::Simple);
    assert!(matches!(
        client.context("base:allocation"),
        Err(Error::NoSuchContext(name)) if name == "base:allocation"
    ));
}

#[tokio::test]
async fn a_server_that_declines_is_told_goodbye() {
    let (near, far) = duplex(4096);
    let mut server = Server::new(far);
    let serve = async {
        server.greet().await;
        server.option(STRUCTURED_REPLY).await;
        server.send(&answer(STRUCTURED_REPLY, ACK, b"")).await;
        server.option(GO).await;
        server
            .send(&answer(GO, ERR_UNKNOWN, b"never heard of it"))
            .await;
        assert_eq!(server.option(ABORT).await, b"");
        assert!(server.rest().await.is_empty());
    };
    let enter = async {
        let haggling = Haggling::begin(near).await?.at_most(Headers::Structured);
        haggling.enter("vda", &[]).await
    };
    let ((), entered) = tokio::join!(serve, enter);
    let Err(Error::Declined(declined)) = entered else {
        panic!("not declined");
    };
    assert_eq!(declined.reason, Reason::Unknown);
}

#[tokio::test]
async fn a_server_from_before_there_were_errors_says_no_by_closing() {
    let (near, mut far) = duplex(4096);
    let serve = async {
        far.write_all(&greeting(0)).await.unwrap();
        drop(far);
    };
    let enter = async {
        let haggling = Haggling::begin(near).await?;
        haggling.enter("vda", &[]).await
    };
    let ((), entered) = tokio::join!(serve, enter);
    assert!(matches!(entered, Err(Error::Declined(_) | Error::Io(_))));
}

#[tokio::test]
async fn the_handshake_goes_on_inside_of_tls() {
    let (near, far) = duplex(4096);
    let (near_inside, far_inside) = duplex(4096);
    let serve = async {
        let mut server = Server::new(far);
        server.greet().await;
        server.option(STARTTLS).await;
        server.send(&answer(STARTTLS, ACK, b"")).await;
        let mut server = Server::new(far_inside);
        server.option(LIST).await;
        server.send(&listed(b"vda", b"")).await;
        server.send(&answer(LIST, ACK, b"")).await;
    };
    let list = async {
        let haggling = Haggling::begin(near).await?;
        let (_plain, after) = haggling.start_tls().await?;
        after.go_on(near_inside).list().await
    };
    let ((), exports) = tokio::join!(serve, list);
    assert_eq!(exports.unwrap()[0].name, "vda");
}

#[tokio::test]
async fn a_server_that_does_not_start_tls_is_left() {
    let (near, far) = duplex(4096);
    let mut server = Server::new(far);
    let serve = async {
        server.greet().await;
        server.option(STARTTLS).await;
        server.send(&answer(STARTTLS, ERR_UNSUP, b"")).await;
        server.option(ABORT).await;
        assert!(server.rest().await.is_empty());
    };
    let start = async { Haggling::begin(near).await?.start_tls().await };
    let ((), started) = tokio::join!(serve, start);
    assert!(matches!(started, Err(Error::Declined(_))));
}

#[tokio::test]
async fn an_end_or_nonsense_at_any_byte_is_an_error() {
    let whole = [
        greeting(FIXED | NO_ZEROES),
        answer(STRUCTURED_REPLY, ACK, b""),
        info_export(GO, 4096, 1),
        answer(GO, ACK, b""),
    ]
    .concat();
    for end in 0..whole.len() {
        let (near, mut far) = duplex(4096);
        far.write_all(&whole[..end]).await.unwrap();
        far.shutdown().await.unwrap();
        let enter = async {
            let haggling = Haggling::begin(near).await?.at_most(Headers::Structured);
            haggling.enter("vda", &[]).await
        };
        assert!(matches!(enter.await, Err(Error::Closed)), "{end} bytes");
    }
    let (near, mut far) = duplex(4096);
    far.write_all(b"220 mail.example.org ESMTP\r\n")
        .await
        .unwrap();
    assert!(matches!(
        Haggling::begin(near).await,
        Err(Error::Violation(ServerViolation::NotNbd(_)))
    ));
}
