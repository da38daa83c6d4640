//! `spooltap doctor`: what on this machine would keep us from noticing or replicating changes, each with the line that
//! cures it. Changes nothing, needs no replica and no daemon.

use super::setup::Setup;
use super::{Common, Exit, Failure, Outcome};
use crate::capture::{Roots, survey};
use crate::cyrus::db;
use serde::Serialize;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    found: String,
    /// The line to type, or to put into a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    cure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Fine,
    /// It works, but less well or not for long.
    Warning,
    /// It does not work.
    Bad,
}

fn fine(check: &'static str, found: impl Into<String>) -> Finding {
    Finding { check, state: State::Fine, found: found.into(), cure: None }
}

fn warning(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { check, state: State::Warning, found: found.into(), cure: Some(cure.into()) }
}

fn bad(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { state: State::Bad, ..warning(check, found, cure) }
}

pub(super) fn doctor(common: &Common) -> Outcome {
    let findings = match Setup::open(common, false) {
        Ok(setup) => look(&setup),
        Err(Failure { exit: Exit::Source, error }) => {
            let cure = "name the right file with -C, and run as the user that Cyrus runs as (User=cyrus in the unit)";
            vec![bad("source", format!("{error:#}"), cure)]
        }
        Err(failure) => return Err(failure),
    };
    let mut out = std::io::stdout().lock();
    for finding in &findings {
        if common.json {
            writeln!(out, "{}", serde_json::to_string(finding).unwrap_or_default())?;
            continue;
        }
        let mark = match finding.state {
            State::Fine => "fine   ",
            State::Warning => "WARNING",
            State::Bad => "BAD    ",
        };
        writeln!(out, "{mark} {}: {}", finding.check, finding.found)?;
        if let Some(cure) = &finding.cure {
            writeln!(out, "        cure: {cure}")?;
        }
    }
    Ok(if findings.iter().all(|finding| finding.state == State::Fine) { Exit::Ok } else { Exit::Differs })
}

fn look(setup: &Setup) -> Vec<Finding> {
    let settings = setup.capture_settings();
    let roots = Roots::from(setup.store.layout());
    let mut out = Vec::new();
    out.push(match crate::model::MailStore::listing(&*setup.store) {
        Ok(listing) => fine("source", format!("{} mailboxes are listed", listing.len())),
        Err(error) => bad("source", error.to_string(), "run as the user that Cyrus runs as (User=cyrus in the unit)"),
    });
    out.extend(databases(setup));
    let prospects = survey::survey(&roots, &settings);
    for prospect in &prospects {
        out.push(readable(&prospect.path));
        let found =
            format!("{} on {}: {} ({})", prospect.path.display(), prospect.fs, prospect.source, prospect.reason);
        let refused =
            prospect.refused.iter().map(|(name, why)| format!("not {name}: {why}")).collect::<Vec<_>>().join("; ");
        out.push(match prospect.refused.is_empty() {
            true => fine("capture", found),
            false => warning("capture", format!("{found}; {refused}"), cure_of(&refused)),
        });
    }
    let trees = prospects.iter().filter(|prospect| prospect.reach == crate::capture::Reach::Tree);
    let directories: u64 = trees.map(|prospect| count(&prospect.path)).sum();
    let spool = roots.spool.first().cloned().unwrap_or_else(|| roots.conf.clone());
    let fanotify = survey::fanotify_fits(&roots, &settings, &spool);
    out.push(watches(directories, fanotify.as_ref().err().map(String::as_str)));
    out.push(match &fanotify {
        Ok(why) => fine("privileges", format!("fanotify stands by: {why}")),
        Err(why) => fine("privileges", format!("no fanotify ({why}); it is needed only when watches run out")),
    });
    out.push(instances());
    out.push(queue());
    out.push(open_files());
    out.push(clock(setup));
    out.push(space("state", &setup.config.state));
    for replica in &setup.config.replicas {
        if let Some(dir) = replica.url.strip_prefix("file://") {
            out.push(space("archive", Path::new(dir)));
        }
    }
    out.push(state(setup));
    out
}

fn cure_of(refused: &str) -> String {
    match refused {
        why if why.contains("instance") => "sysctl -w fs.inotify.max_user_instances=1024".to_owned(),
        why if why.contains("other machines") => {
            "run spooltap on the machine that serves these files, or set poll_ms for how late a change may be seen"
                .to_owned()
        }
        _ => "see the reasons".to_owned(),
    }
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The tighter of the machine's limit and the one of this user namespace, with the name of its sysctl.
fn limit(machine: &'static str, namespace: &'static str) -> Option<(u64, &'static str)> {
    let read = |name: &'static str| number(&format!("/proc/sys/{}", name.replace('.', "/"))).map(|value| (value, name));
    [read(machine), read(namespace)].into_iter().flatten().min()
}

/// Directories below, the noise of staging areas included.
fn count(path: &Path) -> u64 {
    let entries = walkdir::WalkDir::new(path).follow_root_links(true).into_iter().flatten();
    entries.filter(|entry| entry.file_type().is_dir()).count() as u64
}

fn watches(directories: u64, no_fanotify: Option<&str>) -> Finding {
    let Some((limit, name)) = limit("fs.inotify.max_user_watches", "user.max_inotify_watches") else {
        return warning("watches", "the kernel has no inotify", "use a kernel with CONFIG_INOTIFY_USER=y");
    };
    // Mailboxes come, and other programs of this user watch things as well.
    let wanted = (directories * 2).max(65_536).next_power_of_two();
    let found = format!("{name} is {limit}, {directories} directories are to be watched");
    let cure = format!("sysctl -w {name}={wanted}");
    match (directories > limit, directories > limit / 4 * 3) {
        (true, _) if no_fanotify.is_none() => warning("watches", format!("{found}; fanotify takes over"), cure),
        (true, _) => bad("watches", format!("{found}; the rest is looked at again and again"), cure),
        (_, true) => warning("watches", found, cure),
        _ => fine("watches", found),
    }
}

fn instances() -> Finding {
    let Some((limit, name)) = limit("fs.inotify.max_user_instances", "user.max_inotify_instances") else {
        return warning("instances", "the kernel has no inotify", "use a kernel with CONFIG_INOTIFY_USER=y");
    };
    let cure = format!("sysctl -w {name}=1024");
    match inotify::Inotify::init() {
        Ok(_) => fine("instances", format!("{name} is {limit}, one is left")),
        Err(error) => bad("instances", format!("{name} is {limit}: {error}"), cure),
    }
}

fn queue() -> Finding {
    let name = "fs.inotify.max_queued_events";
    let Some((limit, _)) = limit(name, name) else {
        return warning("queue", "the kernel has no inotify", "use a kernel with CONFIG_INOTIFY_USER=y");
    };
    let found = format!("{name} is {limit}");
    match limit < 16_384 {
        true => warning(
            "queue",
            format!("{found}: every storm ends in a comparison of everything"),
            format!("sysctl -w {name}=131072"),
        ),
        false => fine("queue", found),
    }
}

fn open_files() -> Finding {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or_default();
    let soft = line.split_ascii_whitespace().next().unwrap_or("unknown");
    match soft.parse::<u64>() {
        Ok(limit) if limit < 1024 => {
            warning("open files", format!("the limit is {limit}"), "LimitNOFILE=65536 (in the unit)")
        }
        _ => fine("open files", format!("the limit is {soft}")),
    }
}

fn readable(path: &Path) -> Finding {
    use nix::unistd::{AccessFlags, access};
    if !path.exists() {
        return fine("rights", format!("{} does not exist yet, it is waited for", path.display()));
    }
    match access(path, AccessFlags::R_OK | AccessFlags::X_OK) {
        Ok(()) => fine("rights", format!("{} can be read", path.display())),
        Err(errno) => bad(
            "rights",
            format!("{}: {errno}", path.display()),
            "User=cyrus (in the unit), or the group of these files",
        ),
    }
}

fn databases(setup: &Setup) -> Vec<Finding> {
    let layout = setup.store.layout();
    let mut paths: Vec<PathBuf> = vec![layout.mailboxes_db.clone(), layout.annotations_db.clone()];
    paths.extend(layout.quotas_db.clone());
    let kind = |path: &PathBuf| {
        let mut head = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head));
        match read {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                fine("databases", format!("{} does not exist", path.display()))
            }
            Err(error) => bad("databases", format!("{}: {error}", path.display()), "User=cyrus (in the unit)"),
            Ok(_) => match db::sniff(&head) {
                kind if kind.is_readable() => fine("databases", format!("{} is {kind:?}", path.display())),
                kind => bad(
                    "databases",
                    format!("{} is {kind:?}, which cannot be followed", path.display()),
                    format!(
                        "cvt_cyrusdb {0} OLD {0}.new twoskip, with Cyrus stopped, and set its _db option to twoskip",
                        path.display()
                    ),
                ),
            },
        }
    };
    paths.iter().map(kind).collect()
}

/// Files from the future make time stamps useless for telling what changed; a file server with another clock makes them.
fn clock(setup: &Setup) -> Finding {
    let newest = [&setup.store.layout().mailboxes_db, &setup.store.layout().configdirectory]
        .into_iter()
        .filter_map(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok())
        .max();
    let now = SystemTime::now();
    let ahead = newest.and_then(|newest| newest.duration_since(now).ok()).map(|ahead| ahead.as_secs()).unwrap_or(0);
    match ahead > 2 {
        true => warning(
            "clock",
            format!("files of the store are {ahead} s in the future"),
            "timedatectl set-ntp true, here and on the file server",
        ),
        false => fine("clock", "no file of the store is in the future"),
    }
}

fn space(what: &'static str, path: &Path) -> Finding {
    let standing = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    let free = match nix::sys::statvfs::statvfs(standing) {
        Ok(stat) => stat.blocks_available().saturating_mul(stat.fragment_size()),
        Err(errno) => {
            return bad(
                "space",
                format!("{what}: {}: {errno}", path.display()),
                format!("mkdir -p {}", path.display()),
            );
        }
    };
    let found = format!("{what}: {} MiB are free at {}", free / (1 << 20), path.display());
    let cure = format!("free space on the file system of {}, or name another directory", path.display());
    match free {
        0..0x0400_0000 => bad("space", found, cure),
        0x0400_0000..0x4000_0000 => warning("space", found, cure),
        _ => fine("space", found),
    }
}

fn state(setup: &Setup) -> Finding {
    use nix::unistd::{AccessFlags, access};
    let path = &setup.config.state;
    let standing = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    match access(standing, AccessFlags::W_OK) {
        Ok(()) => fine("state", format!("{} can be written", path.display())),
        Err(errno) => bad(
            "state",
            format!("{}: {errno}", path.display()),
            "StateDirectory=spooltap (in the unit), or --state DIR",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_watches_are_bad_unless_somebody_takes_over() {
        let Some((limit, name)) = limit("fs.inotify.max_user_watches", "user.max_inotify_watches") else { return };
        let state = |directories, no_fanotify| watches(directories, no_fanotify).state;
        assert_eq!(state(1, Some("no")), State::Fine);
        assert_eq!(state(limit, Some("no")), State::Warning);
        assert_eq!(state(limit + 1, None), State::Warning);
        assert_eq!(state(limit + 1, Some("no")), State::Bad);
        let cure = watches(limit + 1, Some("no")).cure.expect("has one");
        let value: u64 = cure.strip_prefix(&format!("sysctl -w {name}=")).expect("a line").parse().expect("a number");
        assert!(value > limit);
    }
}
