//! Block devices are served as files are.

use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, sha256, sparse_file, tool};
use stillpoint_tests::{CHUNK, Guest, LoopDevice, MIB, Server};

const SIZE: u64 = 8 * MIB + 512;

#[test]
fn a_loop_device_is_frozen_mapped_and_pulled() {
    let builder = Server::builder();
    let file = builder.path("backing");
    sparse_file(&file, SIZE);
    let device = LoopDevice::new(&file);
    let state = builder.path("state");
    let disk = format!("vda={},state={}", device.path().display(), state.display());
    let mut server = builder.disk_as(&disk).start();

    let mut guest = Guest::new(&server, "vda");
    assert_eq!(guest.size(), SIZE);
    guest.write(100, &[1; 5000]);
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(9 * CHUNK - 1, &[2; 2]);
    guest.zeroes(20 * CHUNK, CHUNK, 0);
    guest.trim(30 * CHUNK, CHUNK);
    guest.write(SIZE - 1, &[3]);
    server.begin("b1", &["--since", "cp1"]);
    let (expected, map) = (sha256(&guest.disk), guest.expected_map());
    guest.write(0, &vec![4; 4 * MIB as usize]);

    let uri = server.frozen_uri("vda@b1");
    assert_eq!(nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"), map);
    assert_eq!(nbdcopy_sha256(&uri, server.directory()), expected);
    server.commit("b1");
    guest.flush();
    server.stop();
    assert!(
        std::fs::read(device.path()).unwrap() == guest.disk,
        "the device has all of it"
    );
}

#[test]
fn a_device_in_use_is_refused() {
    let builder = Server::builder();
    let file = builder.path("backing");
    sparse_file(&file, SIZE);
    let device = LoopDevice::new(&file);
    let disk = |state| format!("vda={},state={state}", device.path().display());
    let state = builder.path("state");
    let server = builder.disk_as(&disk(state.display().to_string())).start();
    let second = Server::builder();
    let state = second.path("state").display().to_string();
    second.disk_as(&disk(state)).start_and_fail().error(1);
    let device = device.path().to_str().unwrap();
    let output = tool("qemu-io", &["-f", "raw", "-c", "write 0 512", device]);
    assert_ne!(output.code(), 0, "{output}");
    server.is_well();
}
