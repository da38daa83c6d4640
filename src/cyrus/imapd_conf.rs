//! imapd.conf text to options. Pure: included files come through a closure.
//!
//! `key: value`; `#` begins a comment line; keys are compared in lower case; a `\` at the end continues the line;
//! `@include: FILE` reads another file. `SERVICE_key` overrides `key` for one service.

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
            let mut line = line.trim_start().to_owned();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            while line.ends_with('\\') {
                line.pop();
                match lines.next() {
                    Some((_, more)) => line.push_str(more.trim_start()),
                    None => break,
                }
            }
            let fault = |fault: &str| ConfError::Line { line: at.saturating_add(1), fault: fault.to_owned() };
            let Some((key, value)) = line.split_once(':') else {
                return Err(fault("has no colon; write KEY: VALUE"));
            };
            let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
            if key == "@include" {
                if depth >= MAX_INCLUDES {
                    return Err(fault("files are included too deep"));
                }
                let text = include(value).map_err(|cause| ConfError::Include { path: value.to_owned(), cause })?;
                self.add(&text, include, depth.saturating_add(1))?;
                continue;
            }
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            if key.is_empty() || !key.chars().all(valid) {
                return Err(fault("option name has other characters than letters, digits, - and _"));
            }
            self.options.insert(key, value.to_owned());
        }
        Ok(())
    }

    /// An option's value; `{configdirectory}` at its start is replaced.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    /// The value a service sees: its own override first.
    pub fn for_service(&self, service: &str, key: &str) -> Option<&str> {
        self.get(&format!("{service}_{key}")).or_else(|| self.get(key))
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

    /// Options `PREFIX-NAME` as (NAME, value).
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
        assert_eq!(conf.get("admins"), Some("cyrus repl"));
        assert_eq!(conf.for_service("imap", "admins"), Some("other"));
        assert_eq!(conf.for_service("lmtp", "admins"), Some("cyrus repl"));
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
        assert!(parse("a b: c").starts_with("line 1"));
    }

    #[test]
    fn a_file_that_includes_itself_ends() {
        assert!(ImapdConf::parse("@include: x", &mut |_| Ok("@include: x".to_owned())).is_err());
    }
}
