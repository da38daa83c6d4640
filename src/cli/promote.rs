//! `spooltap promote`: a replica takes over. What had not reached it is listed, it is looked at once more, and from then on
//! nothing is pushed over it.

#[path = "promote/lines.rs"]
mod lines;

use super::failover;
use super::setup::{Setup, config_alone, replica_failure, state_dir};
use super::{Common, Exit, Failure, Outcome};
use crate::config::Config;
use crate::cyrus::names;
use crate::cyrus::quota::parse_usage;
use crate::daemon::control::{self, ControlError, Request};
use crate::daemon::report::Status;
use crate::engine::{self, Lane, Mismatch, Side, Whole, fence, whole};
use crate::model::{MailStore, MboxName, Promotion, Replica, ReplicaTarget};
use crate::spool::{LiveSpool, open_store, read_conf};
use crate::state::Promotions;
use clap::Args;
use lines::Lines;
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Args)]
pub(super) struct PromoteArgs {
    /// Look and list; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Promote although something speaks against it: the source is dead, something has not arrived. It is written down
    #[arg(long)]
    force: bool,
    /// Write what is missing in the promoted store's imapd.conf, and a cyrus.conf where there is none (cyrus:/// only)
    #[arg(long)]
    write_conf: bool,
    /// Hash every message of the promoted store in the last check (cyrus:/// only)
    #[arg(long)]
    bodies: bool,
}

/// The source that is taken over from.
struct Old {
    config: Config,
    store: Option<Setup>,
    /// Why it cannot be read.
    dead: Option<String>,
}

impl Old {
    fn open(common: &Common) -> Result<Self, Failure> {
        let why = match Setup::open(common, true) {
            Ok(setup) => match setup.store.listing().and_then(|_| setup.store.identity()) {
                Ok(_) => return Ok(Self { config: setup.config.clone(), store: Some(setup), dead: None }),
                Err(error) => error.to_string(),
            },
            Err(failure) if failure.exit == Exit::Source => format!("{:#}", failure.error),
            Err(failure) => return Err(failure),
        };
        Ok(Self { config: config_alone(common)?, store: None, dead: Some(why) })
    }

    fn identity(&self) -> String {
        let known = self.store.as_ref().and_then(|setup| setup.store.identity().ok());
        known.unwrap_or_else(|| format!("imapd.conf {}", self.config.imapd_conf.display()))
    }
}

/// All that is told.
#[derive(Debug, Default, Serialize)]
struct Report {
    replica: String,
    promoted: bool,
    /// What source and replica do not have alike; all of it, where the source can be read.
    differences: Vec<Mismatch>,
    /// What is known where it cannot.
    known: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Whole>,
    /// Lines that are missing in the promoted store's imapd.conf, and whether they were written.
    missing_lines: Vec<String>,
    written: bool,
    /// What speaks against it.
    against: Vec<String>,
    next: Vec<String>,
}

pub(super) fn promote(common: &Common, args: &PromoteArgs) -> Outcome {
    nobody_runs(&state_dir(common)?)?;
    let old = Old::open(common)?;
    let [replica] = old.config.replicas.as_slice() else {
        return Err(Failure::new(Exit::Usage, anyhow::anyhow!("name the replica that is to take over: --replica URL")));
    };
    let mut book = Promotions::open(&old.config.state).map_err(|error| Failure::new(Exit::State, error))?;
    let target =
        crate::replica::open(replica, old.store.as_ref().is_some_and(|setup| setup.store.sieve_in_mailboxes()))
            .map_err(replica_failure)?;
    let name = target.name();
    let dir = replica.url.strip_prefix("cyrus://").map(PathBuf::from);
    if dir.is_none() && !replica.url.contains("csync") && !replica.url.starts_with("imap") {
        let cure = "an archive serves nobody: push it into a Cyrus, with `spooltap push --from URL -A`";
        return Err(Failure::new(Exit::Usage, anyhow::anyhow!("{name}: {cure}")));
    }
    if book.is_done(&replica.url) {
        return told(common, &Report { replica: name, promoted: true, ..Report::default() });
    }
    // Held to the end: of a directory nobody else can become the writer meanwhile.
    let mut session = target.open().map_err(replica_failure)?;
    let mut report = Report { replica: name, ..Report::default() };
    let list = dir.as_ref().and_then(|dir| open_store(&dir.join("imapd.conf")).ok()?.listing().ok());
    let names: Vec<MboxName> = list.iter().flat_map(|list| list.entries().map(|entry| entry.name.clone())).collect();
    missing(&old, &names, &*target, &mut *session, &mut report)?;
    let lines = match &dir {
        Some(dir) => Some(last_check(dir, &old, args, &mut report)?),
        None => {
            report.next = lines::at_a_server();
            None
        }
    };
    if args.dry_run || !report.against.is_empty() && !args.force {
        session.close();
        told(common, &report)?;
        return Ok(if report.against.is_empty() { Exit::Ok } else { Exit::Differs });
    }
    let promotion = book.of(&replica.url).cloned().unwrap_or_else(|| Promotion {
        replica: replica.url.clone(),
        source: old.identity(),
        host: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
        at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        overruled: report.against.clone(),
    });
    let io = |error: std::io::Error| Failure::new(Exit::State, error);
    // Ours first: should we die before the replica has its fence, this source pushes nothing over it all the same.
    book.begin(&promotion).map_err(io)?;
    if let Some(lines) = lines.filter(|_| args.write_conf) {
        lines.write().map_err(io)?;
        report.written = true;
    }
    fence::raise(&mut *session, &promotion).map_err(replica_failure)?;
    session.close();
    book.done(&promotion).map_err(io)?;
    report.promoted = true;
    told(common, &report)
}

/// A daemon would go on with what it has.
pub(super) fn nobody_runs(state: &Path) -> Result<(), Failure> {
    match control::ask(state, &Request::Status) {
        Err(ControlError::NotRunning { .. }) => Ok(()),
        _ => Err(Failure::new(
            Exit::State,
            anyhow::anyhow!("a spooltap daemon runs with {}; stop it first", state.display()),
        )),
    }
}

/// What had not reached the replica.
fn missing(
    old: &Old,
    names_there: &[MboxName],
    target: &dyn ReplicaTarget,
    session: &mut dyn Replica,
    report: &mut Report,
) -> Result<(), Failure> {
    let Some(setup) = &old.store else {
        let dead = old.dead.clone().unwrap_or_default();
        report.against.push(format!("the source cannot be read: {dead}"));
        report.known = known(&old.config.state);
        return Ok(());
    };
    let source = |error| Failure::new(Exit::Source, error);
    let _held = setup.state()?;
    let mut lanes = engine::lanes(&*setup.store).map_err(source)?;
    let prefix = setup.store.deleted_prefix();
    lanes.extend(names_there.iter().map(|name| Lane::of(name, prefix)));
    let found = engine::sides(&*setup.store, session, &target.capabilities(), &lanes, names_there);
    let found = found.map_err(|error| match error {
        engine::VerifyError::Store(error) => source(error),
        engine::VerifyError::Replica(error) => replica_failure(error),
    })?;
    let count = |side: Side| found.mismatches.iter().filter(|one| one.side == side).count();
    let (here, there, both) = (count(Side::Here), count(Side::There), count(Side::Both));
    if here + there + both > 0 {
        let text = format!("{here} only at the source, {there} only on the replica, {both} differ");
        report.against.push(text);
    }
    report.known.extend(found.unreadable);
    if !report.known.is_empty() {
        report.against.push(format!("{} objects of the source cannot be read", report.known.len()));
    }
    report.differences = found.mismatches;
    Ok(())
}

/// What the last daemon has written down before it died.
fn known(state: &Path) -> Vec<String> {
    let path = state.join("status.json");
    let status = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Status>(&text).ok());
    let Some(status) = status else { return vec![format!("{}: nothing is known", path.display())] };
    let mut out = vec![format!("as of {} (seconds since 1970), the last that the daemon wrote down:", status.at)];
    out.extend(failover::reasons(&status));
    if out.len() == 1 {
        out.push("everything it knew of was confirmed".into());
    }
    out
}

/// A directory that a Cyrus is going to start on: whole, and with a configuration.
fn last_check(dir: &Path, old: &Old, args: &PromoteArgs, report: &mut Report) -> Result<Lines, Failure> {
    let conf = dir.join("imapd.conf");
    let store = open_store(&conf).map_err(|error| Failure::new(Exit::Refused, error))?;
    let mut found = whole(&store, args.bodies, &mut |_, _| {}).map_err(|error| Failure::new(Exit::Refused, error))?;
    quotas(&store, &mut found);
    if !found.faults.is_empty() {
        report.against.push(format!("{} faults in {}", found.faults.len(), dir.display()));
    }
    report.check = Some(found);
    let theirs = read_conf(&old.config.imapd_conf).ok();
    let lines = Lines::missing(dir, store.conf(), theirs.as_ref());
    report.missing_lines = lines.shown();
    report.next = lines::in_a_directory(dir);
    Ok(lines)
}

/// What stands in the quota files against what the mailboxes have.
fn quotas(store: &LiveSpool, found: &mut Whole) {
    let Ok(roots) = store.quotas() else { return };
    for root in roots.into_keys() {
        let path = names::quota_file(&store.layout().configdirectory, &root, store.layout().hashing);
        let (bytes, messages) = found.used.get(&root).copied().unwrap_or_default();
        match std::fs::read(&path).map_err(|error| error.to_string()).map(|text| parse_usage(&text)) {
            Ok(Ok(usage)) if (usage.storage, usage.messages) == (bytes, messages) => {}
            Ok(Ok(usage)) => found.faults.push((
                format!("quota root {root}"),
                format!(
                    "{} bytes, {} messages are written down, its mailboxes have {bytes} and {messages}; cure: quota -f",
                    usage.storage, usage.messages
                ),
            )),
            Ok(Err(error)) => found.faults.push((format!("quota root {root}"), error.to_string())),
            Err(error) => found.faults.push((format!("quota root {root}"), error)),
        }
    }
}

fn told(common: &Common, report: &Report) -> Outcome {
    let mut out = std::io::stdout().lock();
    if common.json {
        writeln!(out, "{}", serde_json::to_string(report).unwrap_or_default())?;
        return Ok(Exit::Ok);
    }
    for difference in &report.differences {
        let side = match difference.side {
            Side::Here => "only at the source",
            Side::There => "only on the replica",
            Side::Both => "differs",
        };
        writeln!(out, "{side} {}: {}", difference.object, difference.what)?;
    }
    for known in &report.known {
        writeln!(out, "{known}")?;
    }
    if let Some(check) = &report.check {
        for (object, fault) in &check.faults {
            writeln!(out, "FAULT {object}: {fault}")?;
        }
        let end = if check.faults.is_empty() { "whole".to_owned() } else { format!("{} faults", check.faults.len()) };
        writeln!(
            out,
            "last check: {} mailboxes, {} messages, {} users, {} quota roots: {end}",
            check.mailboxes, check.messages, check.users, check.quotas
        )?;
    }
    for missing in &report.missing_lines {
        writeln!(out, "{} {missing}", if report.written { "written" } else { "missing" })?;
    }
    if report.promoted {
        writeln!(out, "promoted: {}; nothing is pushed over it any more", report.replica)?;
    } else if report.against.is_empty() {
        writeln!(out, "GO {}", report.replica)?;
    } else {
        writeln!(out, "NO-GO {}; --force promotes it all the same", report.replica)?;
    }
    report.against.iter().try_for_each(|reason| writeln!(out, "  {reason}"))?;
    if report.promoted {
        report.next.iter().try_for_each(|next| writeln!(out, "next {next}"))?;
    }
    Ok(Exit::Ok)
}
