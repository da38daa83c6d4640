//! What survives a restart: receipts per key and replica, and what a source of 2.3 wants remembered (`model::Memory`).
//! Deleting it costs a full comparison, and of such a source reading its messages once more; so whatever is wrong
//! with the file (another store's, an older format, damage) leads to a fresh one, never to a conclusion.
//!
//! One redb database, `state.redb`. Writes are visible to readers at once (an overlay in memory) and durable within a
//! quarter of a second or at `flush`. A receipt that was lost by a crash only makes its mailbox be compared again;
//! that the mailbox is ours stands in `begun`, and which lanes are at work in `at-work`, written before anything is sent.

mod at_work;
mod inspect;
mod intents;
mod owner;
mod promotions;
mod receipt;
mod receipts;
mod store;

pub use at_work::Slot;
pub use inspect::{Counts, Entry, Report, StateFile};
pub use owner::hand_over;
pub use promotions::Promotions;
pub use receipt::{Lift, MailboxReceipt, UserReceipt};
pub use receipts::ReplicaState;
pub use store::{Health, State, StateError};
