//! Frozen bytes and maps never move, whatever the guest does to what they show.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rand::seq::SliceRandom as _;
use stillpoint_tests::base::knows_holes;
use stillpoint_tests::seeds::{Rng, rng, seeds};
use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, sha256};
use stillpoint_tests::{CHUNK, Extent, Guest, KIB, MIB, Server};

/// Not a multiple of the chunk size, nor of a page.
const SIZE: u64 = 16 * MIB + 4 * KIB + 512;

#[derive(Clone, Debug, Eq, PartialEq)]
struct Facts {
    sha256: String,
    allocation: Vec<Extent>,
    dirty: Vec<Extent>,
}

/// Looks at a frozen export with stock tools.
fn facts(server: &Server, export: &str) -> Facts {
    let uri = server.frozen_uri(export);
    Facts {
        dirty: nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"),
        allocation: nbdinfo_map(&uri, "base:allocation"),
        sha256: nbdcopy_sha256(&uri, server.directory()),
    }
}

/// Rewrites, zeroes and trims while something else happens, and at least so often.
fn churn_while<T>(
    guest: &mut Guest,
    rng: &mut Rng,
    at_least: usize,
    then: impl FnOnce() -> T,
) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut count = 0;
            while count < at_least || !done.load(Ordering::Acquire) {
                guest.do_something(rng);
                count += 1;
            }
        });
        // Also when the other side panics, or the guest would go on for ever.
        let _done = SetOnDrop(&done);
        then()
    })
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn three_backups_keep_their_instants_and_end_in_any_order() {
    for seed in seeds(&[1, 2, 3]) {
        let mut rng = rng(seed);
        let server = Server::with_disk(SIZE);
        let mut guest = Guest::new(&server, "vda");
        (0..40).for_each(|_| guest.do_something(&mut rng));
        server.checkpoint("cp1");
        guest.touched.clear();

        // What is known of each at its instant. The second is first looked at much later, so a
        // twin of the same instant is looked at in its place.
        let mut open: Vec<(&str, Facts)> = Vec::new();
        for id in ["b1", "b2", "b3"] {
            churn_while(&mut guest, &mut rng, 60, || ());
            let begun = server.begin(id, &["--since", "cp1"]);
            assert_eq!(
                begun["disks"][0]["mode"], "incremental",
                "seed {seed}: {begun}"
            );
            let look_at = if id == "b2" {
                server.begin("b2-twin", &["--since", "cp1"]);
                "vda@b2-twin".to_owned()
            } else {
                format!("vda@{id}")
            };
            let facts = facts(&server, &look_at);
            assert_eq!(
                facts.sha256,
                sha256(&guest.disk),
                "seed {seed}: {id} at its instant"
            );
            assert_eq!(
                facts.dirty,
                guest.expected_map(),
                "seed {seed}: {id} at its instant"
            );
            assert_eq!(
                begun["disks"][0]["changed_bytes"],
                guest.expected_bytes(),
                "seed {seed}"
            );
            open.push((id, facts));
        }
        churn_while(&mut guest, &mut rng, 200, || server.abort("b2-twin"));

        let mut order = ["b1", "b2", "b3"];
        order.shuffle(&mut rng);
        for ended in order {
            for (id, facts_then) in &open {
                let export = format!("vda@{id}");
                let now = churn_while(&mut guest, &mut rng, 50, || facts(&server, &export));
                assert_eq!(
                    &now, facts_then,
                    "seed {seed}: {id} before {ended} of {order:?} ends"
                );
            }
            churn_while(&mut guest, &mut rng, 100, || match ended {
                "b2" => server.commit(ended),
                _ => server.abort(ended),
            });
            open.retain(|(id, _)| *id != ended);
        }

        // Nothing was forgotten with the backups that ended.
        server.begin("b4", &["--since", "cp1"]);
        let last = facts(&server, "vda@b4");
        assert_eq!(
            last.sha256,
            sha256(&guest.disk),
            "seed {seed}: after all had ended"
        );
        assert_eq!(
            last.dirty,
            guest.expected_map(),
            "seed {seed}: after all had ended"
        );
    }
}

#[test]
fn a_chunk_that_changed_before_and_after_the_instant_stays_dirty() {
    let server = Server::with_disk(4 * MIB);
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    guest.write(5 * CHUNK, &[1; 4096]);
    server.begin("b1", &["--since", "cp1"]);
    let expected = guest.expected_map();
    guest.write(5 * CHUNK + 8192, &[2; 4096]);
    guest.write(9 * CHUNK, &[2; 4096]);
    let map = nbdinfo_map(&server.frozen_uri("vda@b1"), "qemu:dirty-bitmap:cp1");
    assert_eq!(map, expected);
}

#[test]
fn a_hole_of_the_instant_stays_a_hole_and_data_stay_data() {
    let server = Server::with_disk(4 * MIB);
    let mut guest = Guest::new(&server, "vda");
    guest.write(MIB, &vec![1; MIB as usize]);
    server.begin("b1", &[]);
    server.begin("b2", &[]);
    let before = nbdinfo_map(&server.frozen_uri("vda@b1"), "base:allocation");
    if knows_holes() {
        assert_eq!(before, [(0, MIB, 3), (MIB, MIB, 0), (2 * MIB, 2 * MIB, 3)]);
    } else {
        assert_eq!(before, [(0, 4 * MIB, 0)]);
    }
    guest.trim(MIB, MIB);
    guest.write(2 * MIB + 4096, &[2; 8192]);
    guest.zeroes(3 * MIB, MIB / 2, 0);
    // The second is looked at for the first time only now.
    for export in ["vda@b1", "vda@b2"] {
        let after = nbdinfo_map(&server.frozen_uri(export), "base:allocation");
        assert_eq!(after, before, "{export}");
    }
}
