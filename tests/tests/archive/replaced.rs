//! Files that a restored disk takes the place of: who uses them, and whose they are.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::peers::with_qemu_nbd;
use stillpoint_tests::process::{Output, run};
use stillpoint_tests::seeds::rng;
use stillpoint_tests::server::binary;
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{KIB, LoopDevice, MIB, Server};

#[test]
fn an_image_that_somebody_serves_is_not_replaced() {
    let folder = folder();
    let server = Server::with_disk(MIB);
    let image = server.image("vda");
    let before = fs::metadata(&image).unwrap().ino();
    let refused = replace(&folder, &image, &["--json"]);
    refused.fails_with("image-locked", &format!("(pid {})", server.pid()));
    assert_eq!(fs::metadata(&image).unwrap().ino(), before);
    let refused = replace(&folder, &image, &[]);
    assert!(
        refused.error(1).contains("in use by another process"),
        "{refused}"
    );
    drop(server);

    let image = folder.beside("theirs");
    sparse_file(&image, MIB);
    for line in [
        &["-f", "raw", path(&image)][..],
        &["-r", "-f", "raw", path(&image)],
    ] {
        with_qemu_nbd(line, |_| {
            let refused = replace(&folder, &image, &["--json"]);
            refused.fails_with("image-locked", "in use by another process (pid ");
        });
    }
    replace(&folder, &image, &[]).ok();
    assert!(fs::read(&image).unwrap() == folder.disks[0].contents);
}

#[test]
fn a_device_that_somebody_serves_is_not_overwritten() {
    let folder = folder();
    let backing = folder.beside("backing");
    sparse_file(&backing, MIB);
    let device = LoopDevice::new(&backing);
    let builder = Server::builder();
    let state = builder.path("state");
    let disk = format!("vda={},state={}", path(device.path()), path(&state));
    let server = builder.disk_as(&disk).start();
    let refused = replace(&folder, device.path(), &["--json"]);
    refused.fails_with("image-locked", &format!("(pid {})", server.pid()));
    assert_eq!(
        server.open_live("vda").read(0, 512),
        Ok(vec![0; 512]),
        "nothing is written"
    );
    drop(server);
    with_qemu_nbd(&["-f", "raw", path(device.path())], |_| {
        let refused = replace(&folder, device.path(), &["--json"]);
        refused.fails_with("image-locked", "in use by another process");
    });
    replace(&folder, device.path(), &[]).ok();
    assert!(fs::read(device.path()).unwrap() == folder.disks[0].contents);
}

#[test]
fn a_file_of_the_backups_is_not_replaced() {
    let folder = folder();
    let file = folder.file(1, "vda.qcow2");
    let before = fs::read(&file).unwrap();
    let link = folder.beside("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for output in [&file, &link] {
        let refused = replace(&folder, output, &[]);
        assert!(
            refused.error(1).contains("a file of these backups"),
            "{refused}"
        );
        assert!(fs::read(&file).unwrap() == before);
    }
    // What somebody else has put there is theirs to replace.
    let other = folder.path().join("restored.raw");
    fs::write(&other, "other").unwrap();
    replace(&folder, &other, &[]).ok();
    folder.stillpoint("verify", &[]).ok();
}

#[test]
fn a_file_that_replaces_another_has_its_owner_and_mode() {
    let folder = folder();
    let output = folder.beside("image");
    let rights = || {
        let found = fs::metadata(&output).unwrap();
        (found.uid(), found.gid(), found.mode() & 0o7777)
    };
    fs::write(&output, "old").unwrap();
    fs::set_permissions(&output, fs::Permissions::from_mode(0o640)).unwrap();
    chown(&output, Some(65534), Some(65533)).unwrap();
    let restored = replace(&folder, &output, &[]);
    restored.ok();
    assert_eq!(rights(), (65534, 65533, 0o640));
    assert_eq!(restored.stderr.matches("note").count(), 0, "{restored}");

    // Without the right to give files away the group's rights are nobody's, and it is said.
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-chown").arg(binary());
    command.args(["restore", path(&folder.path()), "--force", "--quiet"]);
    let restored = run(command.args(["-o", path(&output)]));
    restored.ok();
    let (own, group) = (
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    assert_eq!(rights(), (own, group, 0o600));
    assert!(restored.stderr.contains("chown it"), "{restored}");

    // One that replaces nothing is for whoever made it alone.
    fs::remove_file(&output).unwrap();
    replace(&folder, &output, &[]).ok();
    assert_eq!(rights(), (own, group, 0o600));
}

fn folder() -> BackupFolder {
    let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
    folder.disks[0].contents[0] = 1;
    folder.pull(&mut rng(1));
    folder
}

fn replace(folder: &BackupFolder, output: &Path, more: &[&str]) -> Output {
    let line = ["--force", "-o", path(output)];
    folder.stillpoint("restore", &[&line[..], more].concat())
}
