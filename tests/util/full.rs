//! A disk that is full: a small file system in memory that only one process and its children see.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A command that runs another one with an empty file system of so many KiB at that directory, which has to exist. `None`
/// where this machine does not let us; that is said on stderr.
pub fn small_disk(dir: &Path, kib: u32) -> Option<Command> {
    const SCRIPT: &str = "mount -t tmpfs -o size=$2k none \"$1\" && cd / && shift 2 && exec \"$@\"";
    let unshared = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        command
    };
    let allowed = unshared().arg("mount -t tmpfs none /mnt").output().is_ok_and(|output| output.status.success());
    if !allowed {
        let required = std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_some();
        assert!(!required, "a name space with a file system of its own is needed (unshare --user --mount)");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs unshare --user --mount\n");
        return None;
    }
    let mut command = unshared();
    command.arg(SCRIPT).arg("sh").arg(dir).arg(kib.to_string());
    Some(command)
}

/// A path as that process sees it.
pub fn seen_by(pid: i32, path: &Path) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join("root").join(path.strip_prefix("/").unwrap_or(path))
}

/// Fills what is left of a file system, but for so many KiB.
pub fn fill(filler: &Path, keep_kib: usize) {
    let mut file = fs::File::create(filler).expect("a file");
    while std::io::Write::write_all(&mut file, &[b'x'; 1024]).is_ok() {}
    let size = file.metadata().expect("is there").len();
    file.set_len(size.saturating_sub((keep_kib << 10) as u64)).expect("is cut");
}
