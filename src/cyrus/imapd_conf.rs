//! imapd.conf text to options. Pure: included files come through a closure.
//!
//! `key: value`; `#` begins a comment line; keys are compared in lower case; a `\` at the end continues the line (a
//! comment, too: then the next line is part of it); `@include: FILE` reads another file. `SERVICE_key` overrides `key`
//! for one service, and spooltap reads `CHANNEL_key` as sync_client does. What a server would not start with (an option
//! given twice, one without a value) is refused here as well. Checked against `cyr_info conf` of 3.6.1.

use std::collections::BTreeMap;

/// imapd.conf cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    #[error("line {line}: {fault}")]
    Line { line: usize, fault: String },
    #[error("included file {path}: {cause}")]
    Include { path: String, cause: String },
    #[error("{0} is not set")]
    Missing(&'static str),
}

/// All options of an imapd.conf, included files in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImapdConf {
    options: BTreeMap<String, String>,
}

/// Included files may include others, this deep.
const MAX_INCLUDES: usize = 8;

impl ImapdConf {
    /// Reads the text; `include` gives the text of an included file.
    pub fn parse(text: &str, include: &mut dyn FnMut(&str) -> Result<String, String>) -> Result<Self, ConfError> {
        let mut conf = Self::default();
        conf.add(text, include, 0)?;
        Ok(conf)
    }

    fn add(
        &mut self,
        text: &str,
        include: &mut dyn FnMut(&str) -> Result<String, String>,
        depth: usize,
    ) -> Result<(), ConfError> {
        let mut lines = text.lines().enumerate();
        while let Some((at, line)) = lines.next() {
            let mut line = line.to_owned();
            while line.ends_with('\\') {
                line.pop();
                match lines.next() {
                    Some((_, more)) => line.push_str(more),
                    None => break,
                }
            }
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fault = |fault: &str| ConfError::Line { line: at.saturating_add(1), fault: fault.to_owned() };
            let Some((key, value)) = line.split_once(':') else {
                return Err(fault("has no colon; write KEY: VALUE"));
            };
            let (key, value) = (key.to_ascii_lowercase(), value.trim());
            if key == "@include" {
                if depth >= MAX_INCLUDES {
                    return Err(fault("files are included too deep"));
                }
                let text = include(value).map_err(|cause| ConfError::Include { path: value.to_owned(), cause })?;
                self.add(&text, include, depth.saturating_add(1)).map_err(|error| match error {
                    line @ ConfError::Line { .. } => {
                        ConfError::Include { path: value.to_owned(), cause: line.to_string() }
                    }
                    other => other,
                })?;
                continue;
            }
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            if key.is_empty() || !key.chars().all(valid) {
                return Err(fault("option name has other characters than letters, digits, - and _"));
            }
            if value.is_empty() {
                return Err(fault("has no value; give one, or take the line out"));
            }
            if self.options.contains_key(&key) {
                return Err(fault(&format!("{key} was given before; keep one of the two")));
            }
            self.options.insert(key, value.to_owned());
        }
        Ok(())
    }

    /// An option's value as it stands there; for one that may begin with `{configdirectory}` see [`ImapdConf::path`].
    pub fn get(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    /// All options, sorted.
    pub fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The value a service, or sync_client for a channel, sees: its own override first.
    pub fn for_service(&self, service: &str, key: &str) -> Option<&str> {
        self.get(&format!("{}_{key}", service.to_ascii_lowercase())).or_else(|| self.get(key))
    }

    /// Overrides of `key` for single services, as (SERVICE, value); options whose names merely end like that included.
    pub fn overrides<'a>(&'a self, key: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.options.iter().filter_map(move |(name, value)| {
            let service = name.strip_suffix(key)?.strip_suffix('_')?;
            Some((service, value.as_str()))
        })
    }

    /// A path value, with `{configdirectory}` at its start replaced.
    pub fn path(&self, key: &str) -> Option<String> {
        let value = self.get(key)?;
        Some(match value.strip_prefix("{configdirectory}") {
            Some(rest) => format!("{}{rest}", self.get("configdirectory").unwrap_or_default()),
            None => value.to_owned(),
        })
    }

    /// A switch; anything that is no switch word counts as not set.
    pub fn switch(&self, key: &str, default: bool) -> bool {
        match self.get(key).map(str::to_ascii_lowercase).as_deref() {
            Some("1" | "yes" | "t" | "true" | "on") => true,
            Some("0" | "no" | "f" | "false" | "off") => false,
            _ => default,
        }
    }

    /// Options `PREFIX-NAME` as (NAME, value). NAME is in lower case, which is how servers look it up; nothing in the
    /// value is replaced, as in a server.
    pub fn named<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.options.iter().filter_map(move |(key, value)| {
            let name = key.strip_prefix(prefix)?.strip_prefix('-')?;
            Some((name, value.as_str()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ImapdConf {
        ImapdConf::parse(text, &mut |path| match path {
            "/other" => Ok("sync_host: replica\npartition-p2: /p2\n".to_owned()),
            _ => Err("no such file".to_owned()),
        })
        .expect("parses")
    }

    #[test]
    fn lines_as_cyrus_reads_them() {
        let conf = parse(
            "# comment\nConfigDirectory: /var/imap  \npartition-default: /spool\n admins: cyrus \\\n  repl\n@include: /other\n\
             imap_admins: other\nvirtdomains: userid\nhashimapspool: t\nmboxlist_db_path: {configdirectory}/m.db\n",
        );
        assert_eq!(conf.get("configdirectory"), Some("/var/imap"));
        assert_eq!(conf.get("admins"), Some("cyrus   repl"));
        assert_eq!(conf.for_service("imap", "admins"), Some("other"));
        assert_eq!(conf.for_service("IMAP", "admins"), Some("other"));
        assert_eq!(conf.for_service("lmtp", "admins"), Some("cyrus   repl"));
        assert_eq!(conf.overrides("admins").collect::<Vec<_>>(), [("imap", "other")]);
        assert_eq!(conf.get("sync_host"), Some("replica"));
        assert!(conf.switch("hashimapspool", false));
        assert_eq!(conf.named("partition").collect::<Vec<_>>(), [("default", "/spool"), ("p2", "/p2")]);
        assert_eq!(conf.path("mboxlist_db_path").as_deref(), Some("/var/imap/m.db"));
    }

    #[test]
    fn faults_name_their_line_or_file() {
        let parse =
            |text: &str| ImapdConf::parse(text, &mut |_| Err("gone".to_owned())).expect_err("faulty").to_string();
        assert!(parse("a: b\nnonsense\n").starts_with("line 2"));
        assert!(parse("@include: /x\n").contains("/x"));
        let inner = ImapdConf::parse("@include: /x\n", &mut |_| Ok("a: b\nnonsense\n".to_owned()));
        assert!(inner.expect_err("faulty").to_string().contains("/x: line 2"));
        assert!(parse("a b: c").starts_with("line 1"));
    }

    /// What `cyr_info conf` of 3.6.1 said to the same text.
    #[test]
    fn as_cyr_info_reads_it() {
        let conf = parse(
            "# a comment \\\nadmins: hidden\ndefaultdomain: a\\\n   b  c  \nsievedir: {configdirectory}/s\nconfigdirectory: /c\n",
        );
        assert_eq!((conf.get("admins"), conf.get("defaultdomain")), (None, Some("a   b  c")));
        assert_eq!(conf.path("sievedir").as_deref(), Some("/c/s"));
        let fault =
            |text: &str| ImapdConf::parse(text, &mut |_| Ok("admins: x".to_owned())).expect_err(text).to_string();
        for (text, line) in [
            ("sievedir: /a\nsievedir: /b\n", 2),
            ("sievedir: /a\nSieveDir: /a\n", 2),
            ("@include: b.conf\nadmins: z\n", 2),
            ("\npartition-x: /a\npartition-x: /b\n", 3),
            ("hashimapspool:\n", 1),
            ("servername : x\n", 1),
            ("\u{feff}admins: q\n", 1),
        ] {
            assert!(fault(text).starts_with(&format!("line {line}: ")), "{text}: {}", fault(text));
        }
        assert_eq!(parse("partition-P2: /p2\n").named("partition").collect::<Vec<_>>(), [("p2", "/p2")]);
    }

    #[test]
    fn a_file_that_includes_itself_ends() {
        assert!(ImapdConf::parse("@include: x", &mut |_| Ok("@include: x".to_owned())).is_err());
    }
}
