//! The unit's own command line, under what of its settings can be had without systemd: user, capabilities, a read-only
//! file system, credentials, notifications.

use super::LONG;
use crate::util::{Spooltap, apart, cyrus};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// `systemd/NAME`, with drop-ins after it.
pub(super) struct Unit {
    settings: Vec<(String, String)>,
}

impl Unit {
    pub(super) fn read(names: &[&str]) -> Self {
        let mut settings = Vec::new();
        for name in names {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name);
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let lines = text.lines().filter(|line| !line.starts_with(['#', '[']));
            settings.extend(lines.filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())));
        }
        Self { settings }
    }

    /// The last value of a key.
    pub(super) fn get(&self, key: &str) -> &str {
        let found = self.settings.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str()).unwrap_or_else(|| panic!("the unit has no {key}"))
    }

    fn seconds(&self, key: &str) -> Duration {
        Duration::from_secs(self.get(key).parse().expect("seconds"))
    }

    pub(super) fn stop_timeout(&self) -> Duration {
        self.seconds("TimeoutStopSec")
    }
}

/// Where a unit's command runs: a state directory and credentials of its own, and a socket for notifications.
pub(super) struct Stage {
    pub(super) dir: TempDir,
    pub(super) unit: Unit,
    pub(super) socket: UnixDatagram,
    owner: u32,
    group: u32,
}

impl Stage {
    /// `config` is spooltap.toml; the state directory is added to it.
    pub(super) fn new(unit: Unit, config: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("spooltap-unit-").tempdir().expect("directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        let socket = UnixDatagram::bind(dir.path().join("notify")).expect("binds");
        fs::set_permissions(dir.path().join("notify"), fs::Permissions::from_mode(0o666)).expect("mode");
        socket.set_read_timeout(Some(LONG)).expect("sets");
        let account = nix::unistd::User::from_name(unit.get("User")).expect("looks up");
        // The one of sysusers.conf is not there where nothing is installed: any number nobody has is as good.
        let (owner, group) = account.map_or((64_321, 64_321), |user| (user.uid.as_raw(), user.gid.as_raw()));
        let stage = Self { dir, unit, socket, owner, group };
        for name in ["state", "credentials"] {
            fs::create_dir(stage.path(name)).expect("makes");
        }
        stage.configure(config);
        // LoadCredential= gives a copy that the unit's user may read.
        fs::write(stage.path("credentials/spooltap-password"), cyrus::PASSWORD).expect("writes");
        for name in ["state", "credentials", "credentials/spooltap-password"] {
            chown(stage.path(name), Some(owner), Some(group)).expect("gives");
        }
        fs::set_permissions(stage.path("credentials/spooltap-password"), fs::Permissions::from_mode(0o400))
            .expect("mode");
        fs::copy(env!("CARGO_BIN_EXE_spooltap"), stage.path("spooltap")).expect("copies");
        stage
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn configure(&self, config: &str) {
        fs::write(self.path("spooltap.toml"), format!("state = {:?}\n{config}", self.path("state"))).expect("writes");
    }

    /// A command under the unit's user, capabilities and view of the file system.
    pub(super) fn confined(&self, words: &[&str]) -> Command {
        assert_eq!(self.unit.get("ProtectSystem"), "strict");
        assert_eq!(self.unit.get("NoNewPrivileges"), "yes");
        let capabilities = |key: &str| -> String {
            let names = self.unit.get(key).split_ascii_whitespace();
            let kept = names.map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
            format!("-all{}", kept.collect::<String>())
        };
        let (bounding, ambient) = (capabilities("CapabilityBoundingSet"), capabilities("AmbientCapabilities"));
        let state = self.path("state");
        let script = format!(
            "mount --bind / / && mount -o remount,bind,ro / && mount --bind '{0}' '{0}' && mount -o remount,bind,rw '{0}'",
            state.display()
        );
        let mut inner = Command::new("setpriv");
        inner.arg(format!("--reuid={}", self.owner)).arg(format!("--regid={}", self.group));
        inner.args(["--clear-groups", "--no-new-privs"]);
        // The bounding set goes last: nothing could be made ambient that is not in it.
        inner.args([format!("--inh-caps={ambient}"), format!("--ambient-caps={ambient}")]);
        inner.arg(format!("--bounding-set={bounding}")).args(words);
        let mut command = apart(&script, &inner);
        command.env("SPOOLTAP_CONFIG", self.path("spooltap.toml")).env_remove("SPOOLTAP_LOG");
        command.env("CREDENTIALS_DIRECTORY", self.path("credentials")).env_remove("SPOOLTAP_PASSWORD");
        command
    }

    /// What ExecStart says; `environment` beside what systemd gives.
    pub(super) fn start(&self, environment: &[(&str, String)]) -> Spooltap {
        let line = self.unit.get("ExecStart").to_owned();
        let program = self.path("spooltap").display().to_string();
        let mut words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[0], "/usr/bin/spooltap");
        words[0] = &program;
        let mut command = self.confined(&words);
        command.env("NOTIFY_SOCKET", self.path("notify")).envs(environment.iter().cloned());
        Spooltap::spawn(command, &self.path("state")).expect("starts")
    }

    /// Exit code and figures, by the program and for its user.
    pub(super) fn status(&self) -> (i32, serde_json::Value) {
        let output = self.confined(&[&self.path("spooltap").display().to_string(), "status", "--json"]).output();
        let output = output.expect("runs");
        (output.status.code().expect("a code"), serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// Waits for a notification with a line that begins like this.
    #[track_caller]
    pub(super) fn told(&self, what: &str) -> String {
        let end = Instant::now() + LONG;
        let mut buffer = [0; 4096];
        while Instant::now() < end {
            let count = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error}"));
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            if text.lines().any(|line| line.starts_with(what)) {
                return text;
            }
        }
        panic!("{what} is not told");
    }

    /// What was told since the last look.
    pub(super) fn tellings(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        self.socket.set_nonblocking(true).expect("sets");
        let mut out = Vec::new();
        while let Ok(count) = self.socket.recv(&mut buffer) {
            out.extend(String::from_utf8_lossy(&buffer[..count]).lines().map(str::to_owned));
        }
        self.socket.set_nonblocking(false).expect("sets");
        out
    }
}
