//! Sieve script files: `NAME.script`, `NAME.bc`, and the link `defaultbc` (very old: `default`) to the active one.

use crate::model::SieveName;

/// Name of the script in a `.script` file.
pub fn script_name(file: &[u8]) -> Option<SieveName> {
    file.strip_suffix(b".script").filter(|name| !name.is_empty()).map(SieveName::new)
}

/// The active script, by the target of `defaultbc` or `default`.
pub fn active_name(link_target: &[u8]) -> Option<SieveName> {
    let file = link_target.rsplit(|&byte| byte == b'/').next()?;
    let name = file.strip_suffix(b".bc").or_else(|| file.strip_suffix(b".script"))?;
    (!name.is_empty()).then(|| SieveName::new(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(script_name(b"main.script"), Some("main".into()));
        assert_eq!(script_name(b"main.bc"), None);
        assert_eq!(active_name(b"main.bc"), Some("main".into()));
        assert_eq!(active_name(b"/sieve/m/me/main.script"), Some("main".into()));
        assert_eq!(active_name(b"main"), None);
    }
}
