//! A file system mounted over a watched directory raises no inotify event: the watch stays with what is hidden now.
//! The kernel does wake whoever polls `/proc/self/mountinfo`, which is enough.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Mounts above, at and below the roots.
pub struct Mounts {
    /// `None` where `/proc` is not mounted; then mounts go unnoticed.
    file: Option<File>,
    near: BTreeSet<(Vec<u8>, PathBuf)>,
}

impl Mounts {
    pub fn new() -> Self {
        let file = File::open("/proc/self/mountinfo");
        if let Err(error) = &file {
            tracing::warn!(%error, "cannot watch mounts, a store mounted while we run will be found by comparison only");
        }
        Self { file: file.ok(), near: BTreeSet::new() }
    }

    /// Becomes ready for POLLPRI when anything is mounted or unmounted.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Reads the mounts; true when those that concern `roots` are others than at the last call.
    pub fn changed<'r>(&mut self, roots: impl Iterator<Item = &'r Path>) -> bool {
        let Some(file) = &mut self.file else { return false };
        let mut text = Vec::new();
        if file.rewind().is_err() || file.read_to_end(&mut text).is_err() {
            return false;
        }
        let roots: Vec<PathBuf> = roots.map(real).collect();
        let near = mount_points(&text)
            .filter(|(_, point)| roots.iter().any(|root| root.starts_with(point) || point.starts_with(root)))
            .collect();
        let before = std::mem::replace(&mut self.near, near);
        before != self.near
    }
}

/// Mount points strictly below `root`, which is a real path.
pub fn below(root: &Path) -> Vec<PathBuf> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let points = mount_points(&text).map(|(_, point)| point);
    points.filter(|point| point != root && point.starts_with(root)).collect()
}

/// The path without symbolic links, as far as it exists.
pub fn real(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    match found {
        Some((above, real)) => match path.strip_prefix(above) {
            Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
            _ => real,
        },
        None => path.to_owned(),
    }
}

/// Mount points strictly below `root` that others may change without this kernel's knowledge.
pub fn remote_below(root: &Path) -> Vec<PathBuf> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let root = real(root);
    let lines = text.split(|&byte| byte == b'\n').filter(|line| {
        let mut fields = line.split(|&byte| byte == b' ').skip_while(|field| *field != b"-").skip(1);
        fields.next().is_some_and(super::ground::is_remote_name)
    });
    let points = lines.flat_map(|line| mount_points(line).map(|(_, point)| point).collect::<Vec<_>>());
    points.filter(|point| *point != root && point.starts_with(&root)).collect()
}

/// Mount id and mount point of each line.
fn mount_points(text: &[u8]) -> impl Iterator<Item = (Vec<u8>, PathBuf)> {
    text.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let id = fields.next()?.to_vec();
        let point = fields.nth(3)?;
        Some((id, std::ffi::OsString::from_vec(unescape(point)).into()))
    })
}

/// Blank, tab, newline and backslash stand there as `\040`, `\011`, `\012`, `\134`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = (first == b'\\').then(|| tail.get(..3)).flatten();
        let byte = digits.and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        // The example of proc_pid_mountinfo(5), and a name with a blank.
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                     37 35 8:1 / /srv/two\\040words rw - xfs /dev/sdb1 rw\n";
        let points: Vec<_> = mount_points(text).collect();
        assert_eq!(
            points,
            [(b"36".to_vec(), PathBuf::from("/mnt2")), (b"37".to_vec(), PathBuf::from("/srv/two words"))]
        );
    }

    #[test]
    fn the_second_look_sees_no_change() {
        let mut mounts = Mounts::new();
        let roots = [Path::new("/"), Path::new("/no/such/place")];
        assert!(mounts.changed(roots.into_iter()), "at least the root is mounted");
        assert!(!mounts.changed(roots.into_iter()));
    }
}
