//! `spooltap synclog`: puts records into the rolling log, with the options of `cyr_synclog` and by Cyrus's own locking
//! protocol.

use super::setup::state_dir;
use super::{Common, Exit, Failure, Outcome};
use crate::capture::synclog::{append, channels, log_path};
use crate::cyrus::sync_log::quote;
use crate::daemon::control::{Request, ask};
use anyhow::anyhow;
use clap::Args;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

#[derive(Debug, Args)]
#[command(after_help = TYPES)]
pub(super) struct SynclogArgs {
    /// [-C FILE] [--channel NAME] [-TYPE] VALUE [VALUE2]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORD", required = true)]
    words: Vec<OsString>,
}

const TYPES: &str = "\
Types:
  -u, --user           USER: everything of a user
  -U, --unuser         UNUSER: a user who is gone
  -v, --sieve          META: scripts, subscriptions and seen state of a user
  -m, --mailbox        MAILBOX
  -M, --unmailbox      UNMAILBOX: a mailbox that is gone
  -q, --quota          QUOTA: a quota root
  -n, --annotation     ANNOTATION: of a mailbox
  -s, --seen           SEEN: a user and the uniqueid of a mailbox
  -b, --subscription   SUB: a user and a mailbox
  -a, --append, -c, --acl, or none: VALUE is a whole line

      --channel NAME   only to this channel, \"\" for the default one [default: all of sync_log_channels]
  -C FILE              imapd.conf

Mailboxes and quota roots are written by their internal names (user.jane.Sent), users by their ids.";

/// `TYPE value` or `TYPE value value2` by option.
const KINDS: &[(char, &str, &str, usize)] = &[
    ('u', "user", "USER", 1),
    ('U', "unuser", "UNUSER", 1),
    ('v', "sieve", "META", 1),
    ('m', "mailbox", "MAILBOX", 1),
    ('M', "unmailbox", "UNMAILBOX", 1),
    ('a', "append", "", 1),
    ('c', "acl", "", 1),
    ('q', "quota", "QUOTA", 1),
    ('n', "annotation", "ANNOTATION", 1),
    ('s', "seen", "SEEN", 2),
    ('b', "subscription", "SUB", 2),
];

/// What was asked for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    conf: Option<PathBuf>,
    /// The empty name is the default channel.
    channel: Option<String>,
    kind: Option<char>,
    values: Vec<OsString>,
}

/// As getopt(3) does it: options before, between and after the values, `--` ends them; the last type counts.
fn parse(words: &[OsString]) -> Result<Asked, String> {
    let mut asked = Asked::default();
    let mut words: VecDeque<&OsString> = words.iter().collect();
    while let Some(word) = words.pop_front() {
        let mut next = |name: &str| words.pop_front().ok_or_else(|| format!("{name} needs a value"));
        match word.as_bytes() {
            b"--" => {
                asked.values.extend(words.drain(..).cloned());
            }
            b"--channel" => asked.channel = Some(next("--channel")?.to_string_lossy().into_owned()),
            [b'-', b'-', name @ ..] => match name.strip_prefix(b"channel=") {
                Some(channel) => asked.channel = Some(String::from_utf8_lossy(channel).into_owned()),
                None => {
                    let kind = KINDS.iter().find(|(_, long, ..)| long.as_bytes() == name);
                    asked.kind = Some(kind.ok_or_else(|| format!("unknown option {}", word.display()))?.0);
                }
            },
            [b'-', letters @ ..] if !letters.is_empty() => {
                for (place, letter) in letters.iter().enumerate() {
                    if *letter == b'C' {
                        let rest = letters.get(place + 1..).unwrap_or_default();
                        let file = match rest.is_empty() {
                            true => next("-C")?.clone(),
                            false => OsStr::from_bytes(rest).to_owned(),
                        };
                        asked.conf = Some(file.into());
                        break;
                    }
                    let kind = KINDS.iter().find(|(short, ..)| *short == char::from(*letter));
                    asked.kind = Some(kind.ok_or_else(|| format!("unknown option -{}", char::from(*letter)))?.0);
                }
            }
            _ => asked.values.push(word.clone()),
        }
    }
    Ok(asked)
}

/// The line to be written.
fn line(asked: Asked) -> Result<Vec<u8>, String> {
    let kind = asked.kind.and_then(|kind| KINDS.iter().find(|(short, ..)| *short == kind));
    let (word, count) = kind.map_or(("", 1), |(_, _, word, count)| (*word, *count));
    let mut values = asked.values.into_iter().map(OsString::into_vec);
    let mut value = || match values.next() {
        None => Err(format!("{count} value{} needed", if count == 1 { " is" } else { "s are" })),
        Some(value) if value.is_empty() => Err("a value is empty".to_owned()),
        Some(value) => Ok(value),
    };
    let mut line = word.as_bytes().to_vec();
    for _ in 0..count {
        let value = value()?;
        if word.is_empty() {
            if value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
                return Err("a record is one line".to_owned());
            }
            line.extend_from_slice(&value);
            continue;
        }
        line.push(b' ');
        line.extend(quote(&value).ok_or("a name cannot hold a line end")?);
    }
    // cyr_synclog leaves it out after a whole line, and the next record is glued to that one.
    line.push(b'\n');
    Ok(line)
}

pub(super) fn synclog(common: &Common, args: &SynclogArgs) -> Outcome {
    let usage = |text: String| Failure::new(Exit::Usage, anyhow!("{text}; see spooltap synclog --help"));
    let asked = parse(&args.words).map_err(usage)?;
    let path = asked.conf.clone().or_else(|| common.imapd_conf.clone()).unwrap_or_else(|| "/etc/imapd.conf".into());
    let store = crate::spool::open_store(&path).map_err(|error| Failure::new(Exit::Source, error))?;
    let conf = store.conf();
    let is_logged = conf.switch("sync_log", false);
    let named = asked.channel.clone().or_else(|| common.channel.clone());
    let line = line(asked).map_err(usage)?;
    // A daemon that runs is told at once, whatever it notices change by; none may run.
    let told = state_dir(common).is_ok_and(|state| ask(&state, &Request::Logged { line: line.clone() }).is_ok());
    if !is_logged && told {
        return Ok(Exit::Ok);
    }
    if !is_logged {
        let fault = anyhow!("sync_log is off in {}: Cyrus writes no rolling log and nobody reads one", path.display());
        return Err(Failure::new(Exit::Config, fault));
    }
    let to = match named {
        Some(name) => vec![Some(name).filter(|name| !name.is_empty())],
        None => channels(conf.get("sync_log_channels")),
    };
    for channel in to {
        let log = log_path(&store.layout().configdirectory, channel.as_deref());
        append(&log, &line).map_err(|error| {
            Failure::new(Exit::Source, anyhow::Error::from(error).context(log.display().to_string()))
        })?;
    }
    Ok(Exit::Ok)
}

/// The command line as clap is to see it: after `synclog` the options are those of `cyr_synclog`, some of which mean
/// something else to us; and the program may be called by that name.
pub(super) fn arguments(given: Vec<OsString>) -> Vec<OsString> {
    let called = given.first().map(PathBuf::from).unwrap_or_default();
    if called.file_name() == Some(OsStr::new("cyr_synclog")) {
        let head = ["spooltap", "synclog", "--"].map(OsString::from);
        return head.into_iter().chain(given.into_iter().skip(1)).collect();
    }
    let is_command = |at: &usize| {
        let before = given.get(at - 1).map(|word| word.as_bytes()).unwrap_or_default();
        let is_switch =
            matches!(before, b"--json" | b"-v" | b"-vv" | b"--verbose" | b"--allow-removals" | b"--allow-loss");
        given.get(*at).is_some_and(|word| word == "synclog")
            && (*at == 1 || is_switch || !before.starts_with(b"-") || before.contains(&b'='))
    };
    let Some(at) = (1..given.len()).find(is_command) else { return given };
    let asks_help = given.get(at + 1).is_some_and(|word| word == "--help" || word == "-h");
    let mut out = given;
    if !asks_help {
        out.insert(at + 1, "--".into());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &[&str]) -> Vec<OsString> {
        text.iter().map(OsString::from).collect()
    }

    fn check(given: &[&str], expected: &str) {
        let line = parse(&words(given)).and_then(line).map(|line| String::from_utf8(line).expect("text"));
        assert_eq!(line.unwrap_or_else(|error| format!("! {error}")), expected, "{given:?}");
    }

    #[test]
    fn options_of_every_release() {
        check(&["-u", "jane"], "USER jane\n");
        check(&["-C", "/x", "-U", "jane"], "UNUSER jane\n");
        check(&["-v", "jane"], "META jane\n");
        check(&["-m", "user.jane.A B"], "MAILBOX \"user.jane.A B\"\n");
        check(&["--unmailbox", "user.jane"], "UNMAILBOX user.jane\n");
        check(&["-q", "user.jane"], "QUOTA user.jane\n");
        check(&["user.jane", "-n"], "ANNOTATION user.jane\n");
        check(&["-s", "jane", "4rmscy31"], "SEEN jane 4rmscy31\n");
        check(&["-b", "jane", "user.joe"], "SUB jane user.joe\n");
        check(&["APPEND user.jane"], "APPEND user.jane\n");
        check(&["-a", "APPEND user.jane"], "APPEND user.jane\n");
        check(&["-um", "user.jane"], "MAILBOX user.jane\n");
        check(&["-m", "--", "-odd"], "MAILBOX -odd\n");
        check(&["-s", "jane"], "! 2 values are needed");
        check(&["-u", ""], "! a value is empty");
        check(&["-x", "jane"], "! unknown option -x");
        check(&["-m", "a\nb"], "! a name cannot hold a line end");
    }

    #[test]
    fn options_before_the_command_are_ours_and_after_it_those_of_cyr_synclog() {
        let see = |given: &[&str]| arguments(words(given));
        assert_eq!(
            see(&["spooltap", "-C", "f", "synclog", "-n", "x"]),
            words(&["spooltap", "-C", "f", "synclog", "--", "-n", "x"])
        );
        assert_eq!(see(&["/x/cyr_synclog", "-n", "x"]), words(&["spooltap", "synclog", "--", "-n", "x"]));
        assert_eq!(see(&["spooltap", "-n", "synclog", "run"]), words(&["spooltap", "-n", "synclog", "run"]));
        assert_eq!(see(&["spooltap", "synclog", "--help"]), words(&["spooltap", "synclog", "--help"]));
    }
}
