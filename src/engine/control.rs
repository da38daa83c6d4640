//! What an admin can say to a running engine: pause, resume, retry, skip, allow.

use super::queue::{Hold, Item, Lane};
use super::{Engine, Shared, lock};
use crate::model::{MboxName, UserId};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What the word is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    Everything,
    User(String),
    /// By internal name.
    Mailbox(String),
}

/// What is to be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Nothing of it is sent; changes are collected.
    Pause,
    /// Ends a pause or a skip.
    Resume,
    /// What failed is tried again now.
    Retry,
    /// It is not tried again and counts no more for the lag, until `resume` or `retry`.
    Skip,
}

/// An order that outlives a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingOrder {
    pub replica: String,
    pub subject: Subject,
    pub word: Word,
}

/// The order cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    #[error("no replica is called {0}; `spooltap status` names them")]
    NoReplica(String),
    #[error("mailbox {0} is known neither to the source nor to the replica; use the internal name (user.jane.Sent)")]
    NoMailbox(String),
    #[error("a whole replica cannot be skipped; name a user or a mailbox, or pause it")]
    SkipsAll,
}

impl Engine {
    fn chosen(&self, replica: Option<&str>) -> Result<Vec<&Shared>, ControlError> {
        let Some(wanted) = replica else { return Ok(self.replicas.iter().map(|shared| &**shared).collect()) };
        let exact = self.replicas.iter().find(|shared| shared.target.name() == wanted);
        let mut part = self.replicas.iter().filter(|shared| shared.target.name().contains(wanted));
        let found = exact.or_else(|| part.next().filter(|_| part.next().is_none()));
        found.map(|shared| vec![&**shared]).ok_or_else(|| ControlError::NoReplica(wanted.to_owned()))
    }

    /// Carries an order out at one replica (by name, or a part of it that fits no other) or at all; says how many failed
    /// items it moved.
    pub fn order_about(&self, replica: Option<&str>, subject: &Subject, word: Word) -> Result<usize, ControlError> {
        if word == Word::Skip && *subject == Subject::Everything {
            return Err(ControlError::SkipsAll);
        }
        let mut moved = 0;
        for shared in self.chosen(replica)? {
            let hold = shared.hold_of(subject)?;
            match word {
                Word::Pause => shared.queue.hold_back(hold, false),
                Word::Skip => shared.queue.hold_back(hold, true),
                Word::Resume => shared.queue.let_go(&hold),
                Word::Retry => {
                    shared.queue.let_go_skipped(&hold);
                    moved += shared.queue.retry(&hold);
                    *lock(&shared.reconnect_now) = Some(Instant::now());
                }
            }
            let mut orders = lock(&shared.orders);
            orders.retain(|(old, _)| old != subject);
            if matches!(word, Word::Pause | Word::Skip) {
                orders.push((subject.clone(), word));
            } else if word == Word::Resume && *subject == Subject::Everything {
                // Whoever resumes everything means everything.
                shared.queue.let_go_all();
                orders.clear();
            }
        }
        Ok(moved)
    }

    /// Lifts the fuse on mass removals for some time, and tries again what it stopped.
    pub fn allow_removals(&self, replica: Option<&str>, time: Duration) -> Result<usize, ControlError> {
        let mut moved = 0;
        for shared in self.chosen(replica)? {
            *lock(&shared.allowed_until) = Instant::now().checked_add(time);
            moved += shared.queue.retry_where(&|failure| failure.reason.starts_with(super::fuse::FUSE));
        }
        Ok(moved)
    }

    /// Pauses and skips in force.
    pub fn standing_orders(&self) -> Vec<StandingOrder> {
        let of = |shared: &Shared| {
            let replica = shared.target.name();
            let orders = lock(&shared.orders).clone();
            orders.into_iter().map(move |(subject, word)| StandingOrder { replica: replica.clone(), subject, word })
        };
        self.replicas.iter().flat_map(|shared| of(shared)).collect()
    }
}

impl Shared {
    fn hold_of(&self, subject: &Subject) -> Result<Hold, ControlError> {
        match subject {
            Subject::Everything => Ok(Hold::Everything),
            Subject::User(user) => Ok(Hold::Lane(Lane::User(UserId::from(user.as_str())))),
            Subject::Mailbox(text) => {
                let name = MboxName::from(text.as_str());
                let here = self.source().ok().and_then(|source| Some(source.by_name(&name)?.uniqueid.clone()));
                let id = here.or_else(|| self.names().id(&name).cloned());
                let id = id.ok_or_else(|| ControlError::NoMailbox(text.clone()))?;
                Ok(Hold::Item(Lane::of(&name, self.store.deleted_prefix()), Item::Mailbox(id)))
            }
        }
    }
}
