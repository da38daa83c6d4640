//! Mailbox names as clients write them ↔ Cyrus's classic internal names, which recordings and snapshots use.

/// What decides how a server writes names. `altnamespace` is always off here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// `unixhierarchysep`: `/` separates and a dot may stand in a name.
    pub unix: bool,
    /// `virtdomains: userid`.
    pub domains: bool,
    /// Logins without a domain belong to this one, and mailbox names do not mention it.
    pub default_domain: String,
}

impl Names {
    pub fn separator(&self) -> char {
        if self.unix { '/' } else { '.' }
    }

    /// `u3@dom.test` → `dom.test!user.u3`.
    pub fn inbox(&self, login: &str) -> String {
        let (local, domain) = self.split(login);
        let inbox = format!("user.{}", local.replace('.', "^"));
        domain.map_or(inbox.clone(), |domain| format!("{domain}!{inbox}"))
    }

    /// Local part, and the domain if names have to mention it.
    fn split<'a>(&self, login: &'a str) -> (&'a str, Option<&'a str>) {
        match login.split_once('@') {
            Some((local, domain)) if self.domains && domain != self.default_domain => (local, Some(domain)),
            Some((local, _)) if self.domains => (local, None),
            _ => (login, None),
        }
    }

    /// The internal name of what `login` calls `name`; administrators have no INBOX.
    pub fn internal(&self, name: &str, login: &str, admin: bool) -> String {
        let (_, own_domain) = self.split(login);
        let (name, domain) = match name.rsplit_once('@') {
            Some((name, domain)) if admin && self.domains && own_domain.is_none() => (name, Some(domain)),
            _ => (name, own_domain),
        };
        let (first, rest) = match name.split_once(self.separator()) {
            Some((first, rest)) => (first, Some(rest)),
            None => (name, None),
        };
        let inside = |name: &str| match self.unix {
            true => name.replace('.', "^").replace('/', "."),
            false => name.to_owned(),
        };
        if !admin && first.eq_ignore_ascii_case("inbox") {
            let inbox = self.inbox(login);
            return rest.map_or(inbox.clone(), |rest| format!("{inbox}.{}", inside(rest)));
        }
        match domain {
            Some(domain) => format!("{domain}!{}", inside(name)),
            None => inside(name),
        }
    }

    /// What an administrator of the default domain calls the mailbox with this internal name.
    pub fn external(&self, internal: &str) -> String {
        let (domain, name) = match internal.split_once('!') {
            Some((domain, name)) => (Some(domain), name),
            None => (None, internal),
        };
        let name = match self.unix {
            true => name.replace('.', "/").replace('^', "."),
            false => name.to_owned(),
        };
        domain.map_or(name.clone(), |domain| format!("{name}@{domain}"))
    }
}

#[test]
fn names_both_ways() {
    let dots = Names { unix: false, domains: false, default_domain: "lab.test".into() };
    let unix = Names { unix: true, domains: true, default_domain: "lab.test".into() };
    assert_eq!(dots.inbox("jane.doe"), "user.jane^doe");
    assert_eq!(unix.inbox("u3@dom.test"), "dom.test!user.u3");
    assert_eq!(unix.inbox("u3@lab.test"), "user.u3");
    let cases = [
        (&dots, "INBOX", "u1", false, "user.u1"),
        (&dots, "INBOX.Sent", "jane.doe", false, "user.jane^doe.Sent"),
        (&dots, "user.u2.Work", "u1", false, "user.u2.Work"),
        (&dots, "INBOX", "cyrus", true, "INBOX"),
        (&unix, "INBOX/v1.2/x", "u3@dom.test", false, "dom.test!user.u3.v1^2.x"),
        (&unix, "user/u3/v1.2@dom.test", "cyrus", true, "dom.test!user.u3.v1^2"),
        (&unix, "user/jane.doe", "u1", false, "user.jane^doe"),
        (&unix, "shared/news", "u1", false, "shared.news"),
    ];
    for (names, external, login, admin, internal) in cases {
        assert_eq!(names.internal(external, login, admin), internal, "{external} of {login}");
        if admin && external != "INBOX" {
            assert_eq!(names.external(internal), external);
        }
    }
}
