//! `spooltap failback`: roles swapped. A promoted store is the source now; the old source is brought in line with it, after
//! what both sides have was listed and seen. Nothing that only one side has is deleted.

#[path = "failback/begun.rs"]
mod begun;

use super::promote::nobody_runs;
use super::setup::{Setup, config_of, replica_failure, state_dir};
use super::{Common, Exit, Failure, Outcome};
use crate::engine::{
    self, Addition, Engine, Lane, Mismatch, Options, Side, Sides, Surplus, VerifyError, fence, merge, sides,
};
use crate::model::{MailStore, MboxName, Promotion, Replica, ReplicaError, ReplicaTarget, Step, Uid};
use crate::spool::open_store;
use crate::state::{Promotions, State};
use begun::Begun;
use clap::Args;
use serde_json::json;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{info, warn};

#[derive(Debug, Args)]
pub(super) struct FailbackArgs {
    /// Do what the listing shows; without --yes or --plan it is only shown
    #[arg(long)]
    yes: bool,
    /// The same, if what is on the other side is still what the listing of this plan has shown
    #[arg(long, value_name = "PLAN", conflicts_with = "yes")]
    plan: Option<String>,
    /// Bring both sides' messages together, under new UIDs; flags that were changed later win
    #[arg(long)]
    merge: bool,
    /// With --merge: the promoted store's own sync_server, by which it gets what only the old source has
    #[arg(long, value_name = "URL", requires = "merge")]
    source_sync: Option<String>,
    /// imapd.conf of the old source, where its disk can be read: mailboxes that only it has are listed as well
    #[arg(long, value_name = "FILE")]
    old_conf: Option<PathBuf>,
    /// End it: the source has all that the promoted replica has, and may push to it again
    #[arg(long, conflicts_with_all = ["yes", "plan", "merge"])]
    release: bool,
    /// Although the source was never promoted; with --release although the replica has what the source has not
    #[arg(long)]
    force: bool,
}

/// Rounds of bringing in line and comparing: somebody may work on the source meanwhile.
const ROUNDS: usize = 3;

pub(super) fn failback(common: &Common, args: &FailbackArgs) -> Outcome {
    nobody_runs(&state_dir(common)?)?;
    let setup = Setup::open(common, true)?;
    let [_] = setup.config.replicas.as_slice() else {
        let why = "name the old source, as a replica: --replica URL";
        return Err(Failure::new(Exit::Usage, anyhow::anyhow!(why)));
    };
    let state = setup.state()?;
    let [target] = <[_; 1]>::try_from(setup.replica_targets()?).map_err(|_| anyhow::anyhow!("one replica"))?;
    let work = Work { common, args, setup: &setup, state: &state, target };
    if args.release { work.release() } else { work.failback() }
}

struct Work<'a> {
    common: &'a Common,
    args: &'a FailbackArgs,
    setup: &'a Setup,
    state: &'a State,
    target: Arc<dyn ReplicaTarget>,
}

fn compared(error: VerifyError) -> Failure {
    match error {
        VerifyError::Store(error) => Failure::new(Exit::Source, error),
        VerifyError::Replica(error) => replica_failure(error),
    }
}

impl Work<'_> {
    fn url(&self) -> &str {
        self.setup.config.replicas.first().map_or("", |replica| &replica.url)
    }

    fn store(&self) -> &dyn MailStore {
        &*self.setup.store
    }

    /// Mailboxes of the other side, where its list can be read.
    fn names_there(&self) -> Vec<MboxName> {
        let dir = self.url().strip_prefix("cyrus://").map(|dir| Path::new(dir).join("imapd.conf"));
        let Some(conf) = self.args.old_conf.clone().or(dir) else { return Vec::new() };
        match open_store(&conf).and_then(|store| store.listing()) {
            Ok(listing) => listing.entries().map(|entry| entry.name.clone()).collect(),
            Err(error) => {
                warn!(conf = %conf.display(), %error, "the list of the other side cannot be read");
                Vec::new()
            }
        }
    }

    fn compare(&self, session: &mut dyn Replica) -> Result<Sides, Failure> {
        let source = |error| Failure::new(Exit::Source, error);
        let names = self.names_there();
        let mut lanes = engine::lanes(self.store()).map_err(source)?;
        lanes.extend(names.iter().map(|name| Lane::of(name, self.store().deleted_prefix())));
        sides(self.store(), session, &self.target.capabilities(), &lanes, &names).map_err(compared)
    }

    fn failback(&self) -> Outcome {
        let notes = self.store().server_annotations().map_err(|error| Failure::new(Exit::Source, error))?;
        if Promotion::among(&notes).is_none() && !self.args.force {
            let why = "this store was never promoted: -C names the imapd.conf of the store that took over, --replica the old \
                       source; --force where that is right all the same";
            return Err(Failure::new(Exit::Usage, anyhow::anyhow!(why)));
        }
        let mut session = fence::open(&*self.target).map_err(replica_failure)?;
        let found = self.compare(&mut *session)?;
        let plan = plan_of(&found.mismatches);
        let before = Begun::read(&self.setup.config.state)?.filter(|begun| begun.replica == self.url());
        let seen = |hash: &str| self.args.yes || self.args.plan.as_deref() == Some(hash);
        let agreed = seen(&plan) || before.as_ref().is_some_and(|begun| seen(&begun.plan));
        if !agreed {
            session.close();
            self.list(&found.mismatches, Some(&plan))?;
            return Ok(if found.mismatches.is_empty() { Exit::Ok } else { Exit::Differs });
        }
        // What is written down at first counts to the end: later the other side does not show it any more.
        let begun = match before {
            Some(begun) => begun,
            None => {
                self.list(&found.mismatches, None)?;
                Begun::new(self.url(), &plan, &found)
            }
        };
        begun.write(&self.setup.config.state)?;
        if let Some(url) = &self.args.source_sync {
            self.bring_source(url, &found, &mut *session)?;
        }
        let mut left = Vec::new();
        let mut failed = Vec::new();
        for _ in 0..ROUNDS {
            failed = self.push()?;
            self.give_back(&begun, &mut *session)?;
            let now = self.compare(&mut *session)?.mismatches;
            left = now;
            if failed.is_empty() && !left.iter().any(|one| self.is_open(one)) {
                break;
            }
        }
        session.close();
        self.state.flush();
        let done = failed.is_empty() && !left.iter().any(|one| self.is_open(one));
        self.tell(&left, &failed, done)?;
        if done {
            Begun::remove(&self.setup.config.state)?;
        }
        Ok(if done { Exit::Ok } else { Exit::Differs })
    }

    /// Still to be brought over. What was merged on the other side alone stays different.
    fn is_open(&self, one: &Mismatch) -> bool {
        let merged_there = self.args.merge && self.args.source_sync.is_none();
        one.side == Side::Here || one.side == Side::Both && !merged_there
    }

    /// What only the other side has goes into the source, by the source's own server.
    fn bring_source(&self, url: &str, found: &Sides, from: &mut dyn Replica) -> Result<(), Failure> {
        let config = config_of(self.common, url)?;
        let target = crate::replica::open(&config, self.store().sieve_in_mailboxes()).map_err(replica_failure)?;
        let mut to = target.open().map_err(replica_failure)?;
        let caps = target.capabilities();
        let listing = self.store().listing().map_err(|error| Failure::new(Exit::Source, error))?;
        let prefix = self.store().deleted_prefix();
        // Parents before what is below them.
        let mut all: Vec<&Surplus> = found.surplus.iter().collect();
        all.sort_by_key(|surplus| &surplus.name);
        for surplus in all {
            let aside = merge::put_aside_from(&surplus.name);
            let name = if surplus.shared { &surplus.name } else { aside.as_ref().unwrap_or(&surplus.name) };
            let here = listing.by_name(name).filter(|entry| !entry.mbtype.is_intermediate());
            let is_gone = listing.is_tombstone(&surplus.uniqueid) || name.without_deleted(prefix).is_some();
            let result = match here {
                Some(entry) => {
                    let addition = self.addition(surplus, name, &entry.uniqueid, surplus.view.head.last_uid);
                    merge::add(&mut *to, &caps, &addition, from).map(|(messages, _)| messages)
                }
                None if is_gone || surplus.view.head.mbtype.is_sieve() => continue,
                None => merge::create(&mut *to, &caps, &surplus.view, &surplus.only_there, from),
            };
            let count = result.map_err(replica_failure)?;
            info!(mailbox = %name, count, "messages of the old source are in the source");
        }
        let none = engine::NoBodies;
        for (user, name) in &found.subscriptions {
            to.apply(&Step::Subscribe { user: user.clone(), name: name.clone() }, &none).map_err(replica_failure)?;
        }
        for (user, name, content) in &found.scripts {
            let (user, name, content) = (user.clone(), name.clone(), content.clone());
            let step = Step::SievePut { user, name, last_update: 0, content, compiled: Vec::new() };
            to.apply(&step, &none).map_err(replica_failure)?;
        }
        to.close();
        Ok(())
    }

    fn addition<'a>(
        &self,
        surplus: &'a Surplus,
        name: &'a MboxName,
        uniqueid: &'a crate::model::UniqueId,
        above: Uid,
    ) -> Addition<'a> {
        Addition {
            name,
            uniqueid,
            user_flags: &surplus.view.user_flags,
            messages: &surplus.only_there,
            flags: &surplus.newer,
            above,
            from: &surplus.view.head,
        }
    }

    /// Brings the old source in line; what failed.
    fn push(&self) -> Result<Vec<String>, Failure> {
        let config = &self.setup.config;
        let options = Options {
            lanes: config.lanes,
            stop_on_fatal: true,
            // Nothing is taken away that the fuses would have to guard.
            keep: true,
            allow_removals: true,
            allow_loss: config.allow_loss,
            ..Options::default()
        };
        let targets = vec![(self.target.clone(), self.state.replica(self.url()))];
        let engine = Engine::start(self.setup.store.clone(), targets, &options, Arc::new(super::log::log_event));
        let lanes = engine::lanes(self.store()).map_err(|error| Failure::new(Exit::Source, error))?;
        engine.compare(&lanes.into_iter().collect::<Vec<_>>());
        let started = Instant::now();
        let unusable = loop {
            if engine.settle(4, Some(Duration::from_millis(200))) {
                break None;
            }
            let fatal = engine.stats().into_iter().find_map(|stats| stats.fatal.filter(|_| stats.sessions == 0));
            if fatal.is_some() && started.elapsed() > Duration::from_secs(4) {
                break fatal;
            }
        };
        let stats = engine.stats();
        engine.stop(config.shutdown_timeout);
        if let Some(reason) = unusable {
            return Err(Failure::new(Exit::Replica, anyhow::anyhow!(reason)));
        }
        let failed = stats.into_iter().flat_map(|stats| stats.queue.failed);
        Ok(failed.map(|one| format!("{}: {}", one.mailbox.unwrap_or(one.item), one.reason)).collect())
    }

    /// What the old source alone had, and what was in the way of bringing it in line.
    fn give_back(&self, begun: &Begun, session: &mut dyn Replica) -> Result<(), Failure> {
        let mut give = |step: Step| match session.apply(&step, &engine::NoBodies) {
            // He has no INBOX there any more, and so nothing of his own.
            Err(ReplicaError::NoSuchMailbox(why)) => {
                warn!(step = super::log::describe(&step), why, "cannot be given back");
                Ok(())
            }
            other => other.map_err(replica_failure),
        };
        for (user, name) in &begun.subscriptions {
            give(Step::Subscribe { user: user.clone(), name: name.clone() })?;
        }
        for (user, name, content) in &begun.scripts {
            let (user, name, content) = (user.clone(), name.clone(), content.clone());
            give(Step::SievePut { user, name, last_update: 0, content, compiled: Vec::new() })?;
        }
        if !self.args.merge || self.args.source_sync.is_some() {
            return Ok(());
        }
        let caps = self.target.capabilities();
        let mut second = self.target.open().map_err(replica_failure)?;
        let above = |name: &MboxName| {
            let surplus = begun.surplus.iter().find(|surplus| surplus.name == *name);
            surplus.map_or(Uid(0), |surplus| surplus.view.head.last_uid)
        };
        for aside in self.put_aside(begun, session)? {
            let name = merge::put_aside_from(&aside).unwrap_or_default();
            let count =
                merge::take_back(session, &mut *second, &caps, &aside, above(&name)).map_err(replica_failure)?;
            info!(mailbox = %name, count, "messages are back in their mailbox");
        }
        for surplus in begun.surplus.iter().filter(|surplus| surplus.shared && !surplus.newer.is_empty()) {
            let addition =
                Addition { messages: &[], ..self.addition(surplus, &surplus.name, &surplus.uniqueid, Uid(0)) };
            match merge::add(session, &caps, &addition, &mut *second) {
                // Renamed or deleted on the source since.
                Err(ReplicaError::NoSuchMailbox(_) | ReplicaError::Moved(_)) | Ok(_) => {}
                Err(error) => return Err(replica_failure(error)),
            }
        }
        second.close();
        Ok(())
    }

    /// Mailboxes of the other side that hold what was put aside there.
    fn put_aside(&self, begun: &Begun, session: &mut dyn Replica) -> Result<BTreeSet<MboxName>, Failure> {
        let mut all: BTreeSet<MboxName> = self.names_there().into_iter().collect();
        let users = self.store().users().map_err(|error| Failure::new(Exit::Source, error))?;
        for user in users {
            let view = session.view_user(&user).map_err(replica_failure)?;
            all.extend(view.mailboxes.into_iter().map(|view| view.head.name));
        }
        all.extend(begun.surplus.iter().map(|surplus| {
            let guids: Vec<_> = surplus.only_there.iter().map(|record| record.guid).collect();
            engine::aside_for(&surplus.name, &surplus.uniqueid, &guids)
        }));
        all.retain(|name| merge::put_aside_from(name).is_some());
        Ok(all)
    }

    fn list(&self, all: &[Mismatch], plan: Option<&str>) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        if self.common.json {
            writeln!(out, "{}", json!({ "replica": self.target.name(), "plan": plan, "differences": all }))?;
            return Ok(());
        }
        all.iter().try_for_each(|one| writeln!(out, "{one}"))?;
        let count = |side: Side| all.iter().filter(|one| one.side == side).count();
        let (here, there, both) = (count(Side::Here), count(Side::There), count(Side::Both));
        writeln!(out, "{here} only here, {there} only there, {both} differ")?;
        if let Some(plan) = plan.filter(|_| !all.is_empty()) {
            writeln!(
                out,
                "nothing was changed; do it with --plan {plan} (or --yes), with --merge to bring both together"
            )?;
        }
        Ok(())
    }

    fn tell(&self, left: &[Mismatch], failed: &[String], done: bool) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let name = self.target.name();
        if self.common.json {
            writeln!(out, "{}", json!({ "replica": name, "in_line": done, "left": left, "failed": failed }))?;
            return Ok(());
        }
        for one in left {
            let word = if one.side == Side::There { "kept      " } else { "left      " };
            writeln!(out, "{word} {}: {}", one.object, one.what)?;
        }
        failed.iter().try_for_each(|reason| writeln!(out, "FAILED {reason}"))?;
        match done {
            true => writeln!(out, "in line: {name} has all that the source has")?,
            false => {
                writeln!(out, "not in line yet: say it again; what comes in meanwhile is brought by `spooltap run`")?
            }
        }
        Ok(())
    }

    /// The roles are as they were: what was promoted is a replica again.
    fn release(&self) -> Outcome {
        let mut book = Promotions::open(&self.setup.config.state).map_err(|error| Failure::new(Exit::State, error))?;
        let mut session = self.target.open().map_err(replica_failure)?;
        let found = self.compare(&mut *session)?.mismatches;
        let only_there: Vec<Mismatch> = found.into_iter().filter(|one| one.side == Side::There).collect();
        if !only_there.is_empty() && !self.args.force {
            session.close();
            self.list(&only_there, None)?;
            return Ok(Exit::Differs);
        }
        fence::lower(&mut *session).map_err(replica_failure)?;
        session.close();
        book.forget(self.url()).map_err(|error| Failure::new(Exit::State, error))?;
        let mut out = std::io::stdout().lock();
        match self.common.json {
            true => writeln!(out, "{}", json!({ "replica": self.target.name(), "released": true }))?,
            false => writeln!(out, "released: {} is a replica again", self.target.name())?,
        }
        Ok(Exit::Ok)
    }
}

/// Stands for what is at stake: all that the other side has, or has otherwise. What only the source has changes all the time.
fn plan_of(all: &[Mismatch]) -> String {
    let mut hash = blake3::Hasher::new();
    for one in all.iter().filter(|one| one.side != Side::Here) {
        hash.update(one.to_string().as_bytes());
        hash.update(b"\n");
    }
    hash.finalize().to_hex().get(..12).unwrap_or_default().to_owned()
}
