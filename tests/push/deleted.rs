//! Mailboxes that were deleted and wait for `cyr_expire`: they still have an owner, and what he noted about them.

use super::{said, succeeds};
use crate::util::{CyrusServer, Options, Spooltap, cyrus};

#[test]
fn what_the_owner_noted_goes_with_a_deleted_mailbox() {
    if !cyrus::installed() {
        return;
    }
    let source =
        CyrusServer::start(Options::new().source().set("delete_mode", "delayed").users(&["u1"])).expect("starts");
    let replica = CyrusServer::start(Options::new()).expect("starts");
    let state = tempfile::tempdir().expect("is made");
    let spooltap = |arguments: &[&str]| {
        Spooltap::once(&source.conf(), &replica.url(), &state.path().join("state"), arguments).expect("runs")
    };
    let mut u1 = source.imap("u1").expect("logs in");
    u1.ok("CREATE INBOX.Work").expect("is created");
    u1.ok("SETMETADATA INBOX.Work (/private/specialuse \"\\\\Drafts\" /private/comment \"mine\")").expect("is set");
    u1.ok("APPEND INBOX.Work {16+}\r\nSubject: x\r\n\r\ny\r\n").expect("is appended");
    u1.ok("SELECT INBOX.Work").expect("is selected");
    u1.ok("STORE 1 ANNOTATION (/comment (value.priv \"private\"))").expect("is set");
    u1.ok("SELECT INBOX").expect("is selected");
    succeeds(&spooltap(&["push", "-A"]), "push").expect("succeeds");
    // A special use keeps a user from deleting a mailbox, not an admin.
    source.admin().expect("logs in").ok("DELETE user.u1.Work").expect("is deleted");
    succeeds(&spooltap(&["push", "-A"]), "push").expect("succeeds");
    let verified = spooltap(&["verify"]);
    assert!(verified.status.success(), "{}", said(&verified));

    // Undeleted there, it is what it was.
    let mut admin = replica.admin().expect("logs in");
    let deleted = admin.ok("LIST \"\" DELETED.*").expect("lists").lines[0].text();
    let deleted = deleted.rsplit(' ').next().expect("a name").to_owned();
    admin.ok(format!("RENAME {deleted} user.u1.Back")).expect("is renamed");
    let mut u1 = replica.imap("u1").expect("logs in");
    let noted =
        u1.ok("GETMETADATA INBOX.Back (/private/specialuse /private/comment)").expect("is shown").lines[0].text();
    assert!(noted.contains("Drafts") && noted.contains("mine"), "{noted}");
    u1.ok("SELECT INBOX.Back").expect("is selected");
    let noted = u1.ok("FETCH 1 (ANNOTATION (/comment value.priv))").expect("is shown").lines[0].text();
    assert!(noted.contains("private"), "{noted}");
}
