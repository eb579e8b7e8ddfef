//! What cannot be moved, and what is not taken in; neither touches anything.

use std::fs;
use std::path::Path;

use rand::Rng as _;
use serde_json::Value;
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::state::directory;
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{MIB, Server};

use crate::images::{SIZE, map_of, poke, since};
use crate::moved::{export, known, moved, spec};

/// A stopped server with a checkpoint, and a chunk that was written since.
fn prepared() -> Server {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    server.stop();
    server
}

#[track_caller]
fn refused(server: &Server, args: &[&str], code: &str, why: &str) {
    let output = server.cli(&[args, &["--json"]].concat());
    output.fails_with(code, why);
}

#[test]
fn what_is_in_use_or_has_open_backups_or_was_never_served_does_not_leave() {
    let mut server = prepared();
    let (spec, file) = (spec(&server), server.path("state"));
    let export = ["state", "export", "--disk", &spec, "--to", path(&file)];
    server.start();
    refused(&server, &export, "image-locked", "in use");
    server.begin("b1", &[]);
    server.begin("b2", &[]);
    server.stop();
    for end in ["stop", "kill"] {
        refused(&server, &export, "open-backups", "open backups: b");
        // They go on as if nobody had asked.
        server.start();
        assert_eq!(server.backup("b1")["state"], "open");
        match end {
            "stop" => server.kill(),
            _ => server.stop(),
        }
    }
    server.start();
    server.abort("b1");
    server.commit("b2");
    server.stop();
    server.cli(&export).ok();
    refused(&server, &export, "output-exists", "exists");
    let other = server.path("other");
    let never = server.path("never.raw");
    sparse_file(&never, SIZE);
    let disk = format!("vda={}", path(&never));
    let export = ["state", "export", "--disk", &disk, "--to", path(&other)];
    refused(&server, &export, "no-state", "no state");
    assert!(!server.path("never.raw.stillpoint").exists());
    assert!(!server.path("other").exists());
    let nowhere = ["state", "export", "--disk", &spec, "--to", "/nowhere/state"];
    refused(&server, &nowhere, "not-writable", "/nowhere");
}

#[test]
fn a_state_is_taken_in_only_for_the_very_same_bytes() {
    let server = prepared();
    let state = export(&server);
    let mut next = moved(&server, &state);
    fs::remove_dir_all(directory(&next, "vda")).unwrap();
    let (image, disk) = (next.image("vda"), spec(&next));
    let import = ["state", "import", path(&state), "--disk", &disk];
    poke(&image, SIZE - 1, &[1]);
    refused(&next, &import, "other-image", "BLAKE3");
    poke(&image, SIZE - 1, &[0]);
    fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(SIZE + MIB)
        .unwrap();
    refused(&next, &import, "other-size", "9437184");
    fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let finer = format!("{disk},granularity=4k");
    let coarse = ["state", "import", path(&state), "--disk", &finer];
    refused(&next, &coarse, "other-granularity", "65536");
    next.start();
    refused(&next, &import, "image-locked", "in use");
    next.stop();
    // The start has begun a state.
    refused(&next, &import, "state-exists", "already");
    let forced = [&import[..], &["--force"]].concat();
    next.cli(&forced).ok();
    next.start();
    assert_eq!(since(&next, "cp1"), map_of(&[0]));
}

#[test]
fn without_a_hash_somebody_has_to_vouch_for_the_image() {
    let server = prepared();
    let state = server.path("state");
    let disk = spec(&server);
    let export = [
        "state",
        "export",
        "--no-image-hash",
        "--disk",
        &disk,
        "--to",
        path(&state),
    ];
    let told = server.cli(&[&export[..], &["--json"]].concat()).json();
    assert_eq!(told["image_blake3"], Value::Null);
    let import = ["state", "import", path(&state), "--disk", &disk, "--force"];
    refused(&server, &import, "no-image-hash", "without a hash");
    server
        .cli(&[&import[..], &["--no-image-hash"]].concat())
        .ok();
    let hashed = crate::moved::export(&server);
    poke(&server.image("vda"), MIB, &[9]);
    refused(
        &server,
        &["state", "import", path(&hashed), "--disk", &disk, "--force"],
        "other-image",
        "hash",
    );
    // Whoever says so is believed.
    server
        .cli(&[&import[..], &["--no-image-hash"]].concat())
        .ok();
}

#[test]
fn an_image_on_another_server_stays_there() {
    let base = Server::with_disk(SIZE);
    let server = prepared();
    let state = export(&server);
    let uri = base.live_uri("vda");
    let disk = format!("vda={uri},state={}", path(&server.path("remote")));
    refused(
        &server,
        &["state", "import", path(&state), "--disk", &disk],
        "not-movable",
        "another",
    );
}

#[test]
fn a_file_with_any_byte_flipped_or_any_part_missing_is_refused() {
    let mut server = prepared();
    let state = export(&server);
    server.start();
    let expected = known(&server);
    server.stop();
    let (good, disk) = (fs::read(&state).unwrap(), spec(&server));
    let import =
        |file: &Path| server.cli(&["state", "import", path(file), "--force", "--disk", &disk]);
    let bad = server.path("bad");
    for seed in seeds(&[1]) {
        let mut rng = rng(seed);
        let ends = (0..16).chain(good.len() - 34..good.len());
        let drawn = (0..60).map(|_| rng.random_range(0..good.len()));
        for at in ends.chain(drawn.collect::<Vec<_>>()) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << rng.random_range(0..8);
            fs::write(&bad, &bytes).unwrap();
            import(&bad).exits(1);
        }
        for _ in 0..20 {
            fs::write(&bad, &good[..rng.random_range(0..good.len())]).unwrap();
            import(&bad).exits(1);
        }
    }
    fs::write(&bad, [&good[..], b"x"].concat()).unwrap();
    import(&bad).refused("damaged");
    fs::write(&bad, b"").unwrap();
    import(&bad).refused("no exported state");
    import(&server.path("none")).refused("No such file");
    import(server.directory()).refused("directory");
    // What was there is what is there.
    server.start();
    assert_eq!(known(&server), expected);
}

#[test]
fn what_is_whole_and_makes_no_sense_is_refused() {
    let server = prepared();
    let state = export(&server);
    let good = fs::read(&state).unwrap();
    let disk = spec(&server);
    let with = |what: &[u8], change: &dyn Fn(&mut Vec<u8>, usize)| {
        let mut bytes = good[..good.len() - 32].to_vec();
        let at = bytes
            .windows(what.len())
            .position(|found| found == what)
            .unwrap();
        change(&mut bytes, at);
        bytes.extend(blake3::hash(&bytes).as_bytes());
        fs::write(server.path("bad"), &bytes).unwrap();
    };
    let bad = server.path("bad");
    let import = ["state", "import", path(&bad), "--force", "--disk", &disk];
    with(b"SPEXPORT", &|bytes, at| bytes[at + 8] = 9);
    refused(&server, &import, "newer-export", "version 9");
    with(b"STILLPNT", &|bytes, at| bytes[at] = b'X');
    refused(&server, &import, "damaged-export", "header");
    with(b"SPJR", &|bytes, at| bytes[at] = b'X');
    refused(&server, &import, "damaged-export", "journal");
    with(b"\"disk_uuid\":\"", &|bytes, at| {
        let digit = &mut bytes[at + 13];
        *digit = if *digit == b'0' { b'1' } else { b'0' };
    });
    refused(&server, &import, "damaged-export", "another disk");
    with(b"eras", &|bytes, at| {
        bytes[at..at + 4].copy_from_slice(b"../a");
    });
    refused(&server, &import, "damaged-export", "strange name");
    // The first entry of the map.
    let map_damage = |bytes: &mut Vec<u8>, at: usize| bytes[at + 4 + 8 + 12] ^= 1;
    with(b"eras", &map_damage);
    refused(&server, &import, "damaged-export", "map is damaged");
}
