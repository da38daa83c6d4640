//! Called as `sync_client` or `sync_server` (by a link, or `spooltap sync_client …`): these programs' options, put into our
//! own words, and their exit codes, so that lines of cyrus.conf and scripts go on working.

use super::{Cli, Common, Exit};
use crate::cyrus::imapd_conf::ImapdConf;
use crate::spool::read_conf;
use clap::Parser;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Which of Cyrus's programs we are taken for, and its arguments.
pub(super) fn called(given: &[OsString]) -> Option<(&'static str, Vec<OsString>)> {
    let name = |word: &OsStr| ["sync_client", "sync_server"].into_iter().find(|name| word == *name);
    let by_link = given.first().and_then(|path| Path::new(path).file_name().and_then(name));
    if let Some(found) = by_link {
        return Some((found, given.get(1..).unwrap_or_default().to_vec()));
    }
    let found = given.get(1).and_then(|word| name(word))?;
    Some((found, given.get(2..).unwrap_or_default().to_vec()))
}

pub(super) fn run(name: &str, words: Vec<OsString>) -> ExitCode {
    let done = match name {
        "sync_server" => sync_server(words),
        _ => sync_client(words),
    };
    done.unwrap_or_else(|(code, text)| {
        eprintln!("{name}: {text}");
        super::syslog::error(&text);
        ExitCode::from(code)
    })
}

/// Exit code and reason.
type Wrong = (u8, String);

const USAGE: u8 = 64;
const SOFTWARE: u8 = 70;
const TEMPORARY: u8 = 75;
const CONFIG: u8 = 78;

/// Options with their values, and the other words, as getopt(3) finds them.
struct Words {
    options: Vec<(char, Option<String>)>,
    rest: Vec<String>,
}

/// `letters` as for getopt: a colon after those that need a value.
fn getopt(words: Vec<OsString>, letters: &str) -> Result<Words, Wrong> {
    let (mut options, mut rest) = (Vec::new(), Vec::new());
    let mut words: VecDeque<OsString> = words.into();
    let text = |word: &OsStr| word.to_string_lossy().into_owned();
    while let Some(word) = words.pop_front() {
        let bytes = word.as_bytes();
        if bytes == b"--" {
            rest.extend(words.drain(..).map(|word| text(&word)));
        } else if bytes.len() < 2 || !bytes.starts_with(b"-") {
            rest.push(text(&word));
        } else {
            let cluster = text(&word);
            for (at, letter) in cluster.char_indices().skip(1) {
                let Some(place) = letters.find(letter).filter(|_| letter != ':') else {
                    return Err((USAGE, format!("unknown option -{letter}")));
                };
                if !letters.get(place + 1..).is_some_and(|more| more.starts_with(':')) {
                    options.push((letter, None));
                    continue;
                }
                let value = match cluster.get(at + letter.len_utf8()..) {
                    Some(rest) if !rest.is_empty() => Some(rest.to_owned()),
                    _ => words.pop_front().map(|word| text(&word)),
                };
                let value = value.ok_or((USAGE, format!("-{letter} needs a value")))?;
                options.push((letter, Some(value)));
                break;
            }
        }
    }
    Ok(Words { options, rest })
}

/// Options that say nothing about us, with the reason.
const MEANINGLESS: &[(char, &str)] = &[
    ('w', "there is no pause for a debugger"),
    ('t', "sessions are not ended by age"),
    ('d', "changes are replicated as they come"),
    ('L', "no murder is told of anything"),
    ('N', "no lock is waited for"),
    ('O', "nothing is ever copied back"),
    ('a', "the replica decides where it keeps bodies"),
];

/// Options that we would have to obey and do not.
const REFUSED: &[(char, &str)] = &[('p', "write [partition] into the file of --config, and use spooltap push or run")];

fn sync_client(words: Vec<OsString>) -> Result<ExitCode, Wrong> {
    let again = words.clone();
    let Words { options, mut rest } = getopt(words, "C:vlS:F:f:w:t:d:n:rRumsozOAp:1LNa")?;
    let has = |letter: char| options.iter().any(|(option, _)| *option == letter);
    let value = |letter: char| options.iter().rev().find(|(option, _)| *option == letter)?.1.clone();
    if let Some((letter, cure)) = REFUSED.iter().find(|(letter, _)| has(*letter)) {
        return Err((USAGE, format!("-{letter} is not supported; {cure}")));
    }
    for (letter, reason) in MEANINGLESS.iter().filter(|(letter, _)| has(*letter)) {
        eprintln!("sync_client: -{letter} has no effect: {reason}");
    }
    let modes: Vec<char> = ['u', 'm', 's', 'A', 'r', 'R'].into_iter().filter(|mode| has(*mode)).collect();
    let [mode] = modes[..] else {
        return Err((USAGE, "give one of -u USER…, -m MAILBOX…, -s USER…, -A, -r, -R".into()));
    };
    let path = value('C').map_or_else(|| PathBuf::from("/etc/imapd.conf"), PathBuf::from);
    let conf = read_conf(&path).map_err(|error| (CONFIG, error.to_string()))?;
    super::syslog::open("sync_client", &conf, has('l'));
    let channel = value('n');
    let option = |key: &str| match &channel {
        Some(channel) => conf.for_service(channel, key).map(str::to_owned),
        None => conf.get(key).map(str::to_owned),
    };
    let mut ours: Vec<String> = vec!["spooltap".into(), "-C".into(), path.display().to_string()];
    ours.extend(channel.iter().flat_map(|channel| ["--channel".to_owned(), channel.clone()]));
    ours.extend(["-v".to_owned()].into_iter().filter(|_| has('v')));
    ours.extend(["--compress", "on"].map(str::to_owned).into_iter().filter(|_| has('z')));
    match value('S') {
        Some(server) => ours.extend(["--replica".into(), url(&server, &option)?]),
        None if option("sync_host").is_none_or(|host| host.is_empty()) => {
            return Err((SOFTWARE, "no server is named; set sync_host or give -S".into()));
        }
        None => {}
    }
    if let Some(file) = value('f').filter(|_| matches!(mode, 'u' | 'm' | 's')) {
        let text = std::fs::read_to_string(&file).map_err(|error| (SOFTWARE, format!("{file}: {error}")))?;
        rest.extend(
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned),
        );
    }
    if matches!(mode, 'u' | 'm' | 's') && rest.is_empty() {
        return Err((USAGE, format!("-{mode} needs a name")));
    }
    if let Some(file) = value('f').filter(|_| matches!(mode, 'r' | 'R')) {
        return play(ours, &file, &conf, has('o'), &option);
    }
    match mode {
        'r' | 'R' if has('1') => play_once(ours, &conf, channel.as_deref(), has('o'), &option),
        'r' | 'R' => {
            if mode == 'r' && std::env::var_os("CYRUS_ISDAEMON").is_none() {
                return daemonise(again);
            }
            roll(ours, &conf, value('F').or_else(|| option("sync_shutdown_file")), channel.as_deref())
        }
        'A' if rest.len() > 1 => Err((USAGE, "-A takes one prefix at most".into())),
        'A' if !rest.is_empty() => {
            let mut worst = ExitCode::SUCCESS;
            for words in below(&path, rest.first().map(String::as_str).unwrap_or_default())? {
                let done = once(ours.clone(), &words, has('o'), &option)?;
                worst = if done == ExitCode::SUCCESS { worst } else { done };
            }
            Ok(worst)
        }
        'A' => once(ours, &["push", "-A", "--compare"].map(str::to_owned), has('o'), &option),
        _ => {
            let names = rest.into_iter().map(|name| if mode == 'm' { internal(&name, &conf) } else { name });
            let names = names.flat_map(|name| [format!("-{mode}"), name]);
            let push: Vec<String> = std::iter::once("push".to_owned()).chain(names).collect();
            once(ours, &push, has('o'), &option)
        }
    }
}

/// `host`, `host:port`, `/path`; who we are there stands in imapd.conf.
fn url(server: &str, option: &dyn Fn(&str) -> Option<String>) -> Result<String, Wrong> {
    if server.starts_with('/') {
        return Ok(format!("csync+unix://{server}"));
    }
    let user = option("sync_authname").filter(|user| !user.is_empty());
    let user = user.ok_or((SOFTWARE, "sync_authname is not set".to_owned()))?;
    let user: String = user
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
            other => format!("%{other:02x}"),
        })
        .collect();
    if server.contains('/') {
        return Err((USAGE, format!("-S {server}: /tls and /noauth are not supported")));
    }
    let has_port =
        server.rsplit_once(':').is_some_and(|(host, port)| !host.contains(':') && port.parse::<u16>().is_ok());
    let port = option("sync_port").filter(|port| port.parse::<u16>().is_ok()).unwrap_or_else(|| "2005".into());
    Ok(if has_port { format!("csync://{user}@{server}") } else { format!("csync://{user}@{server}:{port}") })
}

/// The internal name of what an administrator calls a mailbox.
fn internal(name: &str, conf: &ImapdConf) -> String {
    let domains = conf.get("virtdomains").is_some_and(|kind| !matches!(kind, "off" | "no" | "0"));
    let (local, domain) = match name.rsplit_once('@') {
        Some((local, domain)) if domains => {
            (local, Some(domain).filter(|domain| conf.get("defaultdomain") != Some(*domain)))
        }
        _ => (name, None),
    };
    // The default has been the UNIX one since 3.0; a name without a slash then is an internal one, as it always was.
    let unix = conf.switch("unixhierarchysep", local.contains('/'));
    let local = if unix { local.replace('.', "^").replace('/', ".") } else { local.to_owned() };
    domain.map_or(local.clone(), |domain| format!("{domain}!{local}"))
}

/// Our own words, run to the end.
fn ours(words: Vec<String>) -> Result<Exit, Wrong> {
    let cli = Cli::try_parse_from(&words).map_err(|error| (USAGE, error.to_string()))?;
    super::logger::start(&cli).and_then(|()| super::dispatch(cli)).map_err(|failure| {
        let code = match failure.exit {
            Exit::Replica => Exit::Replica as u8,
            Exit::Interrupted => TEMPORARY,
            Exit::Usage => USAGE,
            _ => 1,
        };
        (code, format!("{:#}", failure.error))
    })
}

/// Longest wait between two tries to connect.
fn longest_wait(option: &dyn Fn(&str) -> Option<String>) -> Duration {
    let text = option("sync_reconnect_maxwait").unwrap_or_default();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "m" => 60,
        "h" => 3600,
        _ => 1,
    };
    Duration::from_secs(digits.parse::<u64>().unwrap_or(1200).saturating_mul(unit).max(15))
}

/// One push with a state of its own: it looks at the replica itself, and may run beside a rolling one.
fn once(
    start: Vec<String>,
    push: &[String],
    connect_once: bool,
    option: &dyn Fn(&str) -> Option<String>,
) -> Result<ExitCode, Wrong> {
    let state = scratch().map_err(|error| (SOFTWARE, format!("no directory for the state: {error}")))?;
    let words: Vec<String> = [start, vec!["--state".into(), state.display().to_string()], push.to_vec()].concat();
    let mut wait = Duration::from_secs(15);
    let result = loop {
        match ours(words.clone()) {
            Err((code, text)) if code == Exit::Replica as u8 && !connect_once => {
                let text = format!("can not connect: {text}, retrying in {} seconds", wait.as_secs());
                eprintln!("sync_client: {text}");
                super::syslog::error(&text);
                std::thread::sleep(wait);
                wait = (wait * 2).min(longest_wait(option));
            }
            Err((code, text)) if code == Exit::Replica as u8 => break Err((1, text)),
            other => break other,
        }
    };
    let _ = std::fs::remove_dir_all(&state);
    result.map(|exit| ExitCode::from(if exit == Exit::Ok { 0 } else { 1 }))
}

/// A directory that nobody else has.
fn scratch() -> std::io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let name = format!("spooltap-sync_client-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    std::fs::DirBuilder::new().mode(0o700).create(&path)?;
    Ok(path)
}

/// Where receipts are kept from one life to the next: `SPOOLTAP_STATE`, or a directory of this configuration and channel
/// below `/var/lib/spooltap`, or below TMPDIR where that cannot be written to.
fn lasting(start: &[String]) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    if let Some(state) = std::env::var_os("SPOOLTAP_STATE") {
        return Ok(state.into());
    }
    let hash = blake3::hash(start.join("\0").as_bytes()).to_hex();
    let name = format!("sync_client-{}", hash.get(..16).unwrap_or_default());
    let usual = Path::new(crate::config::DEFAULT_STATE).join(&name);
    let probe = usual.join(format!(".probe-{}", std::process::id()));
    if std::fs::create_dir_all(&usual).and_then(|()| std::fs::write(&probe, "")).is_ok() {
        let _ = std::fs::remove_file(&probe);
        return Ok(usual);
    }
    let uid = nix::unistd::geteuid().as_raw();
    let path = std::env::temp_dir().join(format!("spooltap-{uid}-{name}"));
    match std::fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    // Somebody else's directory of that name is not ours to trust.
    let meta = std::fs::symlink_metadata(&path)?;
    if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o077 != 0 {
        return Err(std::io::Error::other(format!("{} belongs to somebody else", path.display())));
    }
    Ok(path)
}

/// What is open when the shutdown file appears gets so long.
const LAST_WORDS: Duration = Duration::from_secs(30);

static SHUT_DOWN: AtomicBool = AtomicBool::new(false);

/// Rolls until SIGTERM, or until the shutdown file is there.
fn roll(
    mut start: Vec<String>,
    conf: &ImapdConf,
    shutdown_file: Option<String>,
    channel: Option<&str>,
) -> Result<ExitCode, Wrong> {
    let state = lasting(&start).map_err(|error| (SOFTWARE, format!("no directory for the state: {error}")))?;
    if let Some(file) = shutdown_file {
        let common = Common { state: Some(state.clone()), ..Common::default() };
        std::thread::spawn(move || {
            loop {
                if std::fs::remove_file(&file).is_ok() {
                    SHUT_DOWN.store(true, Ordering::SeqCst);
                    finish(&common);
                    let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGTERM);
                    return;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
    }
    // The log that Cyrus writes for us has to be taken by somebody, else it grows for ever.
    let known = crate::capture::synclog::channels(conf.get("sync_log_channels"));
    if conf.switch("sync_log", false) && known.contains(&channel.map(str::to_owned)) {
        start.extend(["--capture", "synclog"].map(str::to_owned));
    }
    start.extend(["--state".to_owned(), state.display().to_string()]);
    start.push("run".into());
    ours(start)?;
    Ok(ExitCode::from(if SHUT_DOWN.load(Ordering::SeqCst) { 0 } else { TEMPORARY }))
}

/// Who asks us by the file to end expects that what was taken from the log is over there by then.
fn finish(common: &Common) {
    let deadline = Instant::now() + LAST_WORDS;
    let mut empty = 0;
    while empty < 2 && Instant::now() < deadline {
        let open = super::control::ask_status(common).map(|status| super::failover::open(&status));
        empty = if open.is_ok_and(|open| open.is_empty()) { empty + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Pushes of the users, and of the shared mailboxes, whose names begin so.
fn below(conf: &Path, prefix: &str) -> Result<Vec<Vec<String>>, Wrong> {
    use crate::model::MailStore;
    let fail = |error: crate::model::StoreError| (1, error.to_string());
    let store = crate::spool::open_store(conf).map_err(fail)?;
    let begins = |name: &[u8]| name.starts_with(prefix.as_bytes());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (mut users, mut shared) = (vec!["push".to_owned()], vec!["push".to_owned()]);
    for user in store.users().map_err(fail)?.iter().filter(|user| begins(user.inbox().as_bytes())) {
        users.extend(["-u".to_owned(), text(user.as_bytes())]);
    }
    let listing = store.listing().map_err(fail)?;
    for entry in listing.entries().filter(|entry| begins(entry.name.as_bytes())) {
        if entry.name.account(store.deleted_prefix()).is_none() {
            shared.extend(["-m".to_owned(), text(entry.name.as_bytes())]);
        }
    }
    Ok([users, shared].into_iter().filter(|words| words.len() > 1).collect())
}

/// `-1`: what has been logged by now, and no more.
fn play_once(
    start: Vec<String>,
    conf: &ImapdConf,
    channel: Option<&str>,
    connect_once: bool,
    option: &dyn Fn(&str) -> Option<String>,
) -> Result<ExitCode, Wrong> {
    let home = conf.get("configdirectory").ok_or((CONFIG, "configdirectory is not set".to_owned()))?;
    let sync = Path::new(home).join("sync");
    let log = channel.map_or(sync.clone(), |channel| sync.join(channel)).join("log");
    let fail = |error: std::io::Error| (SOFTWARE, format!("{}: {error}", log.display()));
    let Some(run) = crate::capture::synclog::take(&log).map_err(fail)? else { return Ok(ExitCode::SUCCESS) };
    let done = play(start, &run.display().to_string(), conf, connect_once, option)?;
    // What could not be done stays, and is taken again by the next one.
    if done == ExitCode::SUCCESS {
        std::fs::remove_file(&run).map_err(fail)?;
    }
    Ok(done)
}

/// Plays one log file; the file stays.
fn play(
    start: Vec<String>,
    file: &str,
    conf: &ImapdConf,
    connect_once: bool,
    option: &dyn Fn(&str) -> Option<String>,
) -> Result<ExitCode, Wrong> {
    use crate::cyrus::sync_log::{Record, parse};
    use std::io::Read;
    let mut bytes = Vec::new();
    let read = match file {
        "-" => std::io::stdin().read_to_end(&mut bytes),
        file => std::fs::File::open(file).and_then(|mut file| file.read_to_end(&mut bytes)),
    };
    read.map_err(|error| (SOFTWARE, format!("{file}: {error}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let prefix = conf.get("deletedprefix").unwrap_or("DELETED").as_bytes().to_vec();
    let owner = |name: &[u8]| crate::model::MboxName::new(name).account(&prefix).map(|user| text(user.as_bytes()));
    // Of whom something is told; `None` where it is nobody's.
    let mut told: Vec<Option<String>> = Vec::new();
    for record in bytes.split(|&byte| byte == b'\n').filter_map(parse) {
        match record {
            Record::User(user) | Record::Unuser(user) | Record::Meta(user) => told.push(Some(text(&user))),
            Record::Seen(user, _) | Record::Sub(user, _) => told.push(Some(text(&user))),
            Record::Mailbox(name) | Record::Quota(name) => told.push(owner(&name)),
            Record::Annotation(name) => told.push(owner(&name)),
            Record::Mailboxes(one, two) => told.extend([owner(&one), owner(&two)]),
            Record::Unknown(_) => told.push(None),
        }
    }
    let whole = told.iter().any(Option::is_none);
    let users: std::collections::BTreeSet<String> = told.into_iter().flatten().collect();
    // A user is the least that is compared: whatever a line says of him is in it. What is nobody's is in everything.
    let push: Vec<String> = match (whole, users.is_empty()) {
        (true, _) => ["push", "-A", "--compare"].map(str::to_owned).to_vec(),
        (false, true) => return Ok(ExitCode::SUCCESS),
        (false, false) => {
            std::iter::once("push".to_owned()).chain(users.into_iter().flat_map(|user| ["-u".into(), user])).collect()
        }
    };
    once(start, &push, connect_once, option)
}

/// `-r` goes on in the background: the same again as `-R`, in a process group of its own.
fn daemonise(words: Vec<OsString>) -> Result<ExitCode, Wrong> {
    let fail = |error: std::io::Error| (SOFTWARE, format!("cannot go into the background: {error}"));
    let mut command = Command::new(std::env::current_exe().map_err(fail)?);
    command.arg("sync_client").args(words).env("CYRUS_ISDAEMON", "1").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(fail)?;
    Ok(ExitCode::SUCCESS)
}

fn sync_server(words: Vec<OsString>) -> Result<ExitCode, Wrong> {
    let Words { options, rest } = getopt(words, "C:p:fDU:T:X")?;
    if let Some(word) = rest.first() {
        return Err((USAGE, format!("{word} is not expected")));
    }
    for (letter, reason) in
        [('f', "nothing is forced"), ('p', "no protection is assumed"), ('D', "there is no debugger")]
    {
        if options.iter().any(|(option, _)| *option == letter) {
            eprintln!("sync_server: -{letter} has no effect: {reason}");
        }
    }
    let path = options.iter().rev().find(|(option, _)| *option == 'C').and_then(|(_, value)| value.clone());
    let path = path.unwrap_or_else(|| "/etc/imapd.conf".into());
    let conf = read_conf(Path::new(&path)).map_err(|error| (CONFIG, error.to_string()))?;
    super::syslog::open("sync_server", &conf, false);
    // As with a sync_server, what this imapd.conf describes is the replica, unless it names another store.
    let store = conf.get("spooltap_store").or_else(|| conf.get("spooltap_archive")).map(str::to_owned);
    let store = match store {
        Some(store) => store,
        None => {
            let path = std::path::absolute(&path).map_err(|error| (CONFIG, format!("{path}: {error}")))?;
            format!("cyrus://{}", path.display())
        }
    };
    let passwords = conf.get("spooltap_passwords").map(str::to_owned);
    let passwords = passwords
        .ok_or_else(|| (CONFIG, format!("{path}: spooltap_passwords is not set; set spooltap_passwords: FILE")))?;
    let mut words: Vec<String> =
        ["spooltap", "-C", &path, "serve", "--listen", "inherited"].map(str::to_owned).to_vec();
    words.extend(["--store".into(), store, "--passwords".into(), passwords]);
    words.extend(conf.get("servername").into_iter().flat_map(|name| ["--servername".to_owned(), name.to_owned()]));
    match ours(words) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err((_, text)) => Err((TEMPORARY, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn called_by_link_or_by_word() {
        let name = |text: &str| called(&words(text)).map(|(name, rest)| (name, rest.len()));
        assert_eq!(name("/usr/lib/cyrus/bin/sync_client -r"), Some(("sync_client", 1)));
        assert_eq!(name("spooltap sync_server -C x"), Some(("sync_server", 2)));
        assert_eq!(name("spooltap run"), None);
        assert_eq!(name("spooltap push -u sync_client"), None);
    }

    #[test]
    fn options_as_getopt_reads_them() {
        let read = |text: &str| getopt(words(text), "C:vrun:");
        let Ok(Words { options, rest }) = read("-vC/x -u jane -n two -- -joe") else { panic!("reads") };
        assert_eq!(options, [('v', None), ('C', Some("/x".into())), ('u', None), ('n', Some("two".into()))]);
        assert_eq!(rest, ["jane", "-joe"]);
        assert!(read("-x").is_err() && read("-n").is_err() && read("-:").is_err());
    }

    #[test]
    fn names_and_urls() {
        let conf = |text: &str| ImapdConf::parse(text, &mut |_| Err("none".into())).expect("parses");
        let unix = conf("unixhierarchysep: yes\nvirtdomains: userid\ndefaultdomain: lab.test\n");
        assert_eq!(internal("user/jane.doe/Sent@x.test", &unix), "x.test!user.jane^doe.Sent");
        assert_eq!(internal("user/jane@lab.test", &unix), "user.jane");
        assert_eq!(internal("user.jane.Sent", &conf("unixhierarchysep: no\n")), "user.jane.Sent");
        let option = |key: &str| {
            Some(match key {
                "sync_authname" => "re@pl".to_owned(),
                _ => "2006".to_owned(),
            })
        };
        let url = |server: &str| url(server, &option).expect("a server");
        assert_eq!(url("r.test"), "csync://re%40pl@r.test:2006");
        assert_eq!(url("r.test:99"), "csync://re%40pl@r.test:99");
        assert_eq!(url("/run/csync"), "csync+unix:///run/csync");
    }
}
