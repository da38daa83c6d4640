//! Subscriptions: intnames up to 3.4, `N` + dbname with the user's own INBOX spelled `INBOX` from 3.6 on.

use super::{db::Map, mboxlist};
use crate::model::{MboxName, UserId};
use std::collections::BTreeSet;

const VERSION_KEY: &[u8] = b"\x1fVER\x1f";

/// The names a user is subscribed to.
pub fn parse(map: &Map, user: &UserId) -> BTreeSet<MboxName> {
    if !map.contains_key(VERSION_KEY) {
        return map.keys().filter(|key| !key.is_empty()).map(MboxName::new).collect();
    }
    let own = mboxlist::dbname_of_name(&user.inbox());
    map.keys()
        .filter_map(|key| key.strip_prefix(b"N"))
        // Two processes of 3.6 that convert an older file at once convert the version, too.
        .filter(|name| *name != VERSION_KEY)
        .map(|name| match name.strip_prefix(b"INBOX") {
            Some(rest) if rest.is_empty() || rest.first() == Some(&0x1f) => {
                mboxlist::name_of_dbname(&[&own, rest].concat())
            }
            // Version 2 also shortened the names of other users that begin with this user's.
            Some(rest) => mboxlist::name_of_dbname(&[&own, rest].concat()),
            None => mboxlist::name_of_dbname(name),
        })
        .collect()
}

/// The keys for these names as 3.6 to 3.10 write them.
pub fn encode(names: &BTreeSet<MboxName>, user: &UserId) -> Map {
    let own = mboxlist::dbname_of_name(&user.inbox());
    let key = |name: &MboxName| {
        let dbname = mboxlist::dbname_of_name(name);
        match dbname.strip_prefix(own.as_slice()) {
            Some(rest) if rest.is_empty() || rest.first() == Some(&0x1f) => [b"NINBOX", rest].concat(),
            _ => [b"N", dbname.as_slice()].concat(),
        }
    };
    let version = (VERSION_KEY.to_vec(), b"2".to_vec());
    names.iter().map(|name| (key(name), Vec::new())).chain([version]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &[&[u8]], expected: &[&str]) {
        let map = keys.iter().map(|key| (key.to_vec(), Vec::new())).collect();
        let names: Vec<String> = parse(&map, &"he".into()).iter().map(ToString::to_string).collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn what_is_encoded_is_read_back() {
        let names: BTreeSet<MboxName> =
            ["user.he", "user.he.Sub^one", "user.hew.y", "user.joe^bloggs.X", "shared"].map(MboxName::from).into();
        let map = encode(&names, &"he".into());
        assert!(map.contains_key(&b"NINBOX\x1fSub.one"[..]) && map.contains_key(&b"Nuser\x1fhew\x1fy"[..]));
        assert_eq!(parse(&map, &"he".into()), names);
    }

    #[test]
    fn both_forms() {
        check(&[b"user.he", b"user.he.Sub^one"], &["user.he", "user.he.Sub^one"]);
        check(
            &[
                b"\x1fVER\x1f",
                b"N\x1fVER\x1f",
                b"NINBOX",
                b"NINBOX\x1fSub.one",
                b"Nuser\x1fjoe.bloggs\x1fX",
                b"NINBOXw\x1fy",
            ],
            &["user.he", "user.he.Sub^one", "user.hew.y", "user.joe^bloggs.X"],
        );
    }
}
