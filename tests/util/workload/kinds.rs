//! The kinds of operation, one function each: `Ok(true)` when it was done, `Ok(false)` when the server refused.

use super::super::imap::{literal, quote};
use super::{Client, GUESTS, RESIDENTS};
use crate::util::cyrus::ADMIN;

pub(super) struct Kind {
    pub name: &'static str,
    pub weight: usize,
    pub run: fn(&mut Client) -> anyhow::Result<bool>,
    /// The imapd of 3.6.1 dies of it in the middle, mostly; what it leaves behind is to be replicated as well.
    pub kills: bool,
}

const fn kind(name: &'static str, weight: usize, run: fn(&mut Client) -> anyhow::Result<bool>) -> Kind {
    Kind { name, weight, run, kills: false }
}

pub(super) const KINDS: &[Kind] = &[
    kind("deliver", 14, deliver),
    kind("append", 12, append),
    kind("flags", 14, flags),
    kind("copy", 6, copy),
    kind("move", 4, move_messages),
    kind("expunge", 6, expunge),
    kind("two sessions", 5, two_sessions),
    kind("seen", 6, seen),
    kind("annotate message", 4, annotate_message),
    kind("annotate mailbox", 3, annotate_mailbox),
    kind("annotate server", 1, annotate_server),
    kind("option", 2, option),
    kind("special use", 1, special_use),
    kind("acl", 4, acl),
    kind("subscribe", 3, subscribe),
    kind("unsubscribe", 2, unsubscribe),
    kind("create", 5, create),
    kind("delete", 3, delete),
    kind("rename", 4, rename),
    Kind { kills: true, ..kind("rename inbox", 1, rename_inbox) },
    kind("partition", 1, partition),
    kind("quota", 3, quota),
    kind("quota gone", 1, quota_gone),
    kind("sieve put", 3, sieve_put),
    kind("sieve activate", 2, sieve_activate),
    kind("sieve delete", 1, sieve_delete),
    kind("user created", 2, user_created),
    kind("user deleted", 1, user_deleted),
    kind("user renamed", 1, user_renamed),
    kind("unexpunge", 1, unexpunge),
    kind("expire", 1, expire),
    kind("reconstruct", 1, reconstruct),
];

const KEYWORDS: [&str; 8] = ["$Label1", "$Forwarded", "NonJunk", "work", "later", "$MDNSent", "a.b", "x_9"];
const SYSTEM: [&str; 5] = ["\\Seen", "\\Flagged", "\\Answered", "\\Draft", "\\Deleted"];
const RIGHTS: [&str; 6] = ["lrs", "lrswi", "lrswipkxte", "lr", "lrswipkxtecdan", "p"];
const ENTRIES: [&str; 3] = ["/comment", "/vendor/spooltap.test/note", "/vendor/spooltap.test/colour"];

fn deliver(client: &mut Client) -> anyhow::Result<bool> {
    let mut to = vec![client.somebody().to_owned()];
    if client.rng.chance(30) {
        to.push(client.somebody().to_owned());
        to.dedup();
    }
    if client.rng.chance(20) {
        to[0].push_str("+Work");
    }
    let message = client.message();
    let to: Vec<&str> = to.iter().map(String::as_str).collect();
    let answers = client.lmtp()?.deliver(&to, &message)?;
    Ok(answers.iter().any(|answer| answer.starts_with('2')))
}

fn append(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let mailbox = client.some_mailbox(login)?;
    append_to(client, login, &mailbox)
}

fn append_to(client: &mut Client, login: &str, mailbox: &str) -> anyhow::Result<bool> {
    let flags = some_flags(client);
    let date = match client.rng.chance(60) {
        true => {
            let (day, year, zone) = (1 + client.rng.below(28), 1999 + client.rng.below(27), client.rng.below(3));
            format!("\"{day:02}-Mar-{year} 0{zone}:00:00 {}\" ", ["+0000", "-0730", "+0200"][zone])
        }
        false => String::new(),
    };
    let mut command = format!("APPEND {} ({flags}) {date}", quote(mailbox)).into_bytes();
    command.extend(literal(&client.message()));
    Ok(client.session(login)?.run(command)?.ok)
}

fn some_flags(client: &mut Client) -> String {
    let system = client.rng.below(3);
    let mut flags = client.rng.sample(&SYSTEM[..4], system);
    let keywords = client.rng.below(3);
    flags.extend(client.rng.sample(&KEYWORDS, keywords));
    flags.join(" ")
}

fn flags(client: &mut Client) -> anyhow::Result<bool> {
    let Some((login, _, uids)) = client.some_messages()? else { return Ok(false) };
    let flags = some_flags(client);
    let how = *client.rng.pick(&["+FLAGS", "-FLAGS", "FLAGS", "+FLAGS.SILENT"]);
    Ok(client.session(login)?.run(format!("UID STORE {uids} {how} ({flags})"))?.ok)
}

fn copy(client: &mut Client) -> anyhow::Result<bool> {
    transfer(client, "COPY")
}

fn move_messages(client: &mut Client) -> anyhow::Result<bool> {
    transfer(client, "MOVE")
}

fn transfer(client: &mut Client, how: &str) -> anyhow::Result<bool> {
    let Some((login, from, uids)) = client.some_messages()? else { return Ok(false) };
    let mut all = client.mailboxes(login)?;
    all.retain(|name| *name != from);
    if all.is_empty() {
        return Ok(false);
    }
    let to = quote(client.rng.pick::<String>(&all));
    Ok(client.session(login)?.run(format!("UID {how} {uids} {to}"))?.ok)
}

fn expunge(client: &mut Client) -> anyhow::Result<bool> {
    let Some((login, _, uids)) = client.some_messages()? else { return Ok(false) };
    let how = *client.rng.pick(&["EXPUNGE", "CLOSE", "UID EXPUNGE"]);
    let command = if how == "UID EXPUNGE" { format!("{how} {uids}") } else { how.into() };
    let session = client.session(login)?;
    Ok(session.run(format!("UID STORE {uids} +FLAGS (\\Deleted)"))?.ok && session.run(command)?.ok)
}

/// Both are in the same mailbox and are sent a command before either has answered.
fn two_sessions(client: &mut Client) -> anyhow::Result<bool> {
    let Some((login, mailbox, uids)) = client.some_messages()? else { return Ok(false) };
    let mut other = client.server.imap(login)?;
    if !other.run(format!("SELECT {}", quote(&mailbox)))?.ok {
        return Ok(false);
    }
    let (one, two) = (some_flags(client), some_flags(client));
    let mut append = format!("APPEND {} ({one}) ", quote(&mailbox)).into_bytes();
    append.extend(literal(&client.message()));
    let session = client.session(login)?;
    session.send(format!("UID STORE {uids} +FLAGS ({one} \\Deleted)"));
    session.send("EXPUNGE");
    other.send(append);
    other.send(format!("UID STORE 1:* FLAGS ({two})"));
    other.send("UID FETCH 1:* (FLAGS)");
    other.flush()?;
    session.flush()?;
    let expunged = session.receive()?.ok && session.receive()?.ok;
    let appended = other.receive()?.ok;
    other.receive()?;
    other.receive()?;
    other.run("LOGOUT")?;
    Ok(expunged && appended)
}

/// What others have read in mailboxes that are not theirs.
fn seen(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let mut foreign = client.mailboxes(login)?;
    foreign.retain(|name| !name.starts_with("INBOX"));
    if foreign.is_empty() {
        return Ok(false);
    }
    let mailbox = client.rng.pick(&foreign).clone();
    let Some(uids) = client.select(login, &mailbox)?.filter(|uids| !uids.is_empty()) else { return Ok(false) };
    let (some, how) = (client.rng.sample(&uids, 3), *client.rng.pick(&["+FLAGS", "+FLAGS", "-FLAGS"]));
    let some: Vec<String> = some.iter().map(u64::to_string).collect();
    let session = client.session(login)?;
    let stored = session.run(format!("UID STORE {} {how} (\\Seen)", some.join(",")))?.ok;
    // It is written when the mailbox is left.
    Ok(stored && session.run("UNSELECT")?.ok)
}

fn annotate_message(client: &mut Client) -> anyhow::Result<bool> {
    let Some((login, _, uids)) = client.some_messages()? else { return Ok(false) };
    let entry = *client.rng.pick(&["/comment", "/altsubject"]);
    let scope = *client.rng.pick(&["value.shared", "value.priv"]);
    let value = match client.rng.chance(20) {
        true => "NIL".to_owned(),
        false => quote(&format!("note \"{}\" (x) {{3}}", client.rng.below(100))),
    };
    Ok(client.session(login)?.run(format!("UID STORE {uids} ANNOTATION ({entry} ({scope} {value}))"))?.ok)
}

fn some_value(client: &mut Client) -> Vec<u8> {
    match client.rng.below(5) {
        0 => b"NIL".to_vec(),
        1 => literal(format!("two\r\nlines {} Gr\u{fc}\u{df}e", client.rng.below(100)).as_bytes()),
        _ => quote(&format!("value {}", client.rng.below(100))).into_bytes(),
    }
}

fn annotate_mailbox(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let mailbox = client.some_mailbox(login)?;
    let (scope, entry) = (*client.rng.pick(&["/shared", "/private"]), *client.rng.pick(&ENTRIES));
    let mut command = format!("SETMETADATA {} ({scope}{entry} ", quote(&mailbox)).into_bytes();
    command.extend(some_value(client));
    command.push(b')');
    Ok(client.session(login)?.run(command)?.ok)
}

fn annotate_server(client: &mut Client) -> anyhow::Result<bool> {
    let entry = *client.rng.pick(&["/shared/comment", "/shared/admin", "/shared/vendor/spooltap.test/note"]);
    let mut command = format!("SETMETADATA \"\" ({entry} ").into_bytes();
    command.extend(some_value(client));
    command.push(b')');
    Ok(client.session(ADMIN)?.run(command)?.ok)
}

fn option(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let mailbox = client.some_mailbox(login)?;
    let yes = *client.rng.pick(&["\"true\"", "\"false\""]);
    let days = format!("\"{}\"", 30 + client.rng.below(30));
    let (name, value) = match client.rng.below(4) {
        0 => ("sharedseen", yes),
        1 => ("duplicatedeliver", yes),
        2 => ("expire", days.as_str()),
        _ => ("news2mail", "\"news@lab.test\""),
    };
    // Expiry and the like are for administrators.
    let name = format!("/shared/vendor/cmu/cyrus-imapd/{name}");
    let mailbox = match mailbox.strip_prefix("INBOX") {
        Some(below) => format!("{}{below}", client.of(login, "")),
        None => mailbox,
    };
    let session = client.session(ADMIN)?;
    Ok(session.run(format!("SETMETADATA {} ({name} {value})", quote(&mailbox)))?.ok)
}

fn special_use(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let Some(folder) = client.own_folder(login)? else { return Ok(false) };
    let value = *client.rng.pick(&["\\\\Sent", "\\\\Trash", "\\\\Drafts", "\\\\Archive", ""]);
    let command = format!("SETMETADATA {} (/private/specialuse \"{value}\")", quote(&folder));
    Ok(client.session(login)?.run(command)?.ok)
}

fn acl(client: &mut Client) -> anyhow::Result<bool> {
    let (login, other) = (client.somebody(), client.somebody());
    let folder = client.own_folder(login)?.unwrap_or_else(|| "INBOX".into());
    // Nobody takes their own rights away: what they own has to stay in use.
    if login == other {
        return Ok(false);
    }
    let who = if client.rng.chance(15) { "anyone" } else { other };
    let rights = *client.rng.pick(&RIGHTS);
    let command = match client.rng.chance(25) {
        true => format!("DELETEACL {} {who}", quote(&folder)),
        false => format!("SETACL {} {who} {rights}", quote(&folder)),
    };
    client.noted(login, command)
}

fn subscribe(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let mailbox = client.some_mailbox(login)?;
    Ok(client.session(login)?.run(format!("SUBSCRIBE {}", quote(&mailbox)))?.ok)
}

fn unsubscribe(client: &mut Client) -> anyhow::Result<bool> {
    for _ in 0..4 {
        let login = client.somebody();
        let listed = client.session(login)?.ok("LSUB \"\" *")?.all("LSUB");
        let names: Vec<String> = listed.iter().filter_map(|line| Some(line.get(2)?.text())).collect();
        if !names.is_empty() {
            let name = quote(client.rng.pick::<String>(&names));
            return Ok(client.session(login)?.run(format!("UNSUBSCRIBE {name}"))?.ok);
        }
    }
    Ok(false)
}

/// A name that nobody uses, mostly, below the inbox or below a folder.
fn fresh_name(client: &mut Client, login: &str) -> anyhow::Result<String> {
    let separator = client.server.names().separator();
    let parent = match client.rng.chance(40) {
        true => client.own_folder(login)?.filter(|name| name.matches(separator).count() < 4),
        false => None,
    };
    let base = *client.rng.pick(&["Lists", "Old Mail", "Entw&APw-rfe", "p-q", "A&-B", "zz", "deep"]);
    let dot = if separator == '/' && client.rng.chance(30) { "v1.2" } else { "" };
    Ok(format!("{}{separator}{base}{dot}{}", parent.unwrap_or_else(|| "INBOX".into()), client.rng.below(30)))
}

fn create(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    if client.rng.chance(15) {
        let name = client.server.names().external(&format!("shared.talk.t{}", client.rng.below(50)));
        return client.noted(ADMIN, format!("CREATE {}", quote(&name)));
    }
    let name = fresh_name(client, login)?;
    let options = ["", "", "", " (USE (\\Junk))", " (PARTITION second)"];
    let (who, options) = match *client.rng.pick(&options) {
        // Only administrators choose.
        " (PARTITION second)" => (ADMIN, " second"),
        options => (login, options),
    };
    let name = match (who == ADMIN, name.strip_prefix("INBOX")) {
        (true, Some(below)) => format!("{}{below}", client.of(login, "")),
        _ => name,
    };
    let created = client.noted(who, format!("CREATE {}{options}", quote(&name)))?;
    if created && who == login && client.rng.chance(60) {
        append_to(client, login, &name)?;
    }
    Ok(created)
}

fn delete(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    if client.rng.chance(10) {
        let mut all = client.mailboxes(ADMIN)?;
        let shared = client.server.names().external("shared.talk.t");
        all.retain(|name| name.starts_with(&shared));
        if !all.is_empty() {
            let name = quote(client.rng.pick::<String>(&all));
            client.session(ADMIN)?.run(format!("SETACL {name} {ADMIN} lrswipkxtecda"))?;
            return client.noted(ADMIN, format!("DELETE {name}"));
        }
    }
    let Some(folder) = client.own_folder(login)? else { return Ok(false) };
    client.noted(login, format!("DELETE {}", quote(&folder)))
}

/// A folder, with all that is below it.
fn rename(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let (Some(folder), name) = (client.own_folder(login)?, fresh_name(client, login)?) else { return Ok(false) };
    client.noted(login, format!("RENAME {} {}", quote(&folder), quote(&name)))
}

/// Moves the messages into a new folder; the inbox stays.
fn rename_inbox(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let name = fresh_name(client, login)?;
    client.noted(login, format!("RENAME INBOX {}", quote(&name)))
}

fn partition(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let Some(folder) = client.own_folder(login)? else { return Ok(false) };
    let name = quote(&format!("{}{}", client.of(login, ""), &folder["INBOX".len()..]));
    let to = *client.rng.pick(&["second", "second", "default"]);
    client.session(ADMIN)?.run(format!("SETACL {name} {ADMIN} lrswipkxtecdan"))?;
    client.noted(ADMIN, format!("RENAME {name} {name} {to}"))
}

fn quota(client: &mut Client) -> anyhow::Result<bool> {
    let (login, below) = client.some_root();
    let root = quote(&client.of(login, below));
    let (kilobytes, messages) = (2000 + client.rng.below(9000), 300 + client.rng.below(500));
    let limits = match client.rng.below(4) {
        0 => format!("STORAGE {kilobytes}"),
        1 => format!("MESSAGE {messages} X-ANNOTATION-STORAGE {kilobytes}"),
        2 => format!("STORAGE {kilobytes} MESSAGE {messages} X-NUM-FOLDERS 100"),
        _ => format!("STORAGE {kilobytes} MESSAGE {messages}"),
    };
    client.noted(ADMIN, format!("SETQUOTA {root} ({limits})"))
}

/// A root is made and its limits are taken away again; no IMAP command removes a root.
fn quota_gone(client: &mut Client) -> anyhow::Result<bool> {
    let (login, _) = client.some_root();
    let root = quote(&client.of(login, ""));
    client.noted(ADMIN, format!("SETQUOTA {root} ()"))
}

const SCRIPTS: [&str; 4] = [
    "keep;\r\n",
    "require [\"fileinto\"];\r\nif header :contains \"subject\" \"7\" { fileinto \"INBOX.Work\"; }\r\n",
    "require [\"imap4flags\"];\r\nif header :contains \"subject\" \"3\" { addflag \"\\\\Flagged\"; addflag \"sorted\"; }\r\n",
    "# nothing but a remark\r\nif size :over 20K { discard; }\r\n",
];

fn sieve_put(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.somebody();
    let name = *client.rng.pick(&["main", "spare", "holiday 2026"]);
    let script = client.rng.pick(&SCRIPTS).replace("INBOX.", &format!("INBOX{}", client.server.names().separator()));
    let script = format!("{script}# {}\r\n", client.rng.below(1000));
    let mut sieve = client.server.sieve(login)?;
    sieve.put(name, &script)?;
    if client.rng.chance(50) {
        sieve.activate(name)?;
    }
    client.note(format!("{login}: script {name}"));
    Ok(true)
}

fn sieve_activate(client: &mut Client) -> anyhow::Result<bool> {
    some_script(client, |sieve, name, rng| sieve.activate(if rng.chance(30) { "" } else { name }))
}

fn sieve_delete(client: &mut Client) -> anyhow::Result<bool> {
    some_script(client, |sieve, name, _| {
        // The active one cannot be deleted.
        sieve.activate("")?;
        sieve.delete(name)
    })
}

fn some_script(
    client: &mut Client,
    what: impl Fn(&mut crate::util::sieve::Sieve, &str, &mut crate::util::Rng) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    for _ in 0..8 {
        let login = client.somebody();
        let mut sieve = client.server.sieve(login)?;
        let scripts = sieve.list()?;
        if !scripts.is_empty() {
            let name = client.rng.pick(&scripts).0.clone();
            what(&mut sieve, &name, &mut client.rng)?;
            client.note(format!("{login}: script {name} changed"));
            return Ok(true);
        }
    }
    Ok(false)
}

fn user_created(client: &mut Client) -> anyhow::Result<bool> {
    let workload = client.workload;
    let login = {
        let mut guests = workload.guests.lock().expect("lock");
        let free: Vec<&str> = GUESTS.into_iter().filter(|login| !guests.contains(login)).collect();
        if free.is_empty() {
            return Ok(false);
        }
        let login = *client.rng.pick(&free);
        let server = client.server;
        server.make_user(client.session(ADMIN)?, login)?;
        client.note(format!("account {login} made"));
        guests.push(login);
        login
    };
    let separator = client.server.names().separator();
    let folder = format!("INBOX{separator}Work");
    client.session(login)?.run(format!("CREATE {folder}"))?;
    client.session(login)?.run(format!("SUBSCRIBE {folder}"))?;
    append_to(client, login, "INBOX")?;
    append_to(client, login, &folder)?;
    Ok(true)
}

fn user_deleted(client: &mut Client) -> anyhow::Result<bool> {
    let workload = client.workload;
    if workload.accounts_stay {
        return Ok(false);
    }
    let mut guests = workload.guests.lock().expect("lock");
    let Some(at) = (!guests.is_empty()).then(|| client.rng.below(guests.len())) else { return Ok(false) };
    let inbox = quote(&client.of(guests[at], ""));
    // What the account still wants is refused from here on.
    client.sessions.remove(guests[at]);
    let deleted = client.noted(ADMIN, format!("DELETE {inbox}"))?;
    if deleted {
        guests.remove(at);
    }
    Ok(deleted)
}

fn user_renamed(client: &mut Client) -> anyhow::Result<bool> {
    let workload = client.workload;
    if workload.names_stay {
        return Ok(false);
    }
    let mut guests = workload.guests.lock().expect("lock");
    let free: Vec<&str> = GUESTS.into_iter().filter(|login| !guests.contains(login)).collect();
    if guests.is_empty() || free.is_empty() {
        return Ok(false);
    }
    let (at, to) = (client.rng.below(guests.len()), *client.rng.pick(&free));
    let names = [client.of(guests[at], ""), client.of(to, "")].map(|name| quote(&name));
    client.sessions.remove(guests[at]);
    let renamed = client.noted(ADMIN, format!("RENAME {} {}", names[0], names[1]))?;
    if renamed {
        guests[at] = to;
    }
    Ok(renamed)
}

/// What was expunged in the inbox of somebody comes back, under new UIDs.
fn unexpunge(client: &mut Client) -> anyhow::Result<bool> {
    let login = *client.rng.pick(&RESIDENTS);
    let Some(uids) = client.select(login, "INBOX")? else { return Ok(false) };
    if let Some(uid) = uids.first() {
        let session = client.session(login)?;
        session.ok(format!("UID STORE {uid} +FLAGS (\\Deleted)"))?;
        session.ok(format!("UID EXPUNGE {uid}"))?;
    }
    let inbox = client.of(login, "");
    Ok(client.server.tool("unexpunge", &["-a", "-d", &inbox])?.status.success())
}

/// Removes the files of what was expunged and the deleted mailboxes for good.
fn expire(client: &mut Client) -> anyhow::Result<bool> {
    Ok(client.server.tool("cyr_expire", &["-E", "1", "-X", "0", "-D", "0"])?.status.success())
}

fn reconstruct(client: &mut Client) -> anyhow::Result<bool> {
    let login = client.rng.pick::<&str>(&RESIDENTS);
    let inbox = client.of(login, "");
    Ok(client.server.tool("reconstruct", &[&inbox])?.status.success())
}
