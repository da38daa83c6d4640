//! Which users go to which replica: the first rule that fits a user decides; a user whom none fits goes to every
//! replica, and so does all that belongs to no user.

use super::ConfigFault;
use super::raw::RawRoute;
use std::collections::BTreeMap;

/// The rules, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// `*` stands for anything; empty: everybody.
    users: Vec<String>,
    replicas: Vec<String>,
    /// To so many of the replicas, chosen by hash; to all of them when `None`.
    copies: Option<usize>,
}

impl Routes {
    /// Checks the rules against the replicas there are: what each may be called, and its URL.
    pub(super) fn check(raw: &[RawRoute], replicas: &BTreeMap<String, String>, faults: &mut Vec<ConfigFault>) -> Self {
        let mut rules = Vec::new();
        let mut everybody = None;
        for (at, route) in raw.iter().enumerate() {
            let key = format!("route {}", at + 1);
            let mut fault = |fault: String, cure: &str| {
                faults.push(ConfigFault { key: key.clone(), fault, cure: cure.into() });
            };
            let (names, copies) = match (route.to.is_empty(), route.spread.is_empty()) {
                (false, true) if route.copies.is_none() => (&route.to, None),
                (true, false) => (&route.spread, Some(route.copies.unwrap_or(1))),
                (false, true) => {
                    fault("copies goes with spread".into(), "to already means every one of them");
                    continue;
                }
                _ => {
                    fault("needs either to or spread".into(), "to = [URL, …] for all of them, spread for one of them");
                    continue;
                }
            };
            for name in names.iter().filter(|name| !replicas.contains_key(*name)) {
                fault(format!("{name} is no replica"), "write it as in replica = [ … ]");
            }
            if copies.is_some_and(|copies| !(1..=names.len()).contains(&copies)) {
                fault("copies is out of range".into(), "use 1 up to the number of replicas in spread");
            }
            if let Some(before) = everybody {
                fault(format!("is never reached: route {before} takes everybody"), "move it up");
            }
            if route.users.is_empty() || route.users.iter().any(|user| user == "*") {
                everybody = Some(at + 1);
            }
            rules.push(Rule {
                users: route.users.clone(),
                replicas: names.iter().filter_map(|name| replicas.get(name).cloned()).collect(),
                copies,
            });
        }
        Self(rules)
    }

    /// Every replica gets everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this replica gets this user.
    pub fn wants(&self, replica: &str, user: &[u8]) -> bool {
        let fits = |rule: &&Rule| rule.users.is_empty() || rule.users.iter().any(|glob| fits(glob.as_bytes(), user));
        let Some(rule) = self.0.iter().find(fits) else { return true };
        let Some(copies) = rule.copies else { return rule.replicas.iter().any(|name| name == replica) };
        // Rendezvous hashing: a replica more or less moves only the users it gains or loses.
        let weight = |name: &str| {
            let mut hash = blake3::Hasher::new();
            hash.update(name.as_bytes()).update(&[0]).update(user);
            *hash.finalize().as_bytes()
        };
        let own = weight(replica);
        let is_named = rule.replicas.iter().any(|name| name == replica);
        is_named && rule.replicas.iter().filter(|name| weight(name) > own).count() < copies
    }
}

/// `*` in the pattern stands for any bytes, none included.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let mut pieces = pattern.split(|&byte| byte == b'*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut pieces: Vec<&[u8]> = pieces.collect();
    let Some(last) = pieces.pop() else { return rest.is_empty() };
    for piece in pieces {
        let Some(at) = (0..=rest.len().saturating_sub(piece.len())).find(|&at| rest[at..].starts_with(piece)) else {
            return false;
        };
        rest = &rest[at + piece.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Raw;

    fn routes(text: &str) -> (Routes, Vec<String>) {
        let raw: Raw = toml::from_str(text).expect("parses");
        let mut faults = Vec::new();
        let routes =
            Routes::check(&raw.route, &["a", "b", "c"].map(|name| (name.into(), name.into())).into(), &mut faults);
        (routes, faults.into_iter().map(|fault| fault.fault).collect())
    }

    fn of(routes: &Routes, user: &str) -> String {
        ["a", "b", "c"].into_iter().filter(|name| routes.wants(name, user.as_bytes())).collect()
    }

    #[test]
    fn patterns() {
        for (pattern, yes, no) in [
            ("jane", "jane", "janet"),
            ("j*e", "jane", "janet"),
            ("*@dom.test", "u@dom.test", "u@dom.test.org"),
            ("a*b*c", "axbxbc", "acb"),
            ("ab*ba", "abba", "aba"),
            ("*", "", "\u{0}never"),
        ] {
            assert!(fits(pattern.as_bytes(), yes.as_bytes()), "{pattern} {yes}");
            assert!(pattern == "*" || !fits(pattern.as_bytes(), no.as_bytes()), "{pattern} {no}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let (routes, faults) = routes(
            "[[route]]\nusers = [\"jane\", \"adm*\"]\nto = [\"a\"]\n[[route]]\nusers = [\"*@dom.test\"]\nto = [\"b\", \"c\"]\n",
        );
        assert!(faults.is_empty(), "{faults:?}");
        let users = ["jane", "admin@dom.test", "bob@dom.test", "bob"];
        assert_eq!(users.map(|user| of(&routes, user)), ["a", "a", "bc", "abc"]);
    }

    #[test]
    fn spreading_is_even_and_moves_only_what_it_must() {
        let (three, _) = routes("[[route]]\nspread = [\"a\", \"b\", \"c\"]\n");
        let (two, _) = routes("[[route]]\nspread = [\"a\", \"b\"]\n");
        let (double, _) = routes("[[route]]\nspread = [\"a\", \"b\", \"c\"]\ncopies = 2\n");
        let mut counts = [0; 3];
        for user in (0..3000).map(|number| format!("user{number}")) {
            let with = of(&three, &user);
            assert_eq!(with.len(), 1);
            counts["abc".find(&with).expect("one of them")] += 1;
            assert!(with == "c" || of(&two, &user) == with, "{user} moved without need");
            assert!(of(&double, &user).len() == 2 && of(&double, &user).contains(&with));
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn faults_are_named() {
        for (text, expected) in [
            ("[[route]]\nto = [\"x\"]\n", "x is no replica"),
            ("[[route]]\nusers = [\"u\"]\n", "needs either"),
            ("[[route]]\nto = [\"a\"]\n[[route]]\nusers = [\"u\"]\nto = [\"b\"]\n", "never reached"),
            ("[[route]]\nspread = [\"a\"]\ncopies = 2\n", "out of range"),
            ("[[route]]\nto = [\"a\"]\ncopies = 1\n", "goes with spread"),
        ] {
            let (_, faults) = routes(text);
            assert!(faults.len() == 1 && faults[0].contains(expected), "{text}: {faults:?}");
        }
    }
}
