//! Conversations over a socket pair, with a server that has no disks.

use block::Engine;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::LocalSet;

use super::*;
use crate::disk::OnTrackingError;
use crate::names::Name;
use crate::service::{BeginRequest, ScratchOptions};

struct Client {
    stream: BufReader<UnixStream>,
    control: Rc<Control>,
    conversation: JoinHandle<()>,
}

impl Client {
    fn connect() -> Self {
        let service = Service::new(
            Vec::new(),
            Duration::from_secs(1),
            time::OffsetDateTime::now_utc,
            ScratchOptions::default(),
        )
        .expect("nothing to restore");
        let control = Rc::new(Control {
            jobs: Rc::new(Jobs::new(
                Arc::clone(&service),
                "/run/stillpoint".to_owned(),
            )),
            service,
            backup_addresses: Vec::new(),
            live_addresses: Vec::new(),
            run_dir: "/run/stillpoint".into(),
            opening: Opening {
                scratch_dir: None,
                allow_backing: Vec::new(),
                on_tracking_error: OnTrackingError::default(),
                engine: Engine::Threads,
            },
            stop: watch::channel(false).0,
        });
        let (ours, theirs) = UnixStream::pair().unwrap();
        let conversation = spawn_local(converse(theirs, Rc::clone(&control)));
        Self {
            stream: BufReader::new(ours),
            control,
            conversation,
        }
    }

    async fn negotiated() -> Self {
        let mut client = Self::connect();
        assert!(client.receive().await["QMP"]["version"]["qemu"]["major"].is_u64());
        client.send(br#"{"execute":"qmp_capabilities"}"#).await;
        assert_eq!(client.receive().await, json!({"return": {}}));
        client
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        line
    }

    async fn receive(&mut self) -> Value {
        let line = self.line().await;
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

#[test]
fn nothing_is_done_before_capabilities_are_negotiated() {
    run(async {
        let mut client = Client::connect();
        assert_eq!(
            client.line().await,
            concat!(
                r#"{"QMP":{"version":{"qemu":{"major":0,"minor":1,"micro":0},"#,
                r#""package":"stillpoint"},"capabilities":[]}}"#,
                "\r\n"
            )
        );
        client.send(br#"{"execute":"quit","id":1}"#).await;
        let reply = client.receive().await;
        assert_eq!(reply["error"]["class"], "CommandNotFound");
        assert_eq!(reply["id"], 1);
        client
            .send(br#"{"execute":"qmp_capabilities","id":"x"}"#)
            .await;
        assert_eq!(client.receive().await, json!({"return": {}, "id": "x"}));
        client.send(br#"{"execute":"qmp_capabilities"}"#).await;
        assert_eq!(client.receive().await["error"]["class"], "CommandNotFound");
    });
}

#[test]
fn what_makes_no_sense_is_answered_and_the_next_command_is_understood() {
    run(async {
        let mut client = Client::negotiated().await;
        client
            .send(
                b"{nonsense}{\"execute\":\"query-disks\",\"id\":1}[]garbage\n{\"execute\":\"q\xff",
            )
            .await;
        client
            .send(br#"{"execute":"query-disks","arguments":{"x":1},"id":2}"#)
            .await;
        assert!(client.receive().await["error"]["desc"].is_string());
        assert_eq!(client.receive().await, json!({"return": [], "id": 1}));
        assert!(client.receive().await["error"]["desc"].is_string());
        assert!(client.receive().await["error"]["desc"].is_string());
        assert!(client.receive().await["error"]["desc"].is_string());
        let reply = client.receive().await;
        assert_eq!(
            (&reply["error"]["desc"], &reply["id"]),
            (&json!("Parameter 'x' is unexpected"), &json!(2))
        );
    });
}

#[test]
fn an_object_that_is_too_large_ends_the_connection_with_a_word() {
    run(async {
        let client = Client::negotiated().await;
        let (reader, mut writer) = client.stream.into_inner().into_split();
        let mut reader = BufReader::new(reader);
        let flood = spawn_local(async move {
            let _ = writer.write_all(b"{\"").await;
            // The server hangs up in the midst of this.
            let _ = writer.write_all(&vec![b'x'; 2 << 20]).await;
        });
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        assert!(line.contains("larger than 1048576 bytes"), "{line}");
        client.conversation.await.unwrap();
        flood.await.unwrap();
    });
}

#[test]
fn events_come_to_whoever_has_negotiated() {
    run(async {
        let mut client = Client::negotiated().await;
        client
            .send(br#"{"execute":"backup-begin","arguments":{"id":"b1"}}{"execute":"backup-abort","arguments":{"id":"b1"}}"#)
            .await;
        let mut messages = Vec::new();
        for _ in 0..4 {
            messages.push(client.receive().await);
        }
        let events: Vec<_> = messages.iter().filter(|m| m["event"].is_string()).collect();
        assert_eq!(events[0]["event"], "BACKUP_BEGUN");
        assert_eq!(events[0]["data"], json!({"id": "b1"}));
        assert!(events[0]["timestamp"]["seconds"].as_i64() > Some(1_700_000_000));
        assert_eq!(events[1]["data"], json!({"id": "b1", "outcome": "aborted"}));
    });
}

#[test]
fn a_client_that_does_not_read_loses_its_connection_and_holds_up_nobody() {
    run(async {
        let client = Client::negotiated().await;
        let service = Arc::clone(&client.control.service);
        for number in 0..10_000 {
            let id = Name::parse(&format!("b{number}")).unwrap();
            let request = BeginRequest {
                id: Some(id.clone()),
                ..BeginRequest::default()
            };
            service.begin_backup(request).await.unwrap();
            service.abort_backup(&id).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.conversation.await.unwrap();
    });
}

#[test]
fn a_client_that_only_asks_does_not_hold_up_a_stop() {
    run(async {
        let client = Client::negotiated().await;
        let mut stream = client.stream;
        let flood = spawn_local(async move {
            while stream
                .write_all(br#"{"execute":"query-commands"}"#)
                .await
                .is_ok()
            {}
        });
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        client.control.stop.send_replace(true);
        client.conversation.await.unwrap();
        flood.await.unwrap();
    });
}

#[test]
fn a_stop_and_a_quit_end_every_conversation() {
    run(async {
        let mut client = Client::negotiated().await;
        client.send(br#"{"execute":"quit","id":1}"#).await;
        assert_eq!(client.receive().await, json!({"return": {}, "id": 1}));
        client.conversation.await.unwrap();
        assert!(*client.control.stop.borrow());
        assert_eq!(client.stream.read(&mut [0]).await.unwrap(), 0);

        let client = Client::negotiated().await;
        client.control.stop.send_replace(true);
        client.conversation.await.unwrap();
    });
}

#[test]
fn a_command_once_begun_runs_to_its_end_when_the_client_has_gone() {
    run(async {
        let mut client = Client::negotiated().await;
        let service = Arc::clone(&client.control.service);
        client
            .send(br#"{"execute":"backup-begin","arguments":{"id":"b1"}}"#)
            .await;
        drop(client.stream);
        client.conversation.await.unwrap();
        while service.book().backup("b1").is_none() {
            tokio::task::yield_now().await;
        }
    });
}
