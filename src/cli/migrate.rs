//! `spooltap migrate`: the road from an old server to a new one, station by station. Each may be repeated.

use super::setup::Setup;
use super::verify::VerifyArgs;
use super::{Common, Exit, Failure, Outcome, failover, push};
use crate::cyrus::index;
use crate::model::{Capabilities, MailStore};
use crate::spool::layout::MetaFile;
use clap::Subcommand;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};

#[derive(Debug, Subcommand)]
pub(super) enum MigrateCommand {
    /// What will be moved, what the replicas lack, what nobody carries; exit code 1 when something stands in the way
    Preflight,
    /// Brings everything over once, while the old server goes on; a second time it goes on where it ended
    Seed,
    /// With `spooltap run` at work and the old server closed to its users: waits until all is over there, and compares
    CutOver {
        /// Wait no longer than this
        #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
        timeout: u64,
        /// Have the replica give every message back, and hash it
        #[arg(long)]
        fetch: bool,
    },
}

pub(super) fn migrate(common: &Common, command: &MigrateCommand) -> Outcome {
    match command {
        MigrateCommand::Preflight => preflight(common),
        MigrateCommand::Seed => push::push(common, &push::PushArgs::everything()),
        MigrateCommand::CutOver { timeout, fetch } => cut_over(common, *timeout, *fetch),
    }
}

#[derive(Debug, Default, Serialize)]
struct Preflight {
    mailboxes: usize,
    /// Mailboxes by what wrote their index last.
    releases: BTreeMap<&'static str, usize>,
    message_bytes: u64,
    /// Of messages whose GUIDs have to be made from the files, once.
    hashed_bytes: u64,
    users: usize,
    quota_roots: usize,
    /// A replica that has none of that name needs a line in `[partition]`.
    partitions: BTreeSet<String>,
    /// What csync has no word for.
    not_carried: Vec<(String, String)>,
    replicas: Vec<Reached>,
    /// What stands in the way.
    faults: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Reached {
    replica: String,
    /// What it cannot hold at all; the mailboxes that have it are named by `push`.
    lacks: Vec<&'static str>,
}

/// Releases by cyrus.index minor version.
fn release(minor_version: u32) -> &'static str {
    match minor_version {
        ..=10 => "2.3 or older",
        11 | 12 => "2.4",
        13 => "2.5",
        _ => "3.0 or newer",
    }
}

fn lacks(caps: &Capabilities) -> Vec<&'static str> {
    let able = [
        (caps.message_annotations, "annotations of messages"),
        (caps.keeps_savedate, "dates of saving"),
        (caps.quota_resources, "limits of other things than storage"),
        (caps.server_annotations, "annotations of the server"),
    ];
    able.iter().filter(|(able, _)| !able).map(|(_, what)| *what).collect()
}

fn preflight(common: &Common) -> Outcome {
    let source = |error| Failure::new(Exit::Source, error);
    let setup = Setup::open(common, true)?;
    let listing = setup.store.listing().map_err(source)?;
    let mut found = Preflight { mailboxes: listing.len(), ..Preflight::default() };
    found.faults.extend(listing.unreadable.iter().map(|left_out| format!("mailbox {left_out}")));
    for entry in listing.entries() {
        found.partitions.insert(entry.partition.to_string());
        if entry.mbtype.is_intermediate() {
            continue;
        }
        let mut head = Vec::new();
        let file = setup
            .store
            .layout()
            .meta_files(entry, MetaFile::Index)
            .into_iter()
            .find_map(|path| std::fs::File::open(path).ok());
        let read = file.map(|file| file.take(index::MAX_HEADER_BYTES as u64).read_to_end(&mut head));
        match (read, index::parse_header(&head)) {
            (Some(Ok(_)), Ok(header)) => {
                *found.releases.entry(release(header.minor_version)).or_default() += 1;
                found.message_bytes += header.quota_mailbox_used;
                if header.minor_version <= 10 {
                    found.hashed_bytes += header.quota_mailbox_used;
                }
            }
            (Some(Ok(_)), Err(error)) => found.faults.push(format!("{}: cyrus.index: {error}", entry.name)),
            _ => found.faults.push(format!("{}: cyrus.index cannot be read", entry.name)),
        }
    }
    found.users = setup.store.users().map_err(source)?.len();
    found.quota_roots = setup.store.quotas().map_err(source)?.len();
    found.not_carried = setup.store.not_carried().map_err(source)?;
    for target in setup.replica_targets()? {
        match target.open() {
            Ok(session) => {
                session.close();
                found.replicas.push(Reached { replica: target.name(), lacks: lacks(&target.capabilities()) });
            }
            Err(error) => found.faults.push(format!("{}: {error}", target.name())),
        }
    }
    let mut out = std::io::stdout().lock();
    if common.json {
        writeln!(out, "{}", serde_json::to_string(&found).unwrap_or_default())?;
    } else {
        shown(&found, &mut out)?;
    }
    Ok(if found.faults.is_empty() { Exit::Ok } else { Exit::Differs })
}

fn shown(found: &Preflight, out: &mut impl Write) -> std::io::Result<()> {
    let mib = |bytes: u64| bytes >> 20;
    writeln!(
        out,
        "source     {} mailboxes of {} users, {} MiB",
        found.mailboxes,
        found.users,
        mib(found.message_bytes)
    )?;
    for (release, count) in &found.releases {
        writeln!(out, "  written by {release}: {count} mailboxes")?;
    }
    if found.hashed_bytes > 0 {
        writeln!(out, "  {} MiB are read once for their GUIDs, which no file tells", mib(found.hashed_bytes))?;
    }
    writeln!(
        out,
        "  {} quota roots; partitions: {}",
        found.quota_roots,
        Vec::from_iter(found.partitions.iter().cloned()).join(", ")
    )?;
    for (object, what) in &found.not_carried {
        writeln!(out, "by hand    {object}: {what}")?;
    }
    for reached in &found.replicas {
        writeln!(out, "replica    {}: lets us in as an admin", reached.replica)?;
        for what in &reached.lacks {
            writeln!(out, "  cannot hold {what}")?;
        }
    }
    for fault in &found.faults {
        writeln!(out, "FAULT      {fault}")?;
    }
    match found.faults.is_empty() {
        true => writeln!(out, "next       spooltap doctor, then spooltap migrate seed"),
        false => writeln!(out, "next       mend what stands above as FAULT, and ask again"),
    }
}

fn cut_over(common: &Common, timeout: u64, fetch: bool) -> Outcome {
    let drained = failover::drain(common, &failover::DrainArgs::waiting(timeout))?;
    if drained != Exit::Ok {
        return Ok(drained);
    }
    let exit = failover::check_to(common, Some(&VerifyArgs::in_depth(fetch)))?;
    if exit == Exit::Ok && !common.json {
        let mut out = std::io::stdout().lock();
        writeln!(out, "next       stop spooltap, let the new server's users in, and leave the old store as it is")?;
        writeln!(
            out,
            "way back   until somebody has changed anything on the new server: open the old one again. Later:"
        )?;
        writeln!(
            out,
            "           what came since is on the new one only; nothing carries it back to an older release"
        )?;
    }
    Ok(exit)
}
