//! How two snapshots differ: a walk over two JSON trees, and a table of what may differ and why.

use super::snapshot::Snapshot;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A difference that is allowed at some places, with the reason.
#[derive(Clone, Copy)]
pub struct Exception {
    /// Keys from the top; `*` stands for any one key.
    pub at: &'static [&'static str],
    pub why: &'static str,
    /// Expected and found value, `Null` where a side has none.
    pub allowed: fn(&Value, &Value) -> bool,
}

impl Exception {
    pub const fn always(at: &'static [&'static str], why: &'static str) -> Self {
        Self { at, why, allowed: |_, _| true }
    }

    fn is_at(&self, path: &[&str]) -> bool {
        self.at.len() == path.len() && self.at.iter().zip(path).all(|(at, key)| *at == "*" || at == key)
    }
}

/// What is compared.
#[derive(Clone)]
pub struct Rules {
    pub exceptions: Vec<Exception>,
    /// The expected side is a recording: what it does not say about a mailbox or message is not asked.
    pub recorded: bool,
    /// Mailboxes that do not count in `names`, whichever side has them.
    pub hidden: fn(&str) -> bool,
}

const INFORMATION: &str = "belongs to sessions, not to the store";

/// Holds for every comparison. Everything named `*` below `vendor` that is not here is compared.
const ALWAYS: &[Exception] = &[
    Exception::always(&["users", "*", "mailboxes", "*", "recent"], INFORMATION),
    Exception::always(&["shared", "*", "recent"], INFORMATION),
    Exception::always(&["users", "*", "mailboxes", "*", "userflags"], "names of flags that no message carries"),
    Exception::always(&["shared", "*", "userflags"], "names of flags that no message carries"),
    Exception::always(&["users", "*", "mailboxes", "*", "vendor", "lastpop"], "when, not what"),
];

impl Rules {
    /// A source and its replica, both 3.6.1.
    pub fn live() -> Self {
        Self { exceptions: ALWAYS.to_vec(), recorded: false, hidden: is_deleted }
    }

    /// A running source of this release, and a 3.6.1 replica.
    pub fn beside(release: &str) -> Self {
        match release.starts_with("3.6.") {
            true => Self::live(),
            false if has_scripts_apart(release) => Self::recorded(release).and(FROM_TWO).and(COUNTED),
            false => Self::recorded(release).and(&[RAW_QUOTA]),
        }
    }

    /// What a recording of this release showed, and a 3.6.1 replica.
    pub fn recorded(release: &str) -> Self {
        let mut exceptions = ALWAYS.to_vec();
        exceptions.extend(RECORDED);
        if release.starts_with("2.") {
            exceptions.extend(FROM_TWO);
        }
        if release.starts_with("2.3") {
            exceptions.extend(FROM_TWO_THREE);
        }
        if release.starts_with("3.0") {
            exceptions.extend(FROM_THREE_ZERO);
        }
        Self {
            exceptions,
            recorded: true,
            hidden: if has_scripts_apart(release) { is_deleted_or_sieve } else { is_deleted },
        }
    }

    pub fn and(mut self, exceptions: &[Exception]) -> Self {
        self.exceptions.extend(exceptions);
        self
    }

    fn allow(&self, path: &[&str], expected: &Value, found: &Value) -> bool {
        self.exceptions.iter().any(|exception| exception.is_at(path) && (exception.allowed)(expected, found))
    }
}

/// A recording's server wrote names in its own way and had mailbox ids of its own making.
const RECORDED: &[Exception] =
    &[Exception::always(&["users", "*", "mailboxes", "*", "name"], "as the recording's server writes it")];

/// What a 3.6 replica counts for a quota and a source before does not: the folder of scripts, its messages, parents it made.
const COUNTED: &[Exception] = &[
    Exception { at: &["users", "*", "mailboxes", "*", "quota", "*", "STORAGE"], why: "scripts", allowed: a_few_more },
    Exception { at: &["users", "*", "mailboxes", "*", "quota", "*", "MESSAGE"], why: "scripts", allowed: a_few_more },
    Exception {
        at: &["users", "*", "mailboxes", "*", "quota", "*", "X-NUM-FOLDERS"],
        why: "parents",
        allowed: a_few_more,
    },
];

fn a_few_more(expected: &Value, found: &Value) -> bool {
    let more = found[0].as_u64().zip(expected[0].as_u64()).and_then(|(found, expected)| found.checked_sub(expected));
    expected[1] == found[1] && more.is_some_and(|more| more <= 4)
}

/// Shown by releases after 3.6.
pub const RAW_QUOTA: Exception = Exception {
    at: &["users", "*", "mailboxes", "*", "vendor", "userrawquota"],
    why: "the quota once more, as releases after 3.6 show it",
    allowed: |_, found| found.is_null(),
};

/// What a 3.6 replica shows in another way than a 2.x source.
const FROM_TWO: &[Exception] = &[
    Exception {
        at: &["users", "*", "mailboxes", "*", "attrs"],
        why: "a plain LIST of 2.x is silent about special use; the annotation is compared",
        allowed: only_special_use_more,
    },
    Exception {
        at: &["names"],
        why: "3.6 makes the missing parents of a mailbox by itself, and a client's SELECT creates them",
        allowed: only_parents_more,
    },
    Exception {
        at: &["users", "*", "mailboxes", "*"],
        why: "such a parent; that it is one is seen in the names",
        allowed: |expected, found| {
            expected.is_null() && found["exists"] == 0 && found["uidnext"] == 1 && found["messages"] == json!({})
        },
    },
];

/// What a 3.6 replica shows in another way than a 2.3 source.
const FROM_TWO_THREE: &[Exception] = &[
    Exception {
        at: &["users", "*", "mailboxes", "*", "vendor", "condstore"],
        why: "an option of 2.3; later releases always keep modseqs and have no such annotation",
        allowed: |_, found| found.is_null(),
    },
    Exception { at: &["shared", "*", "vendor", "condstore"], why: "the same", allowed: |_, found| found.is_null() },
    Exception {
        at: &["users", "*", "mailboxes", "*", "quota", "*", "STORAGE"],
        why: "2.3 goes on to count what a new root below has taken over",
        allowed: |expected, found| expected[1] == found[1] && found[0].as_u64() < expected[0].as_u64(),
    },
];

/// What a 3.6 replica shows in another way than a 3.0 source.
const FROM_THREE_ZERO: &[Exception] = &[
    Exception { at: &["users", "*", "mailboxes", "*", "vendor", "synccrcs", "shared"], why: SUMS, allowed: same_basic },
    Exception { at: &["shared", "*", "vendor", "synccrcs", "shared"], why: SUMS, allowed: same_basic },
];

const SUMS: &str = "from 3.2 on the sum over annotations is over other ones";

fn same_basic(expected: &Value, found: &Value) -> bool {
    let basic = |value: &Value| value.as_str().and_then(|sums| Some(sums.split_once(' ')?.0.to_owned()));
    basic(expected).is_some() && basic(expected) == basic(found)
}

/// Before 3.6 a user's scripts are in a directory only; a 3.6 replica makes a mailbox for them.
pub fn has_scripts_apart(release: &str) -> bool {
    ["2.", "3.0.", "3.2.", "3.4."].iter().any(|old| release.starts_with(old))
}

const SPECIAL_USE: &[&str] = &["\\Archive", "\\Drafts", "\\Flagged", "\\Important", "\\Junk", "\\Sent", "\\Trash"];

fn strings(value: &Value) -> BTreeSet<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn only_special_use_more(expected: &Value, found: &Value) -> bool {
    let (expected, found) = (strings(expected), strings(found));
    expected.is_subset(&found) && found.difference(&expected).all(|attribute| SPECIAL_USE.contains(attribute))
}

fn only_parents_more(expected: &Value, found: &Value) -> bool {
    let (expected, found) = (strings(expected), strings(found));
    let counts = |name: &&&str| !is_deleted_or_sieve(name);
    let is_parent = |name: &&str| {
        expected.iter().filter(counts).any(|child| child.strip_prefix(*name).is_some_and(|rest| rest.starts_with('.')))
    };
    expected.difference(&found).filter(counts).count() == 0 && found.difference(&expected).filter(counts).all(is_parent)
}

fn is_deleted(name: &str) -> bool {
    name.rsplit('!').next().is_some_and(|name| name.starts_with("DELETED."))
}

fn is_deleted_or_sieve(name: &str) -> bool {
    is_deleted(name) || name.ends_with(".#sieve")
}

/// What differs, one line each; nothing if the two are equal under the rules.
pub fn diff(expected: &Snapshot, found: &Snapshot, rules: &Rules) -> Vec<String> {
    let mut out = Vec::new();
    walk(&mut Vec::new(), &expected.0, &found.0, rules, &mut out);
    out
}

fn walk<'a>(path: &mut Vec<&'a str>, expected: &'a Value, found: &'a Value, rules: &Rules, out: &mut Vec<String>) {
    if expected == found || rules.allow(path, expected, found) {
        return;
    }
    let place = || path.join(" / ");
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            let optional = rules.recorded && is_record(path);
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let (a, b) = (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                if !(optional && a.is_null()) {
                    path.push(key);
                    walk(path, a, b, rules, out);
                    path.pop();
                }
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            let hidden = |item: &&String| path.as_slice() == ["names"] && (rules.hidden)(item.trim_matches('"'));
            let set = |items: &[Value]| items.iter().map(Value::to_string).collect::<Vec<_>>();
            let (a, b) = (set(a), set(b));
            let (a, b): (BTreeSet<&String>, BTreeSet<&String>) =
                (a.iter().filter(|i| !hidden(i)).collect(), b.iter().filter(|i| !hidden(i)).collect());
            out.extend(a.difference(&b).map(|item| format!("{}: {item} missing", place())));
            out.extend(b.difference(&a).map(|item| format!("{}: {item} not expected", place())));
        }
        (_, Value::Null) => out.push(format!("{}: missing, expected {}", place(), short(expected))),
        (Value::Null, _) => out.push(format!("{}: not expected, found {}", place(), short(found))),
        _ => out.push(format!("{}: expected {}, found {}", place(), short(expected), short(found))),
    }
}

/// Objects whose keys are properties; those of the others are things.
fn is_record(path: &[&str]) -> bool {
    match path {
        [] => true,
        ["users", _] => true,
        ["users", _, "mailboxes", _, rest @ ..] | ["shared", _, rest @ ..] => {
            matches!(rest, [] | ["vendor"] | ["messages", _])
        }
        _ => false,
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(160) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Map;

    fn sample() -> Value {
        let mailbox = json!({
            "acl": {"u1": "lrs", "anyone": "lr"},
            "annotations": {"/comment": {"shared": "x", "priv": "y"}},
            "attrs": ["\\Sent"],
            "exists": 2,
            "highestmodseq": 9,
            "mailboxid": "abc",
            "messages": {
                "1": {"flags": ["$Label1", "\\Seen"], "internaldate": " 1-Jan-2015 10:00:00 +0000", "modseq": 3,
                      "sha1": "00", "size": 12, "annotations": {"/comment": {"value.priv": "z"}}},
                "7": {"flags": [], "internaldate": " 1-Jan-2015 10:00:00 +0000", "modseq": 9, "sha1": "01", "size": 1},
            },
            "name": "INBOX", "recent": 1, "uidnext": 8, "uidvalidity": 1795492630, "unseen": 1,
            "quota": {"user.u1": {"STORAGE": [1, 1000], "MESSAGE": [2, 10]}},
            "userflags": ["$Label1"],
            "vendor": {"uniqueid": {"shared": "abc"}, "sharedseen": {"shared": "false"}},
        });
        json!({
            "names": ["DELETED.user.u1.x.6B051872", "shared.news", "user.u1", "user.u1.#sieve"],
            "server_annotations": {"/comment": {"shared": "note"}},
            "shared": {"shared.news": mailbox},
            "users": {"u1": {
                "mailboxes": {"user.u1": mailbox},
                "others": {"user.u2": {"uidvalidity": 5, "seen": [1, 2]}},
                "subscribed": ["shared.news", "user.u1"],
                "sieve": {"main": {"active": true, "sha1": "02"}, "old": {"active": false, "sha1": "03"}},
            }},
        })
    }

    /// Every change that can be made at one place of the tree: the place and the changed tree.
    fn changed(tree: &Value) -> Vec<(Vec<String>, Value)> {
        let mut out: Vec<(Vec<String>, Value)> = Vec::new();
        match tree {
            Value::Object(members) => {
                for (key, value) in members {
                    let mut without = members.clone();
                    without.remove(key);
                    out.push((vec![key.clone()], without.into()));
                    for (mut place, value) in changed(value) {
                        let mut with: Map<String, Value> = members.clone();
                        with.insert(key.clone(), value);
                        place.insert(0, key.clone());
                        out.push((place, with.into()));
                    }
                }
                let mut more = members.clone();
                more.insert("more".into(), json!({"modseq": 1}));
                out.push((vec!["more".into()], more.into()));
            }
            Value::Array(items) => {
                let mut more = items.clone();
                more.push(json!("more"));
                out.push((vec![], more.into()));
                for at in 0..items.len() {
                    let mut fewer = items.clone();
                    fewer.remove(at);
                    out.push((vec![], fewer.into()));
                }
            }
            Value::Number(number) => out.push((vec![], json!(number.as_u64().expect("unsigned") + 1))),
            Value::String(text) => out.push((vec![], format!("{text}x").into())),
            Value::Bool(yes) => out.push((vec![], (!yes).into())),
            Value::Null => {}
        }
        out
    }

    #[test]
    fn every_planted_difference_is_found_unless_it_has_a_reason() {
        let tree = Snapshot(sample());
        let rules = Rules::live();
        assert_eq!(diff(&tree, &tree, &rules), Vec::<String>::new());
        let (mut found, mut excused) = (0, 0);
        for (place, changed) in changed(&tree.0) {
            let changed = Snapshot(changed);
            let path: Vec<&str> = place.iter().map(String::as_str).collect();
            let both = [diff(&tree, &changed, &rules), diff(&changed, &tree, &rules)];
            let excuse = rules.exceptions.iter().any(|exception| exception.is_at(&path));
            let names = changed.0["names"].as_array().map_or(0, Vec::len);
            let deleted = path == ["names"] && names == 3 && !changed.0.to_string().contains("DELETED");
            match excuse || deleted {
                true => {
                    assert_eq!(both, [vec![], vec![]] as [Vec<String>; 2], "{place:?}");
                    excused += 1;
                }
                false => {
                    assert!(both.iter().all(|lines| lines.len() == 1), "{place:?}: {both:?}");
                    assert!(both.iter().all(|lines| lines[0].starts_with(&place.join(" / "))), "{place:?}: {both:?}");
                    found += 1;
                }
            }
        }
        assert!(found > 120 && excused > 4, "{found} found, {excused} excused");
    }

    #[test]
    fn a_recording_is_only_asked_for_what_it_says() {
        let (full, mut less) = (Snapshot(sample()), sample());
        less["users"]["u1"]["mailboxes"]["user.u1"].as_object_mut().expect("object").remove("highestmodseq");
        less["users"]["u1"]["mailboxes"]["user.u1"]["messages"]["1"].as_object_mut().expect("object").remove("modseq");
        less.as_object_mut().expect("object").remove("server_annotations");
        less["names"] = json!(["shared.news", "user.u1"]);
        let less = Snapshot(less);
        assert_eq!(diff(&less, &full, &Rules::recorded("2.5.11")), Vec::<String>::new());
        assert_eq!(diff(&full, &less, &Rules::recorded("2.5.11")).len(), 3);
        assert_eq!(diff(&less, &full, &Rules::recorded("3.6.1")), ["names: \"user.u1.#sieve\" not expected"]);
        let mut more = sample();
        more["users"]["u1"]["mailboxes"]["user.u1"]["messages"]["9"] = json!({"flags": []});
        more["users"]["u1"]["mailboxes"]["user.u1"]["acl"]["u9"] = json!("lr");
        more["users"]["u1"]["mailboxes"]["user.u1.x"] = json!({"uidvalidity": 1});
        assert_eq!(diff(&full, &Snapshot(more), &Rules::recorded("2.5.11")).len(), 3);
    }
}
