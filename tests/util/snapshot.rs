//! Everything that IMAP and ManageSieve show of a server, as one JSON value in the shape of the recordings' truth:
//! classic internal names, UIDs as keys. Reading it changes nothing (EXAMINE, BODY.PEEK).

use super::cyrus::{ADMIN, CyrusServer};
use super::imap::{Imap, Line, Reply, Token, quote};
use super::names::Names;
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};

const VENDOR: &str = "/vendor/cmu/cyrus-imapd/";

/// What was shown at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot(pub Value);

impl Snapshot {
    /// The state of a recording or of a recorded store, without the remarks about its origin.
    pub fn recorded(truth: &Value) -> Self {
        let parts = ["names", "server_annotations", "shared", "users"];
        let parts = parts.into_iter().filter_map(|part| Some((part.to_owned(), truth.get(part)?.clone())));
        Self(parts.collect::<Map<_, _>>().into())
    }
}

/// Looks at one server again and again through sessions that stay open.
pub struct Viewer<'a> {
    server: &'a CyrusServer,
    names: Names,
    sessions: BTreeMap<String, Imap>,
}

/// What the server shows of these accounts, of shared mailboxes and of itself.
pub fn snapshot<S: AsRef<str>>(server: &CyrusServer, users: &[S]) -> anyhow::Result<Snapshot> {
    Viewer::new(server).snapshot(users)
}

impl<'a> Viewer<'a> {
    pub fn new(server: &'a CyrusServer) -> Self {
        Self { server, names: server.names(), sessions: BTreeMap::new() }
    }

    /// Closes all sessions; the next look opens new ones.
    pub fn reset(&mut self) {
        self.sessions.clear();
    }

    /// Accounts that do not exist are left out, as in the recordings.
    pub fn snapshot<S: AsRef<str>>(&mut self, users: &[S]) -> anyhow::Result<Snapshot> {
        match self.look(users) {
            Ok(snapshot) => Ok(snapshot),
            Err(_) => {
                // A session may have ended with its server process.
                self.sessions.clear();
                self.look(users)
            }
        }
    }

    fn look<S: AsRef<str>>(&mut self, users: &[S]) -> anyhow::Result<Snapshot> {
        let names = &self.names.clone();
        let (server, users) = (self.server, users.iter().map(AsRef::as_ref));
        let mut admin = self.session(ADMIN)?;
        let ask = ask_annotations(&capabilities(&mut admin)?);
        admin.send("LIST \"\" *");
        admin.send(ask("\"\""));
        let listed = listed("LIST", &admin.receive()?, names, ADMIN, true);
        let mut server_annotations = annotations(&admin.receive()?);
        // Free space and counters, made up when asked.
        server_annotations.retain(|entry, _| !entry.starts_with(VENDOR));
        let all: BTreeSet<&str> = listed.iter().map(|mailbox| mailbox.internal.as_str()).collect();
        let sessions = users
            .filter(|login| all.contains(names.inbox(login).as_str()))
            .map(|login| Ok((login.to_owned(), self.session(login)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        // One after the other they would spend their time in waiting for late acknowledgements.
        let (shared, shown) = std::thread::scope(|scope| {
            let looks = sessions.into_iter().map(|(login, mut session)| {
                let look = scope.spawn(move || {
                    let shown = user(server, &mut session, names).context(session.login.clone());
                    shown.map(|shown| (session, shown))
                });
                (login, look)
            });
            let looks: Vec<_> = looks.collect();
            let shared: Vec<&Listed> = listed.iter().filter(|mailbox| mailbox.is_shared()).collect();
            let shared = mailboxes(&mut admin, &shared, names);
            let looks = looks.into_iter().map(|(login, look)| (login, look.join().expect("does not panic")));
            (shared, looks.collect::<Vec<_>>())
        });
        let shared = shared?;
        let mut users = Map::new();
        let mut kept = vec![admin];
        for (login, shown) in shown {
            let (session, shown) = shown?;
            users.insert(login, shown);
            kept.push(session);
        }
        let state = json!({"names": all, "server_annotations": server_annotations, "shared": shared, "users": users});
        self.sessions.extend(kept.into_iter().map(|session| (session.login.clone(), session)));
        Ok(Snapshot(state))
    }

    /// The open session of this login or a new one; it is put back when all went well.
    fn session(&mut self, login: &str) -> anyhow::Result<Imap> {
        self.sessions.remove(login).map_or_else(|| self.server.imap(login), Ok)
    }
}

/// What one account shows.
fn user(server: &CyrusServer, session: &mut Imap, names: &Names) -> anyhow::Result<Value> {
    let login = session.login.clone();
    let inbox = names.inbox(&login);
    let below = format!("{inbox}.");
    session.send("LIST \"\" *");
    session.send("LSUB \"\" *");
    let all = listed("LIST", &session.receive()?, names, &login, false);
    let subscribed = listed("LSUB", &session.receive()?, names, &login, false);
    let subscribed: Vec<String> = subscribed.into_iter().map(|mailbox| mailbox.internal).collect();
    let (own, foreign): (Vec<&Listed>, Vec<&Listed>) =
        all.iter().partition(|mailbox| mailbox.internal == inbox || mailbox.internal.starts_with(&below));
    let own = mailboxes(session, &own, names)?;
    for mailbox in &foreign {
        session.send(format!("EXAMINE {}", mailbox.quoted()));
        session.send("UID SEARCH SEEN");
    }
    let mut others = Map::new();
    for mailbox in &foreign {
        let (examined, found) = (session.receive()?, session.receive()?);
        if examined.ok {
            let mut seen: Vec<u64> = found.all("SEARCH").concat().iter().filter_map(Token::number).collect();
            seen.sort_unstable();
            let uidvalidity = examined.code("UIDVALIDITY");
            others.insert(mailbox.internal.clone(), json!({"uidvalidity": uidvalidity, "seen": seen}));
        }
    }
    session.run("UNSELECT")?;
    let sieve = scripts(server, &login)?;
    Ok(json!({"mailboxes": own, "others": others, "sieve": sieve, "subscribed": subscribed}))
}

/// In a session of its own each time: timsieved keeps an open script database for as long as one lasts.
fn scripts(server: &CyrusServer, login: &str) -> anyhow::Result<Value> {
    let mut sieve = server.sieve(login)?;
    let mut scripts = Map::new();
    for (name, active) in sieve.list()? {
        let script = match sieve.get(&name) {
            Ok(script) => json!({"active": active, "sha1": hex(&Sha1::digest(script))}),
            Err(error) => json!({"active": active, "error": format!("{error:#}")}),
        };
        scripts.insert(name, script);
    }
    Ok(scripts.into())
}

/// A line of LIST.
struct Listed {
    attributes: Vec<String>,
    /// As the client writes it.
    name: String,
    internal: String,
}

impl Listed {
    fn quoted(&self) -> String {
        quote(&self.name)
    }

    fn is_shared(&self) -> bool {
        let name = self.internal.rsplit('!').next().unwrap_or_default();
        !["user", "DELETED"].contains(&name.split('.').next().unwrap_or_default())
    }
}

fn listed(command: &str, reply: &Reply, names: &Names, login: &str, admin: bool) -> Vec<Listed> {
    let lines = reply.all(command).into_iter().filter_map(|tokens| {
        let [attributes, _, name] = tokens.get(..3)? else { return None };
        let attributes: Vec<String> = attributes.list().iter().map(Token::text).collect();
        let name = name.text();
        let hidden = ["\\Noselect", "\\NonExistent"];
        let exists = !attributes.iter().any(|have| hidden.iter().any(|hidden| have.eq_ignore_ascii_case(hidden)));
        exists.then(|| Listed { attributes, internal: names.internal(&name, login, admin), name })
    });
    let mut lines: Vec<Listed> = lines.collect();
    lines.sort_by(|a, b| a.internal.cmp(&b.internal));
    lines
}

const ITEMS: &str = "UID FLAGS INTERNALDATE RFC822.SIZE MODSEQ BODY.PEEK[]";
/// 2.4 does not know it.
const ANNOTATIONS: &str = " ANNOTATION (/* (value.priv value.shared))";

fn capabilities(session: &mut Imap) -> anyhow::Result<String> {
    Ok(session.ok("CAPABILITY")?.lines.iter().map(Line::text).collect())
}

/// How all annotations of a mailbox are asked for; 2.4 has no METADATA.
fn ask_annotations(capabilities: &str) -> fn(&str) -> String {
    match capabilities.contains("METADATA") {
        true => |name| format!("GETMETADATA (DEPTH infinity) {name} (/shared /private)"),
        false => |name| format!("GETANNOTATION {name} \"*\" (\"value.priv\" \"value.shared\")"),
    }
}

/// As many mailboxes at a time as the sockets hold commands for: the server reads none while it writes an answer.
const AHEAD: usize = 100;

fn mailboxes(session: &mut Imap, listed: &[&Listed], names: &Names) -> anyhow::Result<Value> {
    let mut out = Map::new();
    let capabilities = capabilities(session)?;
    let annotations = if capabilities.contains("ANNOTATE-EXPERIMENT") { ANNOTATIONS } else { "" };
    let ask = ask_annotations(&capabilities);
    for listed in listed.chunks(AHEAD) {
        for mailbox in listed {
            let name = mailbox.quoted();
            session.send(format!("EXAMINE {name}"));
            session.send(format!("UID FETCH 1:* ({ITEMS}{annotations})"));
            session.send(format!("STATUS {name} (RECENT UNSEEN)"));
            session.send(format!("GETACL {name}"));
            session.send(format!("GETQUOTAROOT {name}"));
            session.send(ask(&name));
        }
        for mailbox in listed {
            let answers = Answers {
                examined: session.receive()?,
                fetched: session.receive()?,
                status: session.receive()?,
                acl: session.receive()?,
                quota: session.receive()?,
                metadata: session.receive()?,
            };
            // A mailbox that went away since it was listed is not there.
            if answers.examined.ok {
                let state = answers.state(mailbox, names, &session.login).with_context(|| mailbox.internal.clone())?;
                out.insert(mailbox.internal.clone(), state);
            }
        }
    }
    session.run("UNSELECT")?;
    Ok(out.into())
}

/// What the server answered about one mailbox.
struct Answers {
    examined: Reply,
    fetched: Reply,
    status: Reply,
    acl: Reply,
    quota: Reply,
    metadata: Reply,
}

impl Answers {
    fn state(&self, mailbox: &Listed, names: &Names, login: &str) -> anyhow::Result<Value> {
        let examined = &self.examined;
        for answer in [&self.fetched, &self.status, &self.acl, &self.metadata] {
            if !answer.ok {
                bail!("{}", answer.status);
            }
        }
        let mut messages = Map::new();
        for tokens in self.fetched.all("FETCH") {
            let (uid, message) = message(tokens.first().context("FETCH without items")?)?;
            messages.insert(uid.to_string(), message);
        }
        let flags = examined.all("FLAGS").concat();
        let flags = flags.iter().flat_map(Token::list).map(Token::text).filter(|flag| !flag.starts_with('\\'));
        let mut user_flags: Vec<String> = flags.collect();
        user_flags.sort_unstable();
        let tree = ["\\haschildren", "\\hasnochildren", "\\subscribed", "\\marked", "\\unmarked"];
        let shown = |attribute: &&String| !tree.contains(&attribute.to_ascii_lowercase().as_str());
        let attributes: Vec<&String> = mailbox.attributes.iter().filter(shown).collect();
        let id = examined.lines.iter().find_map(|line| {
            let text = line.text();
            Some(text.split_once("[MAILBOXID (")?.1.split_once(')')?.0.to_owned())
        });
        let (vendor, own): (Map<_, _>, Map<_, _>) =
            annotations(&self.metadata).into_iter().partition(|(entry, _)| entry.starts_with(VENDOR));
        let vendor: Map<_, _> =
            vendor.into_iter().map(|(entry, value)| (entry[VENDOR.len()..].to_owned(), value)).collect();
        Ok(json!({
            "acl": rights(&self.acl),
            "annotations": own,
            "attrs": attributes,
            "exists": examined.exists(),
            "highestmodseq": examined.code("HIGHESTMODSEQ"),
            "mailboxid": id,
            "messages": messages,
            "name": mailbox.name,
            "quota": quota_roots(&self.quota, names, login),
            "recent": counted(&self.status, "RECENT"),
            "uidnext": examined.code("UIDNEXT"),
            "uidvalidity": examined.code("UIDVALIDITY"),
            "unseen": counted(&self.status, "UNSEEN"),
            "userflags": user_flags,
            "vendor": vendor,
        }))
    }
}

fn counted(status: &Reply, item: &str) -> Option<u64> {
    let status = status.all("STATUS").concat();
    let mut pairs = status.last().into_iter().flat_map(Token::pairs).filter(|(name, _)| name.text() == item);
    pairs.find_map(|(_, count)| count.number())
}

fn message(items: &Token) -> anyhow::Result<(u64, Value)> {
    let mut uid = None;
    let mut message = Map::new();
    for (item, value) in items.pairs() {
        match item.text().as_str() {
            "UID" => uid = value.number(),
            "FLAGS" => {
                let mut flags: Vec<String> = value.list().iter().map(Token::text).collect();
                flags.retain(|flag| flag != "\\Recent");
                flags.sort_unstable();
                message.insert("flags".into(), json!(flags));
            }
            "INTERNALDATE" => drop(message.insert("internaldate".into(), json!(value.text()))),
            "RFC822.SIZE" => drop(message.insert("size".into(), json!(value.number()))),
            "MODSEQ" => drop(message.insert("modseq".into(), json!(value.list().first().and_then(Token::number)))),
            "BODY[]" => drop(message.insert("sha1".into(), json!(hex(&Sha1::digest(value.bytes()))))),
            "ANNOTATION" => {
                let mut entries = Map::new();
                for (entry, values) in value.pairs() {
                    let values = values.pairs().filter(|(_, value)| **value != Token::Nil);
                    let values: Map<_, _> = values.map(|(scope, value)| (scope.text(), json!(value.text()))).collect();
                    if !values.is_empty() {
                        entries.insert(entry.text(), values.into());
                    }
                }
                if !entries.is_empty() {
                    message.insert("annotations".into(), entries.into());
                }
            }
            _ => {}
        }
    }
    Ok((uid.context("FETCH without UID")?, message.into()))
}

fn rights(acl: &Reply) -> Map<String, Value> {
    let mut out = Map::new();
    for tokens in acl.all("ACL") {
        for pair in tokens.get(1..).unwrap_or_default().chunks_exact(2) {
            let mut rights: Vec<char> = pair[1].text().chars().collect();
            rights.sort_unstable();
            out.insert(pair[0].text(), rights.into_iter().collect::<String>().into());
        }
    }
    out
}

fn quota_roots(quota: &Reply, names: &Names, login: &str) -> Value {
    // A mailbox may name a root that does not exist.
    if !quota.ok {
        return json!({"error": quota.status});
    }
    let mut out = Map::new();
    for tokens in quota.all("QUOTA") {
        let [root, resources] = tokens.as_slice() else { continue };
        let resources = resources.list().chunks_exact(3);
        let resources: Map<_, _> = resources.map(|r| (r[0].text(), json!([r[1].number(), r[2].number()]))).collect();
        out.insert(names.internal(&root.text(), login, login == ADMIN), resources.into());
    }
    out.into()
}

/// `{entry: {"shared" | "priv": value}}`.
fn annotations(metadata: &Reply) -> Map<String, Value> {
    let mut out = Map::new();
    let mut put = |scope: &str, entry: &str, value: &Token| {
        if *value != Token::Nil {
            let values = out.entry(entry.to_owned()).or_insert_with(|| json!({}));
            values[scope] = value.text().into();
        }
    };
    for tokens in metadata.all("METADATA") {
        for (entry, value) in tokens.last().into_iter().flat_map(Token::pairs) {
            let entry = entry.text();
            let (scope, entry) = match (entry.strip_prefix("/shared"), entry.strip_prefix("/private")) {
                (Some(entry), _) => ("shared", entry),
                (_, Some(entry)) => ("priv", entry),
                _ => continue,
            };
            put(scope, entry, value);
        }
    }
    for tokens in metadata.all("ANNOTATION") {
        let [_, entry, values] = tokens.as_slice() else { continue };
        for (scope, value) in values.pairs() {
            put(scope.text().trim_start_matches("value."), &entry.text(), value);
        }
    }
    out
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
