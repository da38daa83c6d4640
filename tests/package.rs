//! The Debian package: what is in it, what it does on a clean Debian root, and what it leaves there.

#[path = "package/page.rs"]
mod page;

use super::util::store;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use tempfile::TempDir;

/// What these tests need beside Cyrus; `tests/run` installs it.
fn tools(names: &[&str]) -> bool {
    let found = |name: &&&str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(name).exists())
    };
    let missing: Vec<_> = names.iter().filter(|name| !found(name)).collect();
    if missing.is_empty() && nix::unistd::geteuid().is_root() {
        return true;
    }
    let text = format!("SKIPPED: needs root and {missing:?}, see tests/run\n");
    assert!(std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_none(), "{text}");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
    false
}

/// The package around the program under test, made by the script that makes the real one; only the compiler's profile and
/// the compression are others.
fn package() -> &'static Path {
    static MADE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("directory");
        let mut build = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/deb/build"));
        build.args([env!("CARGO_BIN_EXE_spooltap"), "--fast", "--strip"]).env("CARGO_TARGET_DIR", dir.path());
        succeeds(&mut build);
        let found = fs::read_dir(dir.path().join("debian")).expect("made").flatten().map(|file| file.path());
        let path = found.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb")).expect("a package");
        (dir, path)
    });
    path
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {out}{err}");
    out.into_owned()
}

#[test]
fn the_package_holds_everything_in_its_place() {
    if !tools(&["cargo-deb", "dpkg-deb"]) {
        return;
    }
    let list = succeeds(Command::new("dpkg-deb").arg("-c").arg(package()));
    let files: BTreeMap<String, &str> = list
        .lines()
        .filter_map(|line| {
            let (mode, rest) = line.split_once(' ')?;
            let path = rest.split_once("./")?.1;
            Some((path.to_owned(), mode))
        })
        .collect();
    let wanted = "usr/bin/spooltap etc/spooltap/spooltap.toml \
        usr/lib/systemd/system/spooltap.service usr/lib/systemd/system/spooltap@.service \
        usr/lib/systemd/system/spooltap-scan.service usr/lib/systemd/system/spooltap-scan.timer \
        usr/lib/systemd/system/spooltap-serve.service usr/lib/systemd/system/spooltap-serve.socket \
        usr/lib/sysusers.d/spooltap.conf usr/lib/tmpfiles.d/spooltap.conf usr/lib/sysctl.d/60-spooltap.conf \
        usr/share/bash-completion/completions/spooltap usr/share/zsh/vendor-completions/_spooltap \
        usr/share/fish/vendor_completions.d/spooltap.fish usr/share/man/man1/spooltap.1.gz \
        usr/share/man/man1/spooltap-run.1.gz usr/share/man/man5/spooltap.toml.5.gz usr/share/man/man7/spooltap.7.gz \
        usr/share/spooltap/drop-ins/own-user.conf usr/share/spooltap/monitoring/rules.yml \
        usr/share/spooltap/monitoring/dashboard.json usr/share/doc/spooltap/copyright \
        usr/share/doc/spooltap/changelog.gz usr/share/doc/spooltap/changelog.Debian.gz usr/share/doc/spooltap/crates \
        usr/share/doc/spooltap/operations.md";
    for path in wanted.split_whitespace() {
        let mode = files.get(path).unwrap_or_else(|| panic!("{path} is not in the package: {list}"));
        let expected = if path == "usr/bin/spooltap" { "-rwxr-xr-x" } else { "-rw-r--r--" };
        assert_eq!(*mode, expected, "{path}");
    }
    for link in ["sync_client", "sync_server", "cyr_synclog"] {
        let shown = format!("usr/lib/spooltap/{link} -> ../../bin/spooltap");
        assert!(files.get(&shown).is_some_and(|mode| mode.starts_with('l')), "{shown}: {list}");
    }
    // Nothing is where only an admin, or the system, puts things.
    for path in files.keys() {
        assert!(path.is_empty() || path.starts_with("usr") || path.starts_with("etc"), "{path}");
    }
    let about = succeeds(Command::new("dpkg-deb").args(["-f"]).arg(package()));
    let version = concat!("Version: ", env!("CARGO_PKG_VERSION"), "-1");
    assert!(about.contains("Package: spooltap\n") && about.contains(version), "{about}");
    assert!(about.contains("Depends: libc6"), "{about}");
    let crates = succeeds(
        Command::new("sh")
            .arg("-c")
            .arg(format!("dpkg-deb --fsys-tarfile {} | tar xO ./usr/share/doc/spooltap/crates", package().display())),
    );
    assert!(crates.lines().count() > 50 && crates.contains("rustls v"), "{crates}");
}

/// What is below a root, but for what dpkg itself writes at each step.
fn paths(root: &Path) -> BTreeSet<String> {
    let walk = walkdir::WalkDir::new(root).same_file_system(true).into_iter().flatten();
    let path = |entry: walkdir::DirEntry| entry.path().strip_prefix(root).ok().map(|path| path.display().to_string());
    let own = |path: &String| !["var/lib/dpkg/", "var/log/", "proc/"].iter().any(|start| path.starts_with(start));
    // Copies that useradd makes, and its lock.
    let copies = ["etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/.pwd.lock"];
    walk.filter_map(path).filter(own).filter(|path| !copies.contains(&path.as_str())).collect()
}

const ON_A_CLEAN_ROOT: &str = r#"
dpkg -i /spooltap.deb
[ "$(stat -c '%U %G %a' /etc/spooltap)" = "root mail 750" ]
getent passwd spooltap
for unit in /usr/lib/systemd/system/spooltap*; do
    case $(systemctl is-enabled "$(basename "$unit" | sed 's/@/@x/')") in enabled*) echo "$unit is enabled"; exit 1 ;; esac
done
systemctl enable spooltap.service spooltap-scan.timer spooltap@two.service
mkdir -p /srv/archive && chown cyrus:mail /srv/archive
echo 'replica = ["file:///srv/archive"]' >/etc/spooltap/spooltap.toml
echo secret | install -m 0600 /dev/stdin /etc/spooltap/password
echo == check
spooltap check
echo == units
unit=/usr/lib/systemd/system/spooltap.service
value() { sed -n "s/^$1=//p" "$unit"; }
install -d -o "$(value User)" -g "$(value Group)" -m 0700 /var/lib/spooltap
as() { setpriv --reuid "$(value User)" --regid "$(value Group)" --clear-groups -- "$@"; }
as $(value ExecStartPre)
(exec setpriv --reuid "$(value User)" --regid "$(value Group)" --clear-groups -- $(value ExecStart)) >/var/log/spooltap.log 2>&1 &
main=$!
tries=0
until spooltap status >/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { cat /var/log/spooltap.log; exit 1; }
    sleep 0.2
done
spooltap drain --wait --timeout 120 || { cat /var/log/spooltap.log; exit 1; }
spooltap verify
! as touch /etc/spooltap/x 2>/dev/null
kill -HUP $main
kill $main
wait $main
echo == purge
dpkg --remove spooltap
[ -e /etc/spooltap/spooltap.toml ] && [ -d /var/lib/spooltap ]
! ls /etc/systemd/system/*.wants/spooltap* 2>/dev/null
dpkg --purge spooltap
"#;

#[test]
fn it_is_installed_run_and_purged_on_a_clean_debian() {
    let Some(packed) = std::env::var_os("SPOOLTAP_DEBIAN_ROOT").map(PathBuf::from).filter(|_| tools(&["cargo-deb"]))
    else {
        assert!(std::env::var_os("SPOOLTAP_REQUIRE_CYRUS").is_none(), "SPOOLTAP_DEBIAN_ROOT names no root");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs a Debian root, see tests/run\n");
        return;
    };
    let dir = tempfile::tempdir().expect("directory");
    let root = dir.path().join("root");
    fs::create_dir(&root).expect("directory");
    succeeds(Command::new("tar").arg("-C").arg(&root).args(["--exclude=./dev/*", "-xf"]).arg(&packed));
    // The machine as an admin has it: a user who owns a store, and that store.
    let source = store("3.6.1-a");
    let inside = |path: &Path| root.join(path.strip_prefix("/").expect("absolute"));
    let place = inside(source.dir.path());
    fs::create_dir_all(place.parent().expect("has one")).expect("directory");
    succeeds(Command::new("cp").arg("-a").arg(source.dir.path()).arg(&place));
    fs::copy(&source.conf, root.join("etc/imapd.conf")).expect("imapd.conf");
    fs::copy(package(), root.join("spooltap.deb")).expect("package");
    let chroot = |script: &str| {
        // Nothing of it outlives the test, and nothing of it is mounted outside.
        let mut command = Command::new("timeout");
        command.args([
            "--kill-after=5",
            "300",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "sh",
            "-euc",
        ]);
        let around = "mount --bind \"$0\" \"$0\"; mount -t proc proc \"$0/proc\"; mount -t tmpfs tmpfs \"$0/dev\"; \
            for node in null zero urandom; do touch \"$0/dev/$node\"; mount --bind /dev/$node \"$0/dev/$node\"; done; \
            ln -s /proc/self/fd/0 \"$0/dev/stdin\"; exec chroot \"$0\" /bin/bash -euc \"$1\"";
        command.arg(around).arg(&root).arg(script).env_clear();
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        succeeds(&mut command)
    };
    chroot(&format!(
        "useradd -r -g mail cyrus && chown -R cyrus:mail {0} && chmod 755 {0}",
        source.dir.path().display()
    ));
    let (before, users) = (paths(&root), fs::read(root.join("etc/passwd")).expect("passwd"));
    let said = chroot(ON_A_CLEAN_ROOT);
    let checked = said.split("== check\n").nth(1).and_then(|rest| rest.split("== units\n").next()).expect("checked");
    assert!(checked.contains("file:///srv/archive") && checked.contains("mailboxes"), "{checked}");
    let (after, mut left) = (paths(&root), BTreeSet::new());
    assert_eq!(before.difference(&after).collect::<Vec<_>>(), Vec::<&String>::new(), "is missing");
    for path in after.difference(&before).filter(|path| !path.starts_with("srv/archive/")) {
        left.insert(path.as_str());
    }
    // What somebody wrote himself.
    assert_eq!(left, BTreeSet::from(["etc/spooltap", "etc/spooltap/password", "srv/archive"]));
    assert_eq!(fs::metadata(root.join("etc/spooltap/password")).expect("is there").permissions().mode() & 0o777, 0o600);
    assert!(fs::read(root.join("etc/passwd")).expect("passwd") == users, "users are as they were");
}
