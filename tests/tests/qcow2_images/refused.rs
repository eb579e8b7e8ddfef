//! What is refused, by its name, before anything else is looked at.

use stillpoint_tests::MIB;
use stillpoint_tests::tools::{path, tool};

use crate::images::{Images, open, poke, refusal};

const INCOMPATIBLE: u64 = 72;
const FEATURES: u64 = 0x70;

#[test]
fn encrypted_images_are_refused() {
    let images = Images::new();
    let image = images.at("image");
    let secret = "secret,id=s,data=geheim";
    let args = ["create", "-q", "--object", secret, "-f", "qcow2", "-o"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    tool(
        "qemu-img",
        &[&args[..], &[options, path(&image), "1M"]].concat(),
    )
    .ok();
    assert!(
        refusal(&image).contains("encrypted (LUKS)"),
        "{}",
        refusal(&image)
    );
    let image = images.create("other", "", &[], MIB);
    for (method, name) in [(1_u32, "AES"), (2, "LUKS"), (7, "method 7")] {
        poke(&image, 32, &method.to_be_bytes());
        assert!(refusal(&image).contains(&format!("encrypted ({name})")));
    }
}

#[test]
fn features_that_are_not_known_are_refused_by_their_names() {
    let images = Images::new();
    let image = images.create("image", "", &[], MIB);
    poke(&image, INCOMPATIBLE, &(1_u64 << 5 | 1 << 63).to_be_bytes());
    assert!(
        refusal(&image).contains("features that are not known: bit 5, bit 63"),
        "{}",
        refusal(&image)
    );
    // The first name in the table is that of the bit for dirty.
    poke(&image, FEATURES + 8, &[0, 5]);
    assert!(
        refusal(&image).contains("bit 5 ('dirty bit'), bit 63"),
        "{}",
        refusal(&image)
    );
}

#[test]
fn corrupt_and_dirty_images_are_refused() {
    let images = Images::new();
    let image = images.create("image", "lazy_refcounts=on", &[], MIB);
    poke(&image, INCOMPATIBLE, &1_u64.to_be_bytes());
    assert!(refusal(&image).contains("marked as dirty"));
    poke(&image, INCOMPATIBLE, &2_u64.to_be_bytes());
    assert!(refusal(&image).contains("marked as corrupt"));
    // A user who is told of one thing learns of the worse.
    poke(&image, INCOMPATIBLE, &3_u64.to_be_bytes());
    assert!(refusal(&image).contains("marked as corrupt"));
}

#[test]
fn a_refusal_comes_before_anything_else_that_is_wrong() {
    let images = Images::new();
    let image = images.create("image", "", &[], MIB);
    // No such cluster size, no such place for a table, a backing file with a name of 4 GiB.
    poke(&image, 40, &u64::MAX.to_be_bytes());
    poke(&image, 16, &u32::MAX.to_be_bytes());
    poke(&image, 8, &1_u64.to_be_bytes());
    poke(&image, 20, &99_u32.to_be_bytes());
    poke(&image, 100, &1_u32.to_be_bytes());
    assert!(refusal(&image).contains("damaged"), "{}", refusal(&image));
    poke(&image, INCOMPATIBLE, &2_u64.to_be_bytes());
    assert!(
        refusal(&image).contains("marked as corrupt"),
        "{}",
        refusal(&image)
    );
}

#[test]
fn what_is_no_image_of_a_known_version_is_refused() {
    let images = Images::new();
    let image = images.create("image", "", &[], MIB);
    poke(&image, 4, &1_u32.to_be_bytes());
    assert!(refusal(&image).contains("version 1"));
    poke(&image, 0, b"raw!");
    assert!(refusal(&image).contains("no qcow2 image"));
    std::fs::write(&image, b"QFI").unwrap();
    assert!(refusal(&image).contains("no qcow2 image"));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let images = Images::new();
    let cases: [(u64, &[u8], &str); 8] = [
        (20, &8_u32.to_be_bytes(), "512 bytes to 2 MiB"),
        (20, &22_u32.to_be_bytes(), "512 bytes to 2 MiB"),
        (24, &u64::MAX.to_be_bytes(), "larger than its tables"),
        (24, &(1_u64 << 40).to_be_bytes(), "too short for the disk"),
        (40, &512_u64.to_be_bytes(), "at no cluster"),
        (96, &7_u32.to_be_bytes(), "reference counts"),
        (100, &72_u32.to_be_bytes(), "too short"),
        (104, &[1], "two things about its compression"),
    ];
    for (at, bytes, expected) in cases {
        let image = images.create("image", "", &[], MIB);
        open(&image);
        poke(&image, at, bytes);
        let told = refusal(&image);
        assert!(told.contains(expected), "{at}: {told}");
    }
}
