//! The mailbox list as Cyrus's own `ctl_mboxlist -d` prints it, of a recorded source and of a replica: deleted mailboxes
//! and partitions, which IMAP does not show, are in it.

use crate::util::CyrusServer;
use crate::util::diff::has_scripts_apart;
use anyhow::Context;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A mailbox of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    partition: String,
    acl: BTreeMap<String, String>,
    /// Not in the list of 2.x.
    uniqueid: Option<String>,
}

/// How the replica's list differs from that of a recorded store.
pub fn differences(truth: &Value, replica: &CyrusServer) -> anyhow::Result<Vec<String>> {
    let lines = truth["ctl_mboxlist"].as_array().context("no ctl_mboxlist in the truth")?;
    let recorded: Vec<&str> = lines.iter().filter_map(Value::as_str).collect();
    let expected = parse(&recorded)?;
    let output = replica.tool("ctl_mboxlist", &["-d"])?;
    anyhow::ensure!(output.status.success(), "ctl_mboxlist: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = parse(&text.lines().collect::<Vec<_>>())?;
    let has_scripts_apart = truth["version"].as_str().is_some_and(has_scripts_apart);
    Ok(compare(&expected, &found, has_scripts_apart))
}

fn compare(expected: &BTreeMap<String, Entry>, found: &BTreeMap<String, Entry>, scripts_apart: bool) -> Vec<String> {
    let names: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let differ = names.into_iter().filter_map(|name| match (expected.get(name), found.get(name)) {
        (None, Some(_)) if scripts_apart && name.ends_with(".#sieve") => None,
        (Some(a), Some(b)) if a.partition == b.partition && a.acl == b.acl => {
            let differ = a.uniqueid.is_some() && a.uniqueid != b.uniqueid;
            differ.then(|| format!("{name}: expected {:?}, found {:?}", a.uniqueid, b.uniqueid))
        }
        (a, b) => Some(format!("{name}: expected {a:?}, found {b:?}")),
    });
    differ.collect()
}

/// Mailboxes with content: neither tombstones nor names that only have something below them.
fn parse(lines: &[&str]) -> anyhow::Result<BTreeMap<String, Entry>> {
    if lines.first().is_some_and(|line| line.trim() == "{") {
        let all: BTreeMap<String, Value> = serde_json::from_str(&lines.join("\n"))?;
        let entries = all.into_iter().filter(|(_, entry)| !entry["mbtype"].as_str().unwrap_or("").contains(['d', 'i']));
        return entries.map(|(name, entry)| Ok((name, modern(&entry)?))).collect();
    }
    let entries = lines.iter().filter(|line| !line.is_empty());
    let entries = entries.map(|line| classic(line).with_context(|| format!("not as 2.x prints it: {line}")));
    entries.filter_map(Result::transpose).collect()
}

fn modern(entry: &Value) -> anyhow::Result<Entry> {
    let rights = entry["acl"].as_object().context("no ACL")?;
    let acl = rights.iter().map(|(who, rights)| (who.clone(), sorted(rights.as_str().unwrap_or_default())));
    let text = |key: &str| entry[key].as_str().map(ToOwned::to_owned);
    Ok(Entry { partition: text("partition").context("no partition")?, acl: acl.collect(), uniqueid: text("uniqueid") })
}

/// `NAME \t TYPE PARTITION IDENTIFIER \t RIGHTS \t …`; type 16 is a tombstone.
fn classic(line: &str) -> anyhow::Result<Option<(String, Entry)>> {
    let (name, rest) = line.split_once('\t').context("no tab")?;
    let (kind, rest) = rest.split_once(' ').context("no type")?;
    let (partition, acl) = rest.split_once(' ').context("no partition")?;
    if kind == "16" {
        return Ok(None);
    }
    let parts: Vec<&str> = acl.split('\t').filter(|part| !part.is_empty()).collect();
    let acl = parts.chunks_exact(2).map(|pair| (pair[0].to_owned(), sorted(pair[1]))).collect();
    Ok(Some((name.to_owned(), Entry { partition: partition.to_owned(), acl, uniqueid: None })))
}

fn sorted(rights: &str) -> String {
    let mut rights: Vec<char> = rights.chars().collect();
    rights.sort_unstable();
    rights.into_iter().collect()
}

#[test]
fn lists_of_both_kinds_compare() {
    let old = parse(&["shared.b\t0 default anyone\tlrsp\tu1\twlr\t", "user.u1.x\t16 (null) ", "user.u1\t0 p2 "])
        .expect("old");
    assert_eq!(old.len(), 2);
    let new = |partition: &str, id: &str, rights: &str| {
        let line = format!(
            "\"shared.b\": {{\"mbtype\": \"e\", \"partition\": \"{partition}\", \"acl\": {{\"u1\": \"{rights}\", \"anyone\": \"lrsp\"}}, \"uniqueid\": \"{id}\"}},"
        );
        let rest = "\"user.u1\": {\"mbtype\": \"e\", \"partition\": \"p2\", \"acl\": {}, \"uniqueid\": \"b\"}, \"user.u1.#sieve\": {\"mbtype\": \"s\", \"partition\": \"p2\", \"acl\": {}}, \"gone\": {\"mbtype\": \"d\"}";
        parse(&["{", &line, rest, "}"]).expect("new")
    };
    assert_eq!(compare(&old, &new("default", "a", "lrw"), true), Vec::<String>::new());
    assert_eq!(compare(&old, &new("default", "a", "lrw"), false).len(), 1);
    assert_eq!(compare(&old, &new("p2", "a", "lrw"), true).len(), 1);
    assert_eq!(compare(&old, &new("default", "a", "lr"), true).len(), 1);
    assert_eq!(compare(&new("default", "a", "lr"), &new("default", "b", "lr"), false).len(), 1);
    assert_eq!(compare(&new("default", "a", "lr"), &old, false).len(), 3);
}
