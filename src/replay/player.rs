//! Makes the recorded operations, in recorded order, on one thread.

use super::ReplayError;
use super::locks::{Locks, open_file};
use super::ops::{Line, Op};
use super::recording::{Lines, Recording, format_error, inside};
use base64::Engine as _;
use nix::fcntl::{AT_FDCWD, FallocateFlags, fallocate};
use nix::sys::stat::{UtimensatFlags, futimens, utimensat};
use nix::sys::time::TimeSpec;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How fast to play.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// Without any pause.
    Asap,
    /// With the recorded pauses divided by this factor; 1.0 is as it was, 20.0 twenty times as fast.
    Recorded(f64),
}

/// A moment at which the state of the store is known.
#[derive(Clone, Debug)]
pub struct Mark {
    pub step: u64,
    pub what: String,
    /// What IMAP showed: the `state` of the recording's truth line.
    pub truth: Value,
}

/// Where in a step the player is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The command is about to be sent.
    Begin,
    /// The answer has come and the store is at rest.
    Done,
    /// The state was read over IMAP.
    Mark,
}

/// A step line, as it is passed.
#[derive(Clone, Debug)]
pub struct StepEvent {
    pub step: u64,
    pub what: String,
    pub phase: Phase,
    /// The server's answer, in `Phase::Done` only.
    pub result: Option<String>,
}

type OnStep = Box<dyn FnMut(&StepEvent) + Send>;

/// Plays one recording on one unpacked store. Locks are taken as the server took them (see `replay::locks`), so a
/// reader that locks makes the player wait, and the other way round. Syncs are left out: nobody but a power cut
/// sees them.
pub struct Player {
    root: PathBuf,
    lines: Lines,
    truths: Box<dyn Iterator<Item = Result<(u64, Value), ReplayError>> + Send>,
    files: HashMap<u64, File>,
    locks: Locks,
    on_step: Option<OnStep>,
    played: u64,
}

/// Recorded time against ours. Begins anew at each mark, so that time spent there is not made up for.
struct Pace {
    factor: Option<f64>,
    since: Option<(Instant, u64)>,
}

impl Player {
    /// `root` is the folder in which `recording` was unpacked.
    pub fn new(recording: &Recording, root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
            lines: recording.op_lines(),
            truths: Box::new(recording.truths()),
            files: HashMap::new(),
            locks: Locks::default(),
            on_step: None,
            played: 0,
        }
    }

    /// Calls `on_step` with every step line, on the player's thread, before anything after that line is played.
    pub fn on_step(&mut self, on_step: impl FnMut(&StepEvent) + Send + 'static) {
        self.on_step = Some(Box::new(on_step));
    }

    /// Lines played so far.
    pub fn played(&self) -> u64 {
        self.played
    }

    /// Plays up to the next mark. `None` after the last one: the end has been played as well.
    pub fn next_mark(&mut self, speed: Speed) -> Result<Option<Mark>, ReplayError> {
        let mut pace = Pace { factor: speed.factor(), since: None };
        while let Some(line) = self.lines.next() {
            let line = line.map_err(|error| format_error("operations", error))?;
            let line: Line = serde_json::from_str(&line).map_err(|error| format_error("operations", error))?;
            pace.wait(line.t);
            self.play(&line).map_err(|cause| ReplayError::Operation { n: line.n, op: line.op.describe(), cause })?;
            self.played += 1;
            if let Some(event) = step_event(&line.op)
                && let Some(on_step) = &mut self.on_step
            {
                on_step(&event);
            }
            if let Op::Mark { step, what, truth } = line.op {
                return Ok(Some(Mark { step, what, truth: self.truth(truth)? }));
            }
        }
        Ok(None)
    }

    /// Plays everything that is left, without pauses.
    pub fn finish(&mut self) -> Result<(), ReplayError> {
        while self.next_mark(Speed::Asap)?.is_some() {}
        Ok(())
    }

    fn truth(&mut self, wanted: u64) -> Result<Value, ReplayError> {
        for line in self.truths.by_ref() {
            let (step, state) = line?;
            if step == wanted {
                return Ok(state);
            }
        }
        Err(format_error("truth", format!("no line for step {wanted}")))
    }

    fn play(&mut self, line: &Line) -> io::Result<()> {
        let at = |path: &str| inside(&self.root, path);
        match &line.op {
            Op::Begin { .. } | Op::Done { .. } | Op::Mark { .. } | Op::Fsync { .. } | Op::Fdatasync { .. } => {}
            Op::Open { h, path, flags, mode } => {
                let file = open(&at(path)?, flags, mode.as_deref())?;
                self.files.insert(*h, file);
            }
            Op::Pwrite { h, off, data, zeros } => {
                let bytes = match (data, zeros) {
                    (Some(data), _) => base64::engine::general_purpose::STANDARD
                        .decode(data)
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
                    (None, zeros) => vec![0; zeros.unwrap_or_default() as usize],
                };
                open_file(&self.files, *h)?.write_all_at(&bytes, *off)?;
            }
            Op::Ftruncate { h, size } => open_file(&self.files, *h)?.set_len(*size)?,
            Op::Close { h } => drop(self.files.remove(h)),
            Op::Lock { h, r#type, start, len } => {
                self.locks.lock(&self.files, line.pid, *h, *r#type, (*start, *len))?;
            }
            Op::Unlock { h, start, len } => self.locks.unlock(&self.files, line.pid, *h, (*start, *len))?,
            Op::Rename { path, to } => fs::rename(at(path)?, at(to)?)?,
            Op::Link { path, to } => fs::hard_link(at(path)?, at(to)?)?,
            Op::Symlink { target, path } => symlink(target, at(path)?)?,
            Op::Unlink { path } => fs::remove_file(at(path)?)?,
            Op::Rmdir { path } => fs::remove_dir(at(path)?)?,
            Op::Mkdir { path, mode } => {
                let (path, mode) = (at(path)?, octal(mode)?);
                fs::DirBuilder::new().mode(mode).create(&path)?;
                give_mode(&path, mode)?;
            }
            Op::Chmod { path, mode } => fs::set_permissions(at(path)?, Permissions::from_mode(octal(mode)?))?,
            Op::Fchmod { h, mode } => {
                open_file(&self.files, *h)?.set_permissions(Permissions::from_mode(octal(mode)?))?;
            }
            Op::Truncate { path, size } => nix::unistd::truncate(&at(path)?, *size as i64)?,
            Op::Utimens { path, atime_ns, mtime_ns } => {
                let (atime, mtime) = (time(*atime_ns), time(*mtime_ns));
                utimensat(AT_FDCWD, &at(path)?, &atime, &mtime, UtimensatFlags::FollowSymlink)?;
            }
            Op::Futimens { h, atime_ns, mtime_ns } => {
                futimens(open_file(&self.files, *h)?, &time(*atime_ns), &time(*mtime_ns))?;
            }
            Op::Fallocate { h, off, len } => {
                fallocate(open_file(&self.files, *h)?, FallocateFlags::empty(), *off, *len)?;
            }
        }
        Ok(())
    }
}

impl Speed {
    fn factor(self) -> Option<f64> {
        match self {
            Self::Recorded(factor) if factor > 0.0 => Some(factor),
            _ => None,
        }
    }
}

impl Pace {
    fn wait(&mut self, t: u64) {
        let Some(factor) = self.factor else { return };
        let (began, first) = *self.since.get_or_insert_with(|| (Instant::now(), t));
        let due = Duration::from_secs_f64(t.saturating_sub(first) as f64 / 1000.0 / factor);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
}

fn step_event(op: &Op) -> Option<StepEvent> {
    let (step, what, phase, result) = match op {
        Op::Begin { step, what } => (step, what, Phase::Begin, None),
        Op::Done { step, what, result } => (step, what, Phase::Done, Some(result.clone())),
        Op::Mark { step, what, .. } => (step, what, Phase::Mark, None),
        _ => return None,
    };
    Some(StepEvent { step: *step, what: what.clone(), phase, result })
}

/// The recorded mode is what the file had; whatever our umask takes off a new file is given back.
fn open(path: &Path, flags: &[String], mode: Option<&str>) -> io::Result<File> {
    let has = |flag: &str| flags.iter().any(|have| have == flag);
    let mut options = OpenOptions::new();
    options.read(has("RDONLY") || has("RDWR")).write(has("WRONLY") || has("RDWR"));
    options.create(has("CREAT")).truncate(has("TRUNC")).create_new(has("CREAT") && has("EXCL"));
    // Append writes were recorded with the offset they went to; with O_APPEND the kernel would ignore it.
    let mode = match mode {
        Some(mode) if has("CREAT") => octal(mode)?,
        _ => return options.open(path),
    };
    let created = fs::symlink_metadata(path).is_err();
    let file = options.mode(mode).open(path)?;
    if created {
        give_mode(path, mode)?;
    }
    Ok(file)
}

fn give_mode(path: &Path, mode: u32) -> io::Result<()> {
    if fs::metadata(path)?.mode() & 0o7777 != mode {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn octal(mode: &str) -> io::Result<u32> {
    u32::from_str_radix(mode, 8).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// `None` is now.
fn time(ns: Option<i64>) -> TimeSpec {
    const SECOND: i64 = 1_000_000_000;
    ns.map_or(TimeSpec::UTIME_NOW, |ns| TimeSpec::new(ns.div_euclid(SECOND), ns.rem_euclid(SECOND)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    use sha1::{Digest, Sha1};
    use std::collections::{BTreeMap, BTreeSet};
    use std::io::Write;

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut out = GzEncoder::new(Vec::new(), Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn recording(ops: &[&str]) -> Recording {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        let conf = b"configdirectory: @BASE@/conf\n";
        header.set_size(conf.len() as u64);
        header.set_mode(0o444);
        tar.append_data(&mut header, "imapd.conf", &conf[..]).unwrap();
        let ops: Vec<String> =
            ops.iter().enumerate().map(|(n, op)| format!("{{\"n\":{n},\"t\":{},\"pid\":1,{op}}}", n * 10)).collect();
        Recording::from_parts(
            gz(&tar.into_inner().unwrap()).into(),
            gz(ops.join("\n").as_bytes()).into(),
            gz(b"{\"step\":0,\"state\":{\"a\":1}}\n{\"step\":2,\"state\":{\"a\":2}}\n").into(),
            b"{\"version\":\"2.5.11\",\"ops\":3,\"last_mark\":2}",
        )
        .unwrap()
    }

    fn play(ops: &[&str]) -> (tempfile::TempDir, Result<(), ReplayError>) {
        let dir = tempfile::tempdir().unwrap();
        let recording = recording(ops);
        recording.unpack(dir.path()).unwrap();
        let result = Player::new(&recording, dir.path()).finish();
        (dir, result)
    }

    #[test]
    fn the_configuration_names_the_unpacked_store() {
        let dir = tempfile::tempdir().unwrap();
        let conf = recording(&[]).unpack(&dir.path().join("new")).unwrap();
        let root = fs::canonicalize(dir.path().join("new")).unwrap();
        assert_eq!(fs::read_to_string(conf).unwrap(), format!("configdirectory: {}/conf\n", root.display()));
    }

    #[test]
    fn operations_do_what_they_say() {
        let (dir, result) = play(&[
            r#""op":"mkdir","path":"d","mode":"0777""#,
            r#""op":"open","h":1,"path":"d/f","flags":["RDWR","CREAT","TRUNC"],"mode":"0666""#,
            r#""op":"pwrite","h":1,"off":0,"data":"YWJjZGVm""#,
            r#""op":"rename","path":"d/f","to":"d/g""#,
            r#""op":"pwrite","h":1,"off":6,"zeros":2"#,
            r#""op":"ftruncate","h":1,"size":7"#,
            r#""op":"link","path":"d/g","to":"d/h""#,
            r#""op":"symlink","target":"g","path":"d/s""#,
            r#""op":"futimens","h":1,"atime_ns":null,"mtime_ns":1551773472000000005"#,
            r#""op":"fsync","h":1"#,
            r#""op":"fsync","path":"d""#,
            r#""op":"close","h":1"#,
            r#""op":"mkdir","path":"e","mode":"0700""#,
            r#""op":"rmdir","path":"e""#,
            r#""op":"open","h":2,"path":"x","flags":["WRONLY","CREAT","EXCL"],"mode":"0600""#,
            r#""op":"fallocate","h":2,"off":0,"len":9"#,
            r#""op":"fchmod","h":2,"mode":"0640""#,
            r#""op":"close","h":2"#,
            r#""op":"truncate","path":"x","size":8"#,
            r#""op":"utimens","path":"x","atime_ns":0,"mtime_ns":-1"#,
        ]);
        result.unwrap();
        let at = |name: &str| dir.path().join(name);
        assert_eq!(fs::read(at("d/g")).unwrap(), b"abcdef\0");
        let meta = fs::metadata(at("d/g")).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.nlink()), (0o666, 2));
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (1551773472, 5));
        assert_eq!(fs::metadata(at("d")).unwrap().mode() & 0o7777, 0o777);
        assert_eq!(fs::read_link(at("d/s")).unwrap(), Path::new("g"));
        let meta = fs::metadata(at("x")).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777, meta.mtime(), meta.mtime_nsec()), (8, 0o640, -1, 999_999_999));
        assert!(!at("e").exists() && !at("d/f").exists());
    }

    #[test]
    fn no_path_leads_out_of_the_store() {
        for path in ["../x", "/x", "a/../../x"] {
            let op = format!(r#""op":"open","h":1,"path":"{path}","flags":["RDWR","CREAT"],"mode":"0600""#);
            let (_dir, result) = play(&[&op]);
            let error = result.unwrap_err().to_string();
            assert_eq!(error, format!("operation 0 (open {path}) of the recording: path leads out of the store"));
        }
    }

    #[test]
    fn marks_carry_their_truth_and_steps_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let recording = recording(&[
            r#""op":"begin","step":2,"what":"x""#,
            r#""op":"done","step":2,"what":"x","result":"OK""#,
            r#""op":"mark","step":2,"what":"x","truth":2"#,
        ]);
        let mut player = Player::new(&recording, dir.path());
        let (told, hear) = std::sync::mpsc::channel();
        player.on_step(move |event| told.send((event.phase, event.result.clone())).unwrap());
        let began = Instant::now();
        let mark = player.next_mark(Speed::Recorded(0.5)).unwrap().unwrap();
        assert!(began.elapsed() >= Duration::from_millis(40));
        assert_eq!((mark.step, mark.truth), (2, serde_json::json!({"a": 2})));
        assert!(player.next_mark(Speed::Asap).unwrap().is_none());
        let told: Vec<_> = hear.try_iter().collect();
        assert_eq!(told, [(Phase::Begin, None), (Phase::Done, Some("OK".into())), (Phase::Mark, None)]);
    }

    /// What another program sees of the store's locks while the recording stands at each mark.
    #[test]
    fn locks_exclude_others_until_they_are_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let mark = r#""op":"mark","step":0,"what":"","truth":0"#;
        let open = r#""op":"open","h":1,"path":"f","flags":["RDWR","CREAT"],"mode":"0600""#;
        let lock = |kind: &str, h: u64| format!(r#""op":"lock","h":{h},"type":"{kind}","start":0,"len":0"#);
        let unlock = r#""op":"unlock","h":1,"start":0,"len":0"#;
        let second = r#""op":"open","h":2,"path":"f","flags":["RDWR"]"#;
        let (read, write, other) = (lock("r", 1), lock("w", 1), lock("w", 2));
        let cases: [(&[&str], bool, bool); 5] = [
            (&[open, &read, mark], true, false),
            (&[open, &write, mark], false, false),
            (&[open, &write, unlock, mark], true, true),
            (&[open, &write, second, &other, mark], false, false),
            (&[open, &write, r#""op":"close","h":1"#, unlock, mark], true, true),
        ];
        for (ops, readable, writable) in cases {
            let recording = recording(ops);
            let mut player = Player::new(&recording, dir.path());
            player.next_mark(Speed::Asap).unwrap().unwrap();
            let file = OpenOptions::new().read(true).write(true).open(dir.path().join("f")).unwrap();
            for (kind, expected) in [(libc::F_RDLCK, readable), (libc::F_WRLCK, writable)] {
                let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
                assert_eq!(fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).is_ok(), expected, "{ops:?}");
            }
        }
    }

    fn shown_messages(state: &Value) -> BTreeSet<String> {
        let users = state["users"].as_object().unwrap().values();
        let mailboxes = users.flat_map(|user| user["mailboxes"].as_object().unwrap().values());
        let mailboxes = mailboxes.chain(state["shared"].as_object().unwrap().values());
        let messages = mailboxes.flat_map(|mailbox| mailbox["messages"].as_object().unwrap().values());
        messages.map(|message| message["sha1"].as_str().unwrap().to_owned()).collect()
    }

    /// SHA-1 of every message file; `known` spares hashing what has not changed.
    fn stored_messages(root: &Path, known: &mut BTreeMap<(u64, i64, i64, u64), String>) -> BTreeSet<String> {
        let files = walkdir::WalkDir::new(root.join("spool")).into_iter().map(|entry| entry.unwrap());
        let messages = files.filter(|entry| {
            let name = entry.file_name().to_string_lossy();
            entry.file_type().is_file()
                && name.strip_suffix('.').is_some_and(|uid| uid.bytes().all(|b| b.is_ascii_digit()))
        });
        let hash = |entry: walkdir::DirEntry| {
            let meta = entry.metadata().unwrap();
            let key = (meta.ino(), meta.ctime(), meta.ctime_nsec(), meta.len());
            let digest =
                || Sha1::digest(fs::read(entry.path()).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect();
            known.entry(key).or_insert_with(digest).clone()
        };
        messages.map(hash).collect()
    }

    /// Every recording there is plays to its end, and at each mark the store has the files of all messages shown.
    #[test]
    fn recordings_play_to_the_end() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR"));
        let shared = std::env::var_os("SPOOLTAP_SHARED").map_or(repo.join("../shared"), PathBuf::from);
        let folders = [repo.join("fixtures/replays"), shared.join("replays")];
        let folders = folders.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().map(|dir| dir.unwrap().path());
        for folder in folders.filter(|folder| folder.join("ops.jsonl.gz").exists()) {
            let dir = tempfile::tempdir().unwrap();
            let recording = Recording::open(&folder).unwrap();
            recording.unpack(dir.path()).unwrap();
            let mut player = Player::new(&recording, dir.path());
            let (mut last, mut known) = (None, BTreeMap::new());
            while let Some(mark) = player.next_mark(Speed::Asap).unwrap() {
                let (shown, stored) = (shown_messages(&mark.truth), stored_messages(dir.path(), &mut known));
                assert!(shown.is_subset(&stored), "{} step {} {}", folder.display(), mark.step, mark.what);
                last = Some(mark.step);
            }
            assert_eq!(last, Some(recording.last_mark()), "{}", folder.display());
            assert_eq!(player.played(), recording.ops(), "{}", folder.display());
            assert!(player.files.is_empty(), "{}: the server left files open", folder.display());
        }
    }
}
