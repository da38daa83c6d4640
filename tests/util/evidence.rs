//! What the tests have shown in this run, for docs/compatibility.md: which recording or store arrived, by which way, and
//! what was in it. Written only where `tests/run` asks for it.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Folder of this run's evidence.
pub const FOLDER: &str = "SPOOLTAP_EVIDENCE";

/// Kinds of objects, in the order of the document. A kind counts as shown when the expected side has such an object and
/// both sides were found equal.
pub const OBJECTS: &[(&str, IsIn)] = &[
    ("mailboxes", |state| own(state).next().is_some()),
    ("shared mailboxes", |state| state["shared"].as_object().is_some_and(|shared| !shared.is_empty())),
    ("names that are not ASCII", |state| names(state).any(|name| name.contains('&'))),
    ("users with a domain", |state| names(state).any(|name| name.contains('!'))),
    ("users with a dot in their name", |state| names(state).any(|name| name.contains('^'))),
    ("messages, dates, sizes, SHA-1", |state| messages(state).next().is_some()),
    ("system flags", |state| any_flag(state, |flag| flag.starts_with('\\') && flag != "\\Seen")),
    ("keywords", |state| any_flag(state, |flag| !flag.starts_with('\\'))),
    ("\\Seen of the owner", |state| any_flag(state, |flag| flag == "\\Seen")),
    ("\\Seen of others", |state| {
        let seen = |other: &Value| other["seen"].as_array().is_some_and(|seen| !seen.is_empty());
        users(state).flat_map(|user| user["others"].as_object().into_iter().flatten()).any(|(_, other)| seen(other))
    }),
    ("ACLs beside the owner's", |state| {
        own(state).any(|mailbox| mailbox["acl"].as_object().is_some_and(|acl| acl.len() > 2))
    }),
    ("quota roots", |state| {
        own(state)
            .flat_map(|mailbox| mailbox["quota"].as_object().into_iter().flatten())
            .any(|(_, root)| root != &json!({}))
    }),
    ("mailbox annotations", |state| own(state).any(|mailbox| is_filled(&mailbox["annotations"]))),
    ("message annotations", |state| messages(state).any(|message| is_filled(&message["annotations"]))),
    ("server annotations", |state| is_filled(&state["server_annotations"])),
    ("subscriptions", |state| {
        users(state).any(|user| user["subscribed"].as_array().is_some_and(|all| !all.is_empty()))
    }),
    ("Sieve scripts", |state| users(state).any(|user| is_filled(&user["sieve"]))),
];

type IsIn = fn(&Value) -> bool;

/// What happened before a mark, by the first words of the step's text.
pub const STEPS: &[(&str, &str)] = &[
    ("delivery by LMTP", "LMTP"),
    ("COPY", "COPY"),
    ("MOVE", "MOVE"),
    ("EXPUNGE", "EXPUNGE"),
    ("unexpunge", "unexpunge"),
    ("cyr_expire", "cyr_expire"),
    ("reconstruct", "reconstruct"),
    ("mailbox renamed", "RENAME"),
    ("mailbox deleted", "DELETE"),
    ("quota -f", "quota"),
];

fn users(state: &Value) -> impl Iterator<Item = &Value> {
    state["users"].as_object().into_iter().flatten().map(|(_, user)| user)
}

fn own(state: &Value) -> impl Iterator<Item = &Value> {
    users(state).flat_map(|user| user["mailboxes"].as_object().into_iter().flatten()).map(|(_, mailbox)| mailbox)
}

fn messages(state: &Value) -> impl Iterator<Item = &Value> {
    own(state).flat_map(|mailbox| mailbox["messages"].as_object().into_iter().flatten()).map(|(_, message)| message)
}

fn names(state: &Value) -> impl Iterator<Item = &str> {
    state["names"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn any_flag(state: &Value, wanted: fn(&str) -> bool) -> bool {
    messages(state)
        .flat_map(|message| message["flags"].as_array().into_iter().flatten())
        .any(|flag| flag.as_str().is_some_and(wanted))
}

fn is_filled(value: &Value) -> bool {
    value.as_object().is_some_and(|map| !map.is_empty())
}

/// What one test has seen of one recording or store.
#[derive(Default)]
pub struct Evidence(BTreeSet<&'static str>);

impl Evidence {
    /// Both sides were equal, and showed this state; `what` is the step before it.
    pub fn equal(&mut self, state: &Value, what: &str) {
        self.0.extend(OBJECTS.iter().filter(|(_, is_in)| is_in(state)).map(|(kind, _)| *kind));
        self.0.extend(STEPS.iter().filter(|(_, first)| what.starts_with(first)).map(|(kind, _)| *kind));
    }

    /// All of it was equal.
    pub fn put_down(&self, way: &str, name: &str) {
        let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
        std::fs::create_dir_all(&folder).expect("folder");
        let file = json!({"way": way, "name": name, "kinds": self.0});
        std::fs::write(folder.join(format!("{way}-{name}.json")), file.to_string()).expect("writes");
    }
}
