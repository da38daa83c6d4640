//! Words shared by all rooms: identifiers, what may differ (`DirtyKey`), what the source holds
//! (`MailboxSnapshot` and its neighbours), what a replica holds (`MailboxView` …), the steps between the two, and
//! the three seams (`MailStore`, `Replica`, `Source`) that every pair of source and target goes through.
//!
//! No I/O and no clock in here. `std::io::Read` occurs only as the shape in which message bytes travel.

mod delta;
mod dirty;
mod ids;
mod listing;
mod mailbox;
mod promotion;
pub mod pulse;
mod seam;
mod shared_map;
mod user;

pub use delta::{BodyRef, Delta, MailboxUpdate, Since, Step};
pub use dirty::{DirtyKey, MailboxRef, Notice, Scope, UserPart, UserRef};
pub use ids::{FlagName, MboxName, MessageGuid, ModSeq, Partition, QuotaRoot, SieveName, Uid, UniqueId, UserId};
pub use listing::{LeftOut, Listing};
pub use mailbox::{
    Annotation, MailboxEntry, MailboxHead, MailboxSnapshot, MailboxView, MboxType, Options, Record, SyncCrcs,
    SystemFlags, UserFlags,
};
pub use promotion::{FENCE, Promotion};
pub use pulse::Pulse;
pub use seam::{
    AnnotCrc, Body, BodySource, Capabilities, ChangedAnnotations, Denial, Disposition, Fingerprint, MailStore, Memory,
    Replica, ReplicaError, ReplicaTarget, StoreError,
};
pub use shared_map::SharedMap;
pub use user::{AccountView, QuotaLimits, QuotaResource, SeenState, SieveScript, UserMeta};
