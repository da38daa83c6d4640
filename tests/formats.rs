//! Readers against Cyrus's own dumps of the same files: the small stores of `fixtures/formats/`, and all of
//! `../shared/spools/` where that folder exists (`SPOOLTAP_SHARED` names another).

#[path = "formats/damage.rs"]
mod damage;
#[path = "formats/databases.rs"]
mod databases;
#[path = "formats/history.rs"]
mod history;
#[path = "formats/inspect.rs"]
mod inspect;
#[path = "formats/mailboxes.rs"]
mod mailboxes;
#[path = "formats/parsers.rs"]
mod parsers;
#[path = "formats/store.rs"]
mod store;
#[path = "formats/versions.rs"]
mod versions;
