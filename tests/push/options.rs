//! What a server stores of a mailbox and what it says of it need not be the same.

use super::{said, succeeds};
use crate::util::{CyrusServer, Options, Spooltap, cyrus};

#[test]
fn a_mailbox_that_became_empty_has_new_uidls_whatever_is_stored() {
    if !cyrus::installed() {
        return;
    }
    let source = CyrusServer::start(Options::new().source().users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let state = tempfile::tempdir().expect("is made");
    let spooltap = |arguments: &[&str]| {
        Spooltap::once(&source.conf(), &replica.url(), &state.path().join("state"), arguments).expect("runs")
    };
    let mut u1 = source.imap("u1").expect("logs in");
    u1.ok("APPEND INBOX {16+}\r\nSubject: x\r\n\r\ny\r\n").expect("is appended");
    let uidls = "/shared/vendor/cmu/cyrus-imapd/pop3newuidl";
    let mut admin = source.admin().expect("logs in");
    admin.ok(format!("SETMETADATA user.u1 ({uidls} \"false\")")).expect("is set");
    let shown = |server: &CyrusServer| {
        let said = server.admin().expect("logs in").ok(format!("GETMETADATA user.u1 ({uidls})")).expect("is shown");
        said.lines[0].text().contains("\"true\"")
    };
    let check = |expected: bool| {
        succeeds(&spooltap(&["push", "-A"]), "push").expect("succeeds");
        assert_eq!([shown(&source), shown(&replica)], [expected; 2]);
        let verified = spooltap(&["verify"]);
        assert!(verified.status.success(), "{}", said(&verified));
    };
    check(false);
    u1.ok("SELECT INBOX").expect("is selected");
    u1.ok("STORE 1 +FLAGS.SILENT (\\Deleted)").expect("is marked");
    u1.ok("EXPUNGE").expect("is expunged");
    u1.ok("LOGOUT").expect("says goodbye");
    check(true);
}
