//! Files in the state directory belong to its owner, also those that root makes: a command typed by root must not keep the
//! daemon, which is somebody else, from its own files.

use nix::unistd::geteuid;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;
use tracing::warn;

/// Gives what was just made to the owner of the directory it is in. Only root can, and only root need.
pub fn hand_over(path: &Path) {
    if !geteuid().is_root() {
        return;
    }
    let owner = |path: &Path| std::fs::symlink_metadata(path).map(|meta| (meta.uid(), meta.gid()));
    let (Ok(has), Some(Ok(should))) = (owner(path), path.parent().map(owner)) else { return };
    if has != should
        && let Err(error) = lchown(path, Some(should.0), Some(should.1))
    {
        warn!(path = %path.display(), %error, "is root's and not its directory's owner's: the daemon may be unable to use it");
    }
}
