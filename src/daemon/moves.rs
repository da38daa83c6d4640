//! Users that go from some replicas to another: a book that outlives us, and what is done next. A move is filled first,
//! both sides follow; when they are equal the book is turned, and only then the old side is emptied. Whenever we die, the
//! user is whole on the side that the book names.

use crate::engine::{Lane, MoveError, Mover, Share};
use crate::model::UserId;
use crate::state::hand_over;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tracing::{info, warn};

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The old replicas and the new one are kept equal with the source.
    Filling,
    /// The new one was equal, and is the only one that is kept so; the old ones are to be emptied.
    Emptying,
    Done,
}

/// One user's move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    pub user: String,
    /// Names (URLs) of replicas.
    pub to: String,
    pub from: Vec<String>,
    pub phase: Phase,
    /// Why it does not go on.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// All moves; what they say goes before the rules of the configuration.
pub struct Moves {
    path: PathBuf,
    book: Mutex<BTreeMap<String, Move>>,
}

impl Moves {
    /// Where the book of a state directory is.
    pub fn path(state: &Path) -> PathBuf {
        state.join("moves.json")
    }

    /// Reads the book. One that cannot be read is an error: without it a user would go where he is no more.
    pub fn open(state: &Path) -> io::Result<Arc<Self>> {
        let path = Self::path(state);
        let told = |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
        let list: Vec<Move> = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| told(&error))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(told(&error)),
        };
        let book = list.into_iter().map(|one| (one.user.clone(), one)).collect();
        Ok(Arc::new(Self { path, book: Mutex::new(book) }))
    }

    fn book(&self) -> MutexGuard<'_, BTreeMap<String, Move>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all(&self) -> Vec<Move> {
        self.book().values().cloned().collect()
    }

    /// On the disk before anything follows from it.
    fn save(&self, book: &BTreeMap<String, Move>) -> io::Result<()> {
        let list: Vec<&Move> = book.values().collect();
        let fresh = self.path.with_extension("json.new");
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec_pretty(&list).map_err(io::Error::other)?)?;
        file.sync_all()?;
        hand_over(&fresh);
        std::fs::rename(&fresh, &self.path)?;
        self.path.parent().map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
    }

    fn change(&self, user: &str, with: impl FnOnce(&mut Move)) -> io::Result<()> {
        let mut book = self.book();
        let mut next = book.clone();
        next.get_mut(user).map(with);
        self.save(&next)?;
        *book = next;
        Ok(())
    }

    fn trouble(&self, user: &str, trouble: Option<String>) {
        if let Some(one) = self.book().get_mut(user) {
            one.trouble = trouble;
        }
    }

    /// Whether a replica is to have a user; `None` where the book says nothing.
    pub fn wants(&self, replica: &str, user: &str) -> Option<bool> {
        let book = self.book();
        let one = book.get(user)?;
        let has = |name: &str| name == replica;
        Some(has(&one.to) || (one.phase == Phase::Filling && one.from.iter().any(|name| has(name))))
    }

    /// The rules with the book laid over them.
    pub fn share(self: &Arc<Self>, rules: Option<Share>) -> Share {
        let moves = self.clone();
        Arc::new(move |replica: &str, lane: &Lane| {
            let said = match lane {
                Lane::User(user) => moves.wants(replica, &String::from_utf8_lossy(user.as_bytes())),
                _ => None,
            };
            said.unwrap_or_else(|| rules.as_ref().is_none_or(|rules| rules(replica, lane)))
        })
    }

    /// Writes a move down. `holders` have the user as things stand.
    pub fn begin(&self, user: &str, to: &str, holders: &[String]) -> io::Result<()> {
        let mut book = self.book();
        let mut from: Vec<String> = holders.to_vec();
        if let Some(old) = book.get(user) {
            if old.to == to && old.phase != Phase::Done {
                return Ok(());
            }
            if old.phase != Phase::Done {
                from.extend(old.from.iter().cloned());
            }
        }
        from.retain(|name| name != to);
        from.sort();
        from.dedup();
        let one = Move { user: user.into(), to: to.into(), from, phase: Phase::Filling, trouble: None };
        let mut next = book.clone();
        next.insert(user.into(), one);
        self.save(&next)?;
        *book = next;
        Ok(())
    }
}

/// Writes a move down, if it can be meant. `has` says of a replica whether it has the user as things stand.
pub fn begin(moves: &Moves, mover: &Mover, user: &str, to: &str, has: &dyn Fn(&str) -> bool) -> Result<(), String> {
    let names = mover.names();
    let mut part = names.iter().filter(|name| name.contains(to));
    let found = names.iter().find(|name| *name == to).or_else(|| part.next().filter(|_| part.next().is_none()));
    let to = found.ok_or_else(|| format!("no replica is called {to}; there are {}", names.join(", ")))?;
    if !mover.knows(&UserId::from(user)) {
        return Err(format!("the source has no INBOX of {user}"));
    }
    let holders: Vec<String> = names.iter().filter(|name| has(name)).cloned().collect();
    moves.begin(user, to, &holders).map_err(|error| format!("the book of moves cannot be written: {error}"))
}

/// Carries moves out, one look at a time.
pub struct Hands {
    moves: Arc<Moves>,
    mover: Mover,
    /// Of these the new side was asked to be filled since we run.
    filled: HashSet<(String, String)>,
}

/// Between two looks.
const LOOK: Duration = Duration::from_millis(300);
/// Where there is none.
const RESTING: Duration = Duration::from_secs(1);

impl Hands {
    pub fn new(moves: Arc<Moves>, mover: Mover) -> Self {
        Self { moves, mover, filled: HashSet::new() }
    }

    /// Takes every move one step further, if it can be; false when there is none.
    pub fn look(&mut self) -> bool {
        let open: Vec<Move> = self.moves.all().into_iter().filter(|one| one.phase != Phase::Done).collect();
        let some = !open.is_empty();
        for one in open {
            let trouble = match self.step(&one) {
                Ok(trouble) => trouble,
                Err(error) => Some(error.to_string()),
            };
            if trouble != one.trouble
                && let Some(trouble) = &trouble
            {
                warn!(user = one.user, to = one.to, trouble, "a move waits");
            }
            self.moves.trouble(&one.user, trouble);
        }
        some
    }

    /// What it waits for, if it waits.
    fn step(&mut self, one: &Move) -> Result<Option<String>, MoveError> {
        let user = UserId::from(one.user.as_str());
        let turned = |phase: Phase| {
            let turned = self.moves.change(&one.user, |one| one.phase = phase);
            info!(user = one.user, to = one.to, ?phase, "moving");
            turned.map_err(|error| MoveError::Refused(format!("the book of moves cannot be written: {error}")))
        };
        if self.filled.insert((one.user.clone(), one.to.clone())) {
            self.mover.fill(&one.to, &user)?;
        }
        if let Some(work) = self.mover.open_work(&one.to, &user)? {
            return Ok(Some(format!("{}: {work}", one.to)));
        }
        if let Some(difference) = self.mover.difference(&one.to, &user)? {
            self.filled.remove(&(one.user.clone(), one.to.clone()));
            return Ok(Some(format!("not equal yet: {difference}")));
        }
        match one.phase {
            Phase::Filling => turned(Phase::Emptying)?,
            Phase::Emptying => {
                for name in &one.from {
                    if !self.mover.names().contains(name) {
                        warn!(user = one.user, replica = name, "no replica of ours any more, nothing is removed there");
                        continue;
                    }
                    if let Some(work) = self.mover.open_work(name, &user)? {
                        return Ok(Some(format!("{name}: {work}")));
                    }
                    let count = self.mover.take_away(name, &user, &one.to)?;
                    info!(user = one.user, replica = name, count, "mailboxes removed, they are on the new replica");
                }
                turned(Phase::Done)?;
            }
            Phase::Done => {}
        }
        Ok(None)
    }

    /// Looks again and again until told to stop.
    pub fn work(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(if self.look() { LOOK } else { RESTING });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_book_says_who_has_a_user_in_every_phase() {
        let dir = tempfile::tempdir().expect("directory");
        let moves = Moves::open(dir.path()).expect("opens");
        assert_eq!(moves.wants("a", "jane"), None);
        moves.begin("jane", "b", &["a".into(), "b".into(), "c".into()]).expect("writes");
        let who = |moves: &Moves| ["a", "b", "c", "d"].map(|name| moves.wants(name, "jane").expect("is told"));
        assert_eq!(who(&moves), [true, true, true, false]);
        moves.change("jane", |one| one.phase = Phase::Emptying).expect("writes");
        let again = Moves::open(dir.path()).expect("opens");
        assert_eq!(who(&again), [false, true, false, false]);
        // Back again before it is done: what is left anywhere is to be emptied as well.
        again.begin("jane", "a", &["b".into()]).expect("writes");
        assert_eq!(again.all()[0].from, ["b", "c"]);
        std::fs::write(Moves::path(dir.path()), "[{").expect("writes");
        assert!(Moves::open(dir.path()).is_err());
    }
}
