//! A store of any number of mailboxes, made of copies of one small real one. No Cyrus is needed to make or to read it.

use super::{done, size, timed};
use crate::util::{self, Spooltap};
use anyhow::Context;
use spooltap::model::MailStore;
use spooltap::spool::{LiveSpool, open_store};
use spooltap::state::State;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Mailboxes of one user, INBOX included.
const PER_USER: usize = 20;
/// The store and the mailbox in it that is copied: three messages, an index of 440 bytes.
const TEMPLATE: (&str, &str) = ("2.5.11-a", "spool/user/u10");

pub struct LargeStore {
    /// Removed in the end, unless `SPOOLTAP_BENCH_DIR` says where to make it and to leave it.
    _temporary: Option<tempfile::TempDir>,
    pub base: PathBuf,
    pub conf: PathBuf,
    pub mailboxes: usize,
}

impl LargeStore {
    /// With so many mailboxes (`SPOOLTAP_BENCH_MAILBOXES`), each a directory with the files of the template.
    pub fn make() -> anyhow::Result<Self> {
        let mailboxes = size("SPOOLTAP_BENCH_MAILBOXES", 100_000);
        let (temporary, base) = match std::env::var_os("SPOOLTAP_BENCH_DIR") {
            Some(dir) => (None, PathBuf::from(dir).join(format!("store-{mailboxes}"))),
            None => {
                let dir = tempfile::Builder::new().prefix("spooltap-large-").tempdir()?;
                let base = dir.path().join("store");
                (Some(dir), base)
            }
        };
        let store = Self { _temporary: temporary, conf: base.join("imapd.conf"), base, mailboxes };
        if !store.conf.exists() {
            store.fill()?;
        }
        Ok(store)
    }

    fn fill(&self) -> anyhow::Result<()> {
        let template = util::store(TEMPLATE.0);
        let files: Vec<(String, Vec<u8>)> = fs::read_dir(template.dir.path().join(TEMPLATE.1))?
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .map(|entry| Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?)))
            .collect::<std::io::Result<_>>()?;
        let header = files.iter().find(|(name, _)| name == "cyrus.header").context("a cyrus.header")?;
        let old = spooltap::cyrus::header::parse(&header.1)?;
        let conf = self.base.join("conf");
        for dir in ["user/u", "quota/u"] {
            fs::create_dir_all(conf.join(dir))?;
        }
        let seen = fs::read(template.dir.path().join("conf/user/u/u10.seen"))?;
        let mut list = std::io::BufWriter::new(fs::File::create(conf.join("mailboxes.db"))?);
        let mut rows = Vec::with_capacity(self.mailboxes);
        for n in 0..self.mailboxes {
            let name = mailbox(n);
            let dir = self.dir(n);
            fs::create_dir_all(&dir)?;
            let id = format!("{n:036x}");
            for (file, bytes) in &files {
                match file.as_str() {
                    "cyrus.header" => {
                        let text = replace(bytes, old.uniqueid.as_bytes(), id.as_bytes());
                        let root = old.quotaroot.as_ref().map_or(&b""[..], |root| root.as_bytes());
                        let owner = format!("user.{}", user(n));
                        fs::write(dir.join(file), replace(&text, root, owner.as_bytes()))?;
                    }
                    _ => fs::write(dir.join(file), bytes)?,
                }
            }
            rows.push(format!(
                "{name}\t%(A %({} lrswipkxtecda) I {id} P default V 1790000000 F 1 M 1790000000)\n",
                user(n)
            ));
            if n % PER_USER == 0 {
                fs::write(conf.join(format!("user/u/{}.seen", user(n))), &seen)?;
                fs::write(conf.join(format!("user/u/{}.sub", user(n))), format!("{name}\t\n"))?;
                fs::write(conf.join(format!("quota/u/user.{}", user(n))), "%(S (1234 500000))\n")?;
            }
        }
        rows.sort();
        for row in rows {
            list.write_all(row.as_bytes())?;
        }
        list.flush()?;
        // Written last: a store that has it is whole.
        let text = format!(
            "configdirectory: {0}/conf\npartition-default: {0}/spool\nhashimapspool: yes\nsievedir: {0}/sieve\nadmins: cyrus\n",
            self.base.display()
        );
        fs::write(&self.conf, text)?;
        Ok(())
    }

    /// Directory of mailbox number `n`.
    pub fn dir(&self, n: usize) -> PathBuf {
        self.base.join("spool/u").join(mailbox(n).replace('.', "/"))
    }

    pub fn mailboxes_db(&self) -> PathBuf {
        self.base.join("conf/mailboxes.db")
    }

    /// Looks at every file of it once, so that the next to do so finds all in memory.
    pub fn warm(&self) -> anyhow::Result<()> {
        for entry in walkdir::WalkDir::new(&self.base) {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.metadata()?.is_file() && name.starts_with("cyrus.") {
                fs::read(entry.path())?;
            }
        }
        Ok(())
    }
}

/// A store of which an archive has everything; archive and state lie beside it, and are kept with it.
pub struct Pushed {
    pub store: LargeStore,
    pub url: String,
    pub state: PathBuf,
}

impl Pushed {
    pub fn make() -> anyhow::Result<Self> {
        let (took, store) = timed(LargeStore::make)?;
        println!("  a store of {} mailboxes: {:.1} s", store.mailboxes, took.as_secs_f64());
        let beside = |what: &str| store.base.with_extension(what);
        let (url, state) = (format!("file://{}", beside("archive").display()), beside("state"));
        if !beside("pushed").exists() {
            let (took, output) = timed(|| Spooltap::once(&store.conf, &url, &state, &["push", "-A"]))?;
            done("push -A", &output)?;
            println!("  its first push into an archive: {:.1} s", took.as_secs_f64());
            fs::write(beside("pushed"), "")?;
        }
        store.warm()?;
        Ok(Self { store, url, state })
    }

    /// Runs a command with this store, archive and state.
    pub fn spooltap(&self, arguments: &[&str]) -> anyhow::Result<(Duration, String)> {
        let (took, output) = timed(|| Spooltap::once(&self.store.conf, &self.url, &self.state, arguments))?;
        // A scan that finds something ends with another code.
        if arguments != ["scan"] {
            done(&arguments.join(" "), &output)?;
        }
        Ok((took, String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    pub fn open(&self) -> anyhow::Result<(LiveSpool, State)> {
        let store = open_store(&self.store.conf)?;
        let state = State::open(&self.state, &store.identity()?)?;
        store.remember_in(state.memory());
        Ok((store, state))
    }
}

fn user(n: usize) -> String {
    format!("u{:06}", n / PER_USER)
}

/// Name of mailbox number `n`.
pub fn mailbox(n: usize) -> String {
    match n % PER_USER {
        0 => format!("user.{}", user(n)),
        folder => format!("user.{}.folder-{folder:02}", user(n)),
    }
}

fn replace(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let Some(at) = bytes.windows(old.len().max(1)).position(|window| window == old) else { return bytes.to_vec() };
    [&bytes[..at], new, &bytes[at + old.len()..]].concat()
}
