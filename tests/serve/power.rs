//! The power fails under load: everything that was acknowledged is on the disk. A file system of its own, with a journal, in a
//! file; `mount -o remount,abort` is what ends it: nothing that the kernel has in memory gets there any more.

use super::super::cyrus_dir::Place;
use super::super::util::{Options, cyrus, eventually};
use super::kill::{generation, holds, kill, left, live};
use super::{Kind, Served, open};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Power cuts in CI; more by `SPOOLTAP_POWER_CUTS`.
const CUTS: u64 = 4;

fn done(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// A disk that is thrown away at the end.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// `None` where this machine does not let us; that is said on stderr.
    fn new(dir: &Path) -> Option<Self> {
        let disk = Self { image: dir.join("image"), at: dir.join("disk") };
        std::fs::create_dir(&disk.at).expect("directory");
        std::fs::File::create(&disk.image).and_then(|file| file.set_len(256 << 20)).expect("image");
        if done(Command::new("mkfs.ext4").arg("-q").arg(&disk.image)) && disk.mount() {
            return Some(disk);
        }
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs mkfs.ext4 and mount -o loop\n");
        None
    }

    fn mount(&self) -> bool {
        done(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.at))
    }

    /// From here on nothing reaches it.
    fn cut(&self) {
        assert!(done(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.at)));
    }

    /// As it is found when the power is back. Other tests have mounts of their own, and with them a copy of this one for a
    /// while: as long as there is one, the file system is the old one, to which nothing can be written.
    fn back(&self) {
        let gone = || done(Command::new("umount").arg(&self.at)) || !done(Command::new("mountpoint").arg(&self.at));
        let back = || gone() && self.mount();
        let writable = || std::fs::File::create(self.at.join("probe")).is_ok();
        let is_back = eventually(Duration::from_secs(60), || (back() && writable()).then_some(()));
        assert!(is_back.is_some(), "is mounted, and nothing can be written to it");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        done(Command::new("umount").arg("-l").arg(&self.at));
    }
}

/// How the disk is left after all of them; `None` where this machine does not let us.
fn cut_again_and_again(kind: Kind, dir: &Path) -> Option<Disk> {
    let disk = Disk::new(dir)?;
    let cuts: u64 = std::env::var("SPOOLTAP_POWER_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(CUTS);
    let mut boxes = generation(0);
    for cut in 0..cuts {
        let served = Served::of(kind, &disk.at, &[]);
        live(&served, &mut boxes, Duration::from_micros(100_000 + cut * 7919 % 90_000), || {
            disk.cut();
            kill(&served);
        });
        served.kill9();
        disk.back();
        // What was promised is kept before anybody else reads a directory: `docs/cyrus-directory.md` says so.
        if kind == Kind::Cyrus {
            drop(open(&Served::of(kind, &disk.at, &[])));
        }
        holds(&*left(kind, &disk.at), &boxes, &format!("after power cut {cut}"));
    }
    let messages: usize = boxes.iter().map(|(_, acked)| acked.snapshot.records.len()).sum();
    println!("{cuts} power cuts, {messages} messages acknowledged");
    assert!(messages as u64 >= cuts);
    Some(disk)
}

#[test]
fn what_was_acknowledged_is_there_after_a_power_cut() {
    let dir = tempfile::tempdir().expect("directory");
    cut_again_and_again(Kind::Archive, dir.path());
}

/// And a real server finds nothing to mend.
#[test]
fn what_was_acknowledged_is_there_after_a_power_cut_in_a_cyrus_directory() {
    if !cyrus::installed() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let Some(disk) = cut_again_and_again(Kind::Cyrus, dir.path()) else { return };
    // Opened once more: what had come and was not acknowledged is taken away then.
    drop(open(&Served::of(Kind::Cyrus, &disk.at, &[])));
    let mut place = Place::with_copy(Options::new(), &Kind::Cyrus.place(&disk.at)).expect("is copied");
    place.boot().expect("starts");
    let found = place.mendable().expect("is checked");
    assert!(found.is_empty(), "{found:?}");
}
