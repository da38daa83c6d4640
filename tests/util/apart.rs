//! Commands in a view of the file system of their own: what is mounted there nobody else sees, and it ends with them.

use std::path::Path;
use std::process::Command;

/// `inner`, after a shell has run `script` (mounts, mostly) in that view. It keeps its process id.
pub fn apart(script: &str, inner: &Command) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "/bin/sh", "-c"]);
    command.arg(format!("{script} && exec \"$@\"")).arg("sh").arg(inner.get_program()).args(inner.get_args());
    for (key, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command
}

/// Runs something in the view of a process that runs apart.
pub fn beside(process: i32, words: &[&str], path: &Path) {
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--target", &process.to_string()]).args(words).arg(path);
    let output = command.output().expect("runs");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}
