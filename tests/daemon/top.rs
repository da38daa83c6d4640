//! `spooltap top` on a terminal of its own, read as a terminal shows it.

use super::{LONG, Lab, idle};
use crate::util::{cyrus, eventually};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

/// A terminal with a program in it.
struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<vt100::Parser>>,
    /// Everything the program wrote.
    raw: Arc<Mutex<Vec<u8>>>,
    line: OwnedFd,
    child: Child,
}

impl Terminal {
    fn run(mut command: Command) -> Self {
        let size = Winsize { ws_row: 40, ws_col: 220, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).expect("a terminal");
        let line = || pair.slave.try_clone().expect("clones");
        command.stdin(line()).stdout(line()).stderr(line()).env("TERM", "xterm");
        let child = command.spawn().expect("starts");
        let keyboard = File::from(pair.master);
        let mut from = keyboard.try_clone().expect("clones");
        let screen = Arc::new(Mutex::new(vt100::Parser::new(size.ws_row, size.ws_col, 0)));
        let raw = Arc::<Mutex<Vec<u8>>>::default();
        let (shown, all) = (screen.clone(), raw.clone());
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut piece) {
                shown.lock().expect("lock").process(&piece[..count]);
                all.lock().expect("lock").extend_from_slice(&piece[..count]);
            }
        });
        Self { keyboard, screen, raw, line: pair.slave, child }
    }

    fn text(&self) -> String {
        self.screen.lock().expect("lock").screen().contents()
    }

    #[track_caller]
    fn shows(&self, what: &str, good: impl Fn(&str) -> bool) -> String {
        let found = eventually(LONG, || Some(self.text()).filter(|text| good(text)));
        found.unwrap_or_else(|| panic!("{what} is not shown:\n{}", self.text()))
    }

    fn is_plain(&self) -> bool {
        let screen = self.screen.lock().expect("lock");
        let mode = tcgetattr(&self.line).expect("has modes").local_flags;
        !screen.screen().alternate_screen()
            && !screen.screen().hide_cursor()
            && mode.contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    /// A key, and how the program ends by it.
    #[track_caller]
    fn ends_by(mut self, key: &[u8]) {
        assert!(!self.is_plain());
        self.keyboard.write_all(key).expect("types");
        let status = eventually(LONG, || self.child.try_wait().expect("waits")).expect("ends");
        assert_eq!(status.code(), Some(0));
        eventually(LONG, || self.is_plain().then_some(())).expect("the terminal is as it was");
    }
}

#[test]
fn top_shows_what_happens_and_leaves_the_terminal_as_it_was() {
    if !cyrus::installed() {
        return;
    }
    let lab = Lab::new(&["u1", "u2"]);
    lab.configure("");
    assert_eq!(lab.says(&["top"]).status.code(), Some(3), "nobody is there");
    let spooltap = lab.start(&[]);
    lab.becomes("idle", |_, replica| idle(replica));
    // Where there is no terminal, one table.
    let plain = String::from_utf8(lab.says(&["top"]).stdout).expect("text");
    assert!(plain.contains("mailboxes") && plain.contains(&lab.replica()) && !plain.contains('\x1b'), "{plain}");

    let top = |more: &[(&str, &str)]| {
        let mut command = lab.command();
        command.args(["top", "--interval", "0.2"]).env_remove("NO_COLOR").envs(more.iter().copied());
        Terminal::run(command)
    };
    let terminal = top(&[]);
    let text = terminal.shows("the table", |text| text.contains("mailboxes") && text.contains("inotify"));
    for part in ["lag", "waits", "quar", "conf/s", "p99 ms", "MB of memory", "directories watched", "q quits"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Live: what is paused shows, and a mailbox in quarantine with its reason.
    lab.says(&["pause", "-u", "u1"]);
    terminal.shows("the pause", |text| text.contains("paused") && text.contains("u1"));
    let path = lab.source.tool("mbpath", &["user.u2"]).expect("mbpath").stdout;
    let index = std::path::PathBuf::from(String::from_utf8(path).expect("text").trim()).join("cyrus.index");
    let good = std::fs::read(&index).expect("reads");
    std::fs::write(&index, [&good[..60], &[0xff; 400]].concat()).expect("writes");
    terminal.shows("the quarantine", |text| text.contains("what does not get through") && text.contains("user.u2"));
    assert!(String::from_utf8_lossy(&terminal.raw.lock().expect("lock")).contains("\x1b[33m"), "no colour");
    std::fs::write(&index, good).expect("writes");
    lab.says(&["resume"]);
    lab.says(&["retry"]);
    terminal.shows("that it is over", |text| !text.contains("quarantine") && !text.contains("paused"));
    terminal.ends_by(b"q");

    let terminal = top(&[("NO_COLOR", "1")]);
    terminal.shows("the table", |text| text.contains("q quits"));
    let raw = String::from_utf8_lossy(&terminal.raw.lock().expect("lock")).into_owned();
    let painted = raw
        .split("\x1b[")
        .skip(1)
        .any(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m'));
    assert!(!painted, "{raw:?}");
    // A daemon that ends is told, and Ctrl-C is a way out.
    assert_eq!(spooltap.terminate().expect("ends").code(), Some(0));
    terminal.shows("that nobody is there", |text| text.contains("no spooltap runs"));
    terminal.ends_by(&[3]);
}
