//! The system's log, for who calls us by Cyrus's names: through libc's `syslog()`, with the ident that Cyrus gives these
//! programs and the words that monitoring looks for there.

use crate::cyrus::imapd_conf::ImapdConf;
use nix::syslog::{Facility, LogFlags, Priority, Severity};
use std::ffi::CString;
use std::fmt::{Debug, Write};
use std::sync::OnceLock;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// What goes there; nothing if nobody has called `open`.
static OPEN: OnceLock<(Level, Facility)> = OnceLock::new();

/// Longer lines are cut.
const LONGEST: usize = 4000;

/// From here on warnings and errors go to syslog too, with `verbose` what is done as well.
pub(super) fn open(program: &str, conf: &ImapdConf, verbose: bool) {
    let ident = match conf.get("syslog_prefix").filter(|prefix| !prefix.is_empty()) {
        Some(prefix) => format!("{prefix}/{program}"),
        None => program.to_owned(),
    };
    // It is kept by reference, to the end of the process.
    let ident: &'static CString = Box::leak(Box::new(CString::new(ident).unwrap_or_default()));
    let facility = facility(conf.get("syslog_facility").unwrap_or_default());
    if nix::syslog::openlog(Some(ident), LogFlags::LOG_PID, facility).is_ok() {
        let _ = OPEN.set((if verbose { Level::INFO } else { Level::WARN }, facility));
    }
}

/// `syslog_facility` of imapd.conf; Cyrus's packages are built for `mail`.
fn facility(name: &str) -> Facility {
    let local = [
        Facility::LOG_LOCAL0,
        Facility::LOG_LOCAL1,
        Facility::LOG_LOCAL2,
        Facility::LOG_LOCAL3,
        Facility::LOG_LOCAL4,
        Facility::LOG_LOCAL5,
        Facility::LOG_LOCAL6,
        Facility::LOG_LOCAL7,
    ];
    let name = name.to_ascii_lowercase();
    let name = name.strip_prefix("log_").unwrap_or(&name);
    match name {
        "daemon" => Facility::LOG_DAEMON,
        "user" => Facility::LOG_USER,
        _ => name
            .strip_prefix("local")
            .and_then(|at| local.get(at.parse::<usize>().ok()?).copied())
            .unwrap_or(Facility::LOG_MAIL),
    }
}

/// One line, if `open` was called.
pub(super) fn error(text: &str) {
    send(Severity::LOG_ERR, &format!("SYNCERROR: {text}"));
}

fn send(severity: Severity, line: &str) {
    let Some((_, facility)) = OPEN.get() else { return };
    let mut line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    while line.len() > LONGEST {
        line.pop();
    }
    let _ = nix::syslog::syslog(Priority::new(severity, *facility), &line);
}

/// Puts events into syslog; nothing without `open`.
pub(super) fn layer() -> Option<Lines> {
    OPEN.get().map(|(least, _)| Lines { least: *least })
}

pub(super) struct Lines {
    least: Level,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        // What others have to say is not for a mail log.
        if level > self.least || !event.metadata().target().starts_with("spooltap") {
            return;
        }
        let mut said = Said::default();
        event.record(&mut said);
        let (severity, line) = wording(level, &said);
        send(severity, &line);
    }
}

/// Text and fields of an event.
#[derive(Default)]
struct Said {
    text: String,
    fields: Vec<(&'static str, String)>,
}

impl Said {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.text),
            name => self.fields.push((name, value.to_owned())),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// As Cyrus would put it, where it has a word for it.
fn wording(level: Level, said: &Said) -> (Severity, String) {
    let cause = said.field("cause").or(said.field("error")).or(said.field("reason")).unwrap_or_default();
    match said.text.as_str() {
        "login refused" => {
            let peer = said.field("peer").unwrap_or_default();
            // fail2ban and its like want the address in brackets.
            let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host).trim_matches(['[', ']']);
            let mechanism = said.field("mechanism").unwrap_or("PLAIN");
            return (
                Severity::LOG_NOTICE,
                format!("badlogin: [{host}] {mechanism} [SASL(-13): authentication failure: password not right]"),
            );
        }
        "replica lost or not reachable" | "replica is not reachable yet" | "replica refuses us" => {
            let server = said.field("replica").unwrap_or_default();
            return (Severity::LOG_ERR, format!("SYNCERROR: Can not connect to server '{server}': {cause}"));
        }
        _ => {}
    }
    let mut line = String::new();
    let severity = match level {
        Level::ERROR => Severity::LOG_ERR,
        Level::WARN => Severity::LOG_NOTICE,
        _ => Severity::LOG_INFO,
    };
    line.push_str(match level {
        Level::ERROR => "SYNCERROR: ",
        Level::WARN => "SYNCNOTICE: ",
        _ => "",
    });
    let is_io = ["os error", "I/O error", "IOERROR"].iter().any(|word| cause.contains(word));
    if is_io && level <= Level::WARN {
        line.push_str("IOERROR: ");
    }
    line.push_str(&said.text);
    for (name, value) in said.fields.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = write!(line, " {name}=<{value}>");
    }
    (severity, line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_monitoring_looks_for() {
        let check = |level: Level, text: &str, fields: &[(&'static str, &str)], expected: &str| {
            let fields = fields.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
            assert_eq!(wording(level, &Said { text: text.into(), fields }).1, expected);
        };
        check(
            Level::ERROR,
            "quarantined",
            &[("mailbox", "user.jane"), ("reason", "replica refused: x")],
            "SYNCERROR: quarantined mailbox=<user.jane> reason=<replica refused: x>",
        );
        check(
            Level::WARN,
            "a message cannot be staged",
            &[("error", "/x: No space left on device (os error 28)")],
            "SYNCNOTICE: IOERROR: a message cannot be staged error=</x: No space left on device (os error 28)>",
        );
        check(
            Level::WARN,
            "replica lost or not reachable",
            &[("replica", "csync://a@b:1"), ("cause", "bad response")],
            "SYNCERROR: Can not connect to server 'csync://a@b:1': bad response",
        );
        for (peer, host) in [("192.0.2.7:4711", "192.0.2.7"), ("[2001:db8::1]:4711", "2001:db8::1"), ("local", "local")]
        {
            let line = format!("badlogin: [{host}] LOGIN [SASL(-13): authentication failure: password not right]");
            check(Level::WARN, "login refused", &[("peer", peer), ("mechanism", "LOGIN")], &line);
        }
    }

    #[test]
    fn facilities_by_name() {
        let is = |name: &str, expected: Facility| assert_eq!(facility(name) as i32, expected as i32, "{name}");
        is("", Facility::LOG_MAIL);
        is("LOCAL6", Facility::LOG_LOCAL6);
        is("daemon", Facility::LOG_DAEMON);
        is("local9", Facility::LOG_MAIL);
    }
}
