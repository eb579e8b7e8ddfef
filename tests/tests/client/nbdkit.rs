//! `nbdkit` as the server, in moods that it has filters and options for.

use std::time::Duration;

use bytes::Bytes;
use proto::{Errno, Headers};
use stillpoint_tests::MIB;
use stillpoint_tests::tools::with_nbdkit;

use crate::client::{Durability, Error, ServerViolation};
use crate::connected::{begin, map, read_all, run, with_client};

#[test]
fn memory_is_what_was_written_to_it() {
    with_nbdkit(&["memory", "16M"], |socket| {
        with_client(socket, ("", &["base:allocation"]), async |client| {
            let bytes = Bytes::from(vec![9; 100_000]);
            client
                .write(12_345, bytes.clone(), Durability::Now)
                .await
                .unwrap();
            client.flush().await.unwrap();
            let all = read_all(client).await;
            assert!(all[12_345..][..bytes.len()] == bytes);
            assert!(all[..12_345].iter().all(|byte| *byte == 0));
            let allocated = map(client, "base:allocation").await;
            assert_eq!(
                allocated.iter().map(|(_, length, _)| length).sum::<u64>(),
                16 * MIB
            );
            assert!(allocated.len() > 1, "{allocated:?}");
        });
    });
}

#[test]
fn without_structured_replies_there_are_reads_and_no_contexts() {
    with_nbdkit(&["--no-sr", "memory", "1M"], |socket| {
        with_client(socket, ("", &["base:allocation"]), async |client| {
            assert_eq!(client.headers(), Headers::Simple);
            assert!(client.context("base:allocation").is_err());
            let bytes = Bytes::from_static(b"hello");
            client.write(7, bytes, Durability::Later).await.unwrap();
            assert_eq!(client.read(6..13).await.unwrap(), &b"\0hello\0"[..]);
        });
    });
}

#[test]
fn a_server_from_before_there_were_options_is_entered_by_name() {
    with_nbdkit(&["--mask-handshake=0", "memory", "1M"], |socket| {
        with_client(socket, ("", &["base:allocation"]), async |client| {
            assert_eq!(client.info().size, MIB);
            assert_eq!(read_all(client).await.len() as u64, MIB);
        });
        run(async {
            let mut haggling = begin(socket).await.unwrap();
            assert!(matches!(haggling.list().await, Err(Error::Declined(_))));
        });
    });
}

#[test]
fn oldstyle_is_refused_in_words() {
    with_nbdkit(&["--oldstyle", "memory", "1M"], |socket| {
        let error = run(begin(socket)).unwrap_err();
        assert!(matches!(error, Error::Violation(ServerViolation::Oldstyle)));
        let cause = std::error::Error::source(&error).expect("a cause");
        assert!(cause.to_string().contains("oldstyle"), "{cause}");
    });
}

#[test]
fn an_error_of_any_request_cannot_be_missed_and_harms_no_other() {
    let args = [
        "--filter=error",
        "memory",
        "16M",
        "error=EIO",
        "error-pread-rate=50%",
    ];
    with_nbdkit(&args, |socket| {
        with_client(socket, ("", &[]), async |client| {
            let (mut good, mut bad) = (0, 0);
            for _ in 0..100 {
                match client.read(0..65_536).await {
                    Ok(bytes) => {
                        assert_eq!(bytes.len(), 65_536);
                        good += 1;
                    }
                    Err(Error::Failed(failure)) => {
                        assert_eq!(failure.errno, Errno::Io);
                        bad += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            // One in 2^99 that this is chance.
            assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
        });
    });
}

#[test]
fn a_caller_that_runs_out_of_patience_leaves_the_connection_in_step() {
    with_nbdkit(
        &["--filter=delay", "memory", "1M", "rdelay=500ms"],
        |socket| {
            with_client(socket, ("", &[]), async |client| {
                let bytes = Bytes::from(vec![5; 4096]);
                client
                    .write(0, bytes.clone(), Durability::Later)
                    .await
                    .unwrap();
                let hasty = tokio::time::timeout(Duration::from_millis(1), client.read(0..MIB));
                assert!(hasty.await.is_err(), "it does not take half a second");
                assert_eq!(client.read(0..4096).await.unwrap(), bytes);
            });
        },
    );
}

#[test]
fn many_reads_are_under_way_at_once() {
    // One after the other they would take 32 s.
    with_nbdkit(&["--filter=delay", "memory", "1M", "rdelay=1"], |socket| {
        with_client(socket, ("", &[]), async |client| {
            let begun = std::time::Instant::now();
            let reads: Vec<_> = (0..32)
                .map(|index| {
                    let client = client.clone();
                    tokio::spawn(async move { client.read(index..index + 1).await })
                })
                .collect();
            for read in reads {
                read.await.unwrap().unwrap();
            }
            assert!(begun.elapsed() < Duration::from_secs(25));
        });
    });
}

#[test]
fn block_sizes_are_heeded() {
    let args = [
        "--filter=blocksize-policy",
        "memory",
        "16M",
        "blocksize-minimum=4096",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ];
    with_nbdkit(&args, |socket| {
        with_client(socket, ("", &["base:allocation"]), async |client| {
            assert_eq!(client.info().block_size.minimum(), 4096);
            // Longer than the server takes at once.
            assert_eq!(read_all(client).await.len() as u64, 16 * MIB);
            let bytes = Bytes::from(vec![5; 3 << 20]);
            client.write(4096, bytes, Durability::Later).await.unwrap();
            let unaligned = client.read(0..512).await;
            assert!(matches!(unaligned, Err(Error::Refused(_))), "{unaligned:?}");
            assert!(!map(client, "base:allocation").await.is_empty());
        });
    });
}
