//! The instant is real: a freeze cuts the writes of all disks at one moment.
//!
//! Chains of writes run over two disks, many at once: each write of a chain is issued when the one
//! before it is complete, mostly on the other disk. All that happens has a tick of one counter, and
//! each write fills its block with the tick of its issue. So a frozen pair of disks shows which
//! writes are in, and there is an instant exactly if no write that is out was complete before one
//! that is in was issued.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use rand::Rng as _;
use serde_json::json;
use stillpoint_tests::raw_nbd::{Receiver, Sender, command};
use stillpoint_tests::seeds::{Rng, rng, seeds};
use stillpoint_tests::server::Builder;
use stillpoint_tests::{Qmp, Server};

const DISKS: [&str; 2] = ["vda", "vdb"];
const BLOCK: usize = 4096;
/// Each chain writes into slots of its own, so no two writes in flight meet.
const CHAINS: usize = 32;
const SLOTS_PER_CHAIN: usize = 24;
const SLOTS: usize = CHAINS * SLOTS_PER_CHAIN;
const CONNECTIONS_PER_DISK: usize = 2;

#[test]
fn two_hundred_freezes_of_two_disks_are_instants() {
    for seed in seeds(&[1]) {
        let server = two_disks(Server::builder()).start();
        freeze_often(&server, seed, 200).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn a_delay_between_the_swaps_of_two_disks_is_not_seen() {
    for seed in seeds(&[2]) {
        let builder = Server::builder()
            .test_hooks()
            .env("STILLPOINT_TEST_SWAP_DELAY_MS", "20");
        let server = two_disks(builder).start();
        freeze_often(&server, seed, 20).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn without_gates_the_same_delay_is_found_out() {
    for seed in seeds(&[3]) {
        let builder = Server::builder()
            .test_hooks()
            .env("STILLPOINT_TEST_SWAP_DELAY_MS", "20")
            .env("STILLPOINT_TEST_LEAVE_GATES_OPEN", "1");
        let server = two_disks(builder).start();
        let found = freeze_often(&server, seed, 20);
        assert!(
            found.is_err(),
            "seed {seed}: 20 freezes without gates looked like instants"
        );
    }
}

#[test]
fn the_check_sees_each_way_in_which_an_instant_can_be_wrong() {
    let write = |issued, completed| Write { issued, completed };
    let freeze = Freeze {
        called: 100,
        returned: 110,
    };
    let check = |frozen: [u64; 2], logs: [Vec<Write>; 2]| {
        let frozen = frozen.map(|stamp| vec![stamp]);
        freeze.check(&frozen, &logs.map(|log| vec![log]))
    };

    assert!(check([1, 2], [vec![write(1, 5)], vec![write(2, 6)]]).is_ok());
    assert!(check([0, 0], [vec![write(101, 105)], vec![write(102, 106)]]).is_ok());
    assert!(check([101, 0], [vec![write(101, 105)], vec![write(102, 106)]]).is_ok());
    let early_is_out = check([0, 0], [vec![write(1, 5)], vec![]]);
    assert!(early_is_out.unwrap_err().contains("before begin"));
    let late_is_in = check([111, 0], [vec![write(111, 115)], vec![]]);
    assert!(late_is_in.unwrap_err().contains("after begin"));
    let effect_without_cause = check([0, 106], [vec![write(101, 105)], vec![write(106, 109)]]);
    assert!(effect_without_cause.unwrap_err().contains("out of order"));
    let unknown = check([7, 0], [vec![write(1, 5)], vec![]]);
    assert!(unknown.unwrap_err().contains("never written"));
}

fn two_disks(builder: Builder) -> Builder {
    let size = (SLOTS * BLOCK) as u64;
    DISKS
        .iter()
        .fold(builder, |builder, disk| builder.disk(disk, size))
}

/// Freezes while the chains run; the error says what was wrong with which freeze.
fn freeze_often(server: &Server, seed: u64, freezes: usize) -> Result<(), String> {
    let writer = Writer::start(server, seed);
    let mut rng = rng(seed + 1000);
    let mut qmp = server.qmp();
    let mut result = Ok(());
    for freeze in 0..freezes {
        writer.wait_for_more(rng.random_range(1..200));
        result = freeze_once(server, &mut qmp, &writer, &format!("b{freeze}"));
        if result.is_err() {
            break;
        }
    }
    writer.stop();
    result
}

fn freeze_once(server: &Server, qmp: &mut Qmp, writer: &Writer, id: &str) -> Result<(), String> {
    let called = writer.tick();
    qmp.execute("backup-begin", &json!({"id": id}));
    let freeze = Freeze {
        called,
        returned: writer.tick(),
    };

    let mut frozen = [vec![], vec![]];
    for (disk, stamps) in DISKS.iter().zip(&mut frozen) {
        let image = server.open_frozen(&format!("{disk}@{id}"), &[]).read_all();
        for (slot, block) in image.chunks(BLOCK).enumerate() {
            let stamp = u64::from_be_bytes(block[..8].try_into().expect("eight bytes"));
            if block != block_of(stamp) {
                return Err(format!("{id}: a write is half in at {disk} slot {slot}"));
            }
            stamps.push(stamp);
        }
    }
    qmp.execute("backup-abort", &json!({"id": id}));
    let log = writer.shared.log.lock().unwrap();
    freeze
        .check(&frozen, &log.writes)
        .map_err(|wrong| format!("{id}: {wrong}"))
}

/// When a freeze was asked for, and when the answer was there.
struct Freeze {
    called: u64,
    returned: u64,
}

impl Freeze {
    /// Looks for a reason why what was frozen cannot have been there at one moment in between.
    /// Both arguments are by disk and slot: the stamp found, and all the writes in their order.
    fn check(&self, frozen: &[Vec<u64>; 2], log: &[Vec<Vec<Write>>; 2]) -> Result<(), String> {
        let mut latest_in = Write::default();
        let mut earliest_out = Write {
            issued: u64::MAX,
            completed: u64::MAX,
        };
        for (frozen, log) in frozen.iter().zip(log) {
            for (stamp, writes) in frozen.iter().zip(log) {
                let count = writes.partition_point(|write| write.issued <= *stamp);
                let last_in = count.checked_sub(1).map(|last| writes[last]);
                if last_in.map_or(0, |write| write.issued) != *stamp {
                    return Err(format!("stamp {stamp} was never written there"));
                }
                if let Some(write) = last_in.filter(|write| write.issued > latest_in.issued) {
                    latest_in = write;
                }
                // Writes of one slot follow each other, so the first that is out ended first.
                let first_out = writes.get(count);
                if let Some(write) = first_out.filter(|w| w.completed < earliest_out.completed) {
                    earliest_out = *write;
                }
            }
        }
        if earliest_out.completed < self.called {
            return Err(format!(
                "{earliest_out:?} is out, but before begin at {}",
                self.called
            ));
        }
        if latest_in.issued > self.returned {
            return Err(format!(
                "{latest_in:?} is in, but after begin at {}",
                self.returned
            ));
        }
        if earliest_out.completed < latest_in.issued {
            return Err(format!(
                "out of order: {earliest_out:?} is out, {latest_in:?} is in"
            ));
        }
        Ok(())
    }
}

/// The ticks between which a write happened; the first is its stamp as well.
#[derive(Clone, Copy, Debug, Default)]
struct Write {
    issued: u64,
    completed: u64,
}

#[derive(Default)]
struct Log {
    /// By disk and slot, in the order of issue.
    writes: [Vec<Vec<Write>>; 2],
    /// How many writes are complete.
    completed: u64,
    in_flight: usize,
    stopping: bool,
}

struct Shared {
    ticks: AtomicU64,
    log: Mutex<Log>,
    progress: Condvar,
    chains: Vec<Mutex<Chain>>,
    /// By disk, then by connection.
    senders: [Vec<Mutex<Sender>>; 2],
}

/// Writes that wait for each other.
struct Chain {
    rng: Rng,
    disk: usize,
    slot: usize,
}

struct Writer {
    shared: Arc<Shared>,
    receivers: Vec<JoinHandle<()>>,
}

impl Writer {
    fn start(server: &Server, seed: u64) -> Self {
        let (senders, receivers): (Vec<_>, Vec<_>) = DISKS
            .iter()
            .flat_map(|disk| (0..CONNECTIONS_PER_DISK).map(|_| server.open_live(disk).split()))
            .unzip();
        let mut senders = senders.into_iter().map(Mutex::new);
        let mut of_a_disk = || senders.by_ref().take(CONNECTIONS_PER_DISK).collect();
        let chains = (0..CHAINS).map(|chain| Chain {
            rng: rng(seed ^ (chain as u64) << 32),
            disk: chain % 2,
            slot: 0,
        });
        let shared = Arc::new(Shared {
            ticks: AtomicU64::new(1),
            log: Mutex::new(Log {
                writes: [vec![vec![]; SLOTS], vec![vec![]; SLOTS]],
                ..Log::default()
            }),
            progress: Condvar::new(),
            chains: chains.map(Mutex::new).collect(),
            senders: [of_a_disk(), of_a_disk()],
        });
        let receivers = receivers.into_iter().map(|receiver| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.receive(receiver))
        });
        let receivers = receivers.collect();
        for chain in 0..CHAINS {
            shared.issue(chain);
        }
        Self { shared, receivers }
    }

    fn tick(&self) -> u64 {
        self.shared.tick()
    }

    /// Waits until so many more writes are complete.
    fn wait_for_more(&self, writes: u64) {
        let log = self.shared.log.lock().unwrap();
        let enough = log.completed + writes;
        drop(
            self.shared
                .progress
                .wait_while(log, |log| log.completed < enough)
                .unwrap(),
        );
    }

    /// Lets the chains end.
    fn stop(self) {
        let mut log = self.shared.log.lock().unwrap();
        log.stopping = true;
        drop(
            self.shared
                .progress
                .wait_while(log, |log| log.in_flight > 0)
                .unwrap(),
        );
        for sender in self.shared.senders.iter().flatten() {
            sender
                .lock()
                .unwrap()
                .disconnect()
                .expect("the server reads our good-bye");
        }
        for receiver in self.receivers {
            receiver.join().expect("no receiver panics");
        }
    }
}

impl Shared {
    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// Issues the next write of a chain, unless it is time to stop.
    fn issue(&self, number: usize) {
        let mut chain = self.chains[number].lock().unwrap();
        if chain.rng.random_bool(0.9) {
            chain.disk = 1 - chain.disk;
        }
        chain.slot = chain.rng.random_range(0..SLOTS_PER_CHAIN) * CHAINS + number;
        let connection = chain.rng.random_range(0..CONNECTIONS_PER_DISK);

        let stamp = {
            let mut log = self.log.lock().unwrap();
            if log.stopping {
                return;
            }
            log.in_flight += 1;
            let issued = self.tick();
            log.writes[chain.disk][chain.slot].push(Write {
                issued,
                completed: u64::MAX,
            });
            issued
        };
        let (offset, block) = ((chain.slot * BLOCK) as u64, block_of(stamp));
        let sender = &self.senders[chain.disk][connection];
        drop(chain);
        sender
            .lock()
            .unwrap()
            .request(
                (command::WRITE, 0),
                number as u64,
                offset,
                BLOCK as u32,
                &block,
            )
            .expect("the server takes requests");
    }

    /// Receives answers until the server hangs up, and goes on with their chains.
    fn receive(&self, mut receiver: Receiver) {
        while let Ok(answer) = receiver.answer() {
            answer.done().expect("every write succeeds");
            let number = answer.cookie as usize;
            {
                let chain = self.chains[number].lock().unwrap();
                let mut log = self.log.lock().unwrap();
                let completed = self.tick();
                let writes = &mut log.writes[chain.disk][chain.slot];
                writes.last_mut().expect("it was issued").completed = completed;
                log.completed += 1;
                log.in_flight -= 1;
            }
            self.issue(number);
            self.progress.notify_all();
        }
    }
}

fn block_of(stamp: u64) -> Vec<u8> {
    stamp.to_be_bytes().repeat(BLOCK / 8)
}
