//! What a configuration needs so that a Cyrus starts on a promoted store.

use crate::cyrus::imapd_conf::ImapdConf;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Options that say where files are, in which format, or who replicates: the store has its own, or needs none.
fn is_its_own(key: &str) -> bool {
    const WORDS: &[&str] = &[
        "archive_enabled",
        "configdirectory",
        "defaultpartition",
        "fulldirhash",
        "hashimapspool",
        "mailbox_legacy_dirs",
        "metapartition_files",
        "replicaonly",
        "sievedir",
        "sieveusehomedir",
    ];
    const STARTS: &[&str] =
        &["archivepartition-", "master_", "metadir-", "metapartition-", "partition-", "search", "sync_"];
    WORDS.contains(&key)
        || STARTS.iter().any(|start| key.starts_with(start))
        || key.contains("_sync_")
        || key.ends_with("_db")
        || key.ends_with("socket")
        || key.ends_with("_path") && !key.starts_with("sasl_")
        || key.ends_with("lockpath")
}

/// Without these nobody can log in, or nobody may do anything.
const NEEDED: &[(&str, &str)] = &[("admins", "cyrus"), ("sasl_pwcheck_method", "saslauthd")];

/// Lines that a store's imapd.conf has not.
#[derive(Debug, Default)]
pub(super) struct Lines {
    dir: PathBuf,
    add: Vec<(String, String)>,
    /// Not to be written: told only.
    told: Vec<String>,
}

impl Lines {
    /// `theirs` is the old source's, where it can be read.
    pub fn missing(dir: &Path, ours: &ImapdConf, theirs: Option<&ImapdConf>) -> Self {
        let mut lines = Self { dir: dir.to_owned(), ..Self::default() };
        for (key, value) in theirs.into_iter().flat_map(ImapdConf::all).filter(|(key, _)| !is_its_own(key)) {
            match ours.get(key) {
                Some(have) if have == value => {}
                Some(have) => {
                    lines.told.push(format!("{key} is {have} here and was {value} at the source: look at it"))
                }
                None if value.starts_with('/') && !Path::new(value).exists() => {
                    lines.told.push(format!("{key}: {value}, and that file is not here"));
                }
                None => lines.add.push((key.to_owned(), value.to_owned())),
            }
        }
        for (key, value) in NEEDED {
            let has = |conf: &ImapdConf| conf.get(key).is_some();
            if !has(ours) && !theirs.is_some_and(has) {
                lines.told.push(format!("{key}: {value} (or what is right here)"));
            }
        }
        if !lines.services().exists() {
            lines.told.push(format!("{}, which --write-conf makes", lines.services().display()));
        }
        lines
    }

    fn services(&self) -> PathBuf {
        self.dir.join("cyrus.conf")
    }

    pub fn shown(&self) -> Vec<String> {
        let add = self.add.iter().map(|(key, value)| format!("{key}: {value}"));
        add.chain(self.told.iter().cloned()).collect()
    }

    /// Adds the lines; a second time there is nothing left to be added.
    pub fn write(&self) -> io::Result<()> {
        if !self.add.is_empty() {
            let path = self.dir.join("imapd.conf");
            let mut text = std::fs::read_to_string(&path)?;
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str("# From the old source, when this store was promoted.\n");
            text.extend(self.add.iter().map(|(key, value)| format!("{key}: {value}\n")));
            replace(&path, &text)?;
        }
        match self.services().exists() {
            true => Ok(()),
            false => replace(&self.services(), &services(&self.dir)),
        }
    }
}

/// By rename: the old text or the new one is there.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let mut file = std::fs::File::create(&fresh)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    path.parent().map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
}

/// The least that serves users; ports and further services are the admin's.
fn services(dir: &Path) -> String {
    let conf = dir.join("imapd.conf");
    let conf = conf.display();
    let socket = dir.join("conf/socket/lmtp");
    let socket = socket.display();
    format!(
        "# Made when this store was promoted: the least that serves users.\n\
         START {{\n  recover cmd=\"ctl_cyrusdb -C {conf} -r\"\n}}\n\
         SERVICES {{\n  imap cmd=\"imapd -C {conf}\" listen=\"imap\" prefork=0\n  \
         lmtpunix cmd=\"lmtpd -C {conf}\" listen=\"{socket}\" prefork=0\n  \
         sieve cmd=\"timsieved -C {conf}\" listen=\"sieve\" prefork=0\n}}\n\
         EVENTS {{\n  checkpoint cmd=\"ctl_cyrusdb -C {conf} -c\" period=30\n  \
         delprune cmd=\"cyr_expire -C {conf} -E 3\" at=0400\n}}\n"
    )
}

/// What the admin does with a promoted directory.
pub(super) fn in_a_directory(dir: &Path) -> Vec<String> {
    let dir = dir.display();
    vec![
        format!("chown -R cyrus:mail {dir}, where spooltap ran as somebody else"),
        format!("master -C {dir}/imapd.conf -M {dir}/cyrus.conf -d, as root; then let the users in"),
        "ctl_conversationsdb -b -r, where conversations is on: that database is not replicated".into(),
        "the old source: do not start its Cyrus before `spooltap failback`".into(),
    ]
}

/// What the admin does at a server.
pub(super) fn at_a_server() -> Vec<String> {
    vec![
        "in its imapd.conf: take out `replicaonly: yes` (3.12), where it stands".into(),
        "in its cyrus.conf: SERVICES for the users (imap, lmtp, pop3, sieve); EVENTS as at the old source (cyr_expire)".into(),
        "in its cyrus.conf: leave the sync_server line, closed to all but the way back; no other sync_client may push to it"
            .into(),
        "then let the users in (address, DNS, proxy)".into(),
        "the old source: do not start its Cyrus before `spooltap failback`".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(text: &str) -> ImapdConf {
        ImapdConf::parse(text, &mut |_| Err("none".into())).expect("parses")
    }

    #[test]
    fn what_is_about_files_stays_and_the_rest_is_added_once() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("imapd.conf");
        std::fs::write(&path, "configdirectory: /b/conf\npartition-default: /b/spool\nadmins: root").expect("writes");
        let old = conf(
            "configdirectory: /a\npartition-default: /a/spool\nsync_host: b\nadmins: cyrus\nunixhierarchysep: yes\n\
             lmtpsocket: /a/lmtp\nmboxlist_db: skiplist\ntls_server_key: /nowhere/key\nsasl_sasldb_path: /\n",
        );
        let ours = || conf(&std::fs::read_to_string(&path).expect("reads"));
        let lines = Lines::missing(dir.path(), &ours(), Some(&old));
        let added = [("sasl_sasldb_path", "/"), ("unixhierarchysep", "yes")];
        assert_eq!(lines.add, added.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let told = lines.shown().join("\n");
        for text in ["admins is root here", "/nowhere/key", "sasl_pwcheck_method", "cyrus.conf"] {
            assert!(told.contains(text), "{told}");
        }
        lines.write().expect("writes");
        assert_eq!(Lines::missing(dir.path(), &ours(), Some(&old)).add, []);
        let text = std::fs::read(&path).expect("reads");
        Lines::missing(dir.path(), &ours(), Some(&old)).write().expect("writes");
        assert_eq!(std::fs::read(&path).expect("reads"), text);
    }
}
