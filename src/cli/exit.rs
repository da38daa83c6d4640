//! Exit codes, one table: `spooltap --help`, spooltap(1) and the program itself have them from here.

use crate::model::Denial;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok = 0,
    Differs = 1,
    Critical = 2,
    NoDaemon = 3,
    Usage = 64,
    Data = 65,
    Source = 66,
    Replica = 69,
    State = 74,
    Interrupted = 75,
    Refused = 77,
    Config = 78,
    Login = 80,
    NotAdmin = 81,
    Mechanism = 82,
    NoTls = 83,
    Expired = 84,
    Stranger = 85,
    OtherName = 86,
    Tls = 87,
    OurCertificate = 88,
    Promoted = 89,
}

/// What each means.
pub(super) const EXITS: &[(Exit, &str)] = &[
    (Exit::Ok, "done; for verify, scan and demo: both sides are equal"),
    (Exit::Differs, "something differs, or items could not be replicated (each is named); for status: a warning"),
    (Exit::Critical, "status: critical"),
    (Exit::NoDaemon, "no daemon runs that could be asked"),
    (Exit::Usage, "wrong usage"),
    (Exit::Data, "a file is damaged or of a kind that cannot be read"),
    (Exit::Source, "the source cannot be read"),
    (Exit::Replica, "the replica cannot be reached"),
    (Exit::State, "our own state cannot be read or written"),
    (Exit::Interrupted, "interrupted before the work was done"),
    (Exit::Refused, "the replica is of the wrong kind (another service, Cyrus 2.3, a front end)"),
    (Exit::Config, "the configuration is faulty"),
    (Exit::Login, "the replica refuses user or password"),
    (Exit::NotAdmin, "the replica's user is not one of its admins"),
    (Exit::Mechanism, "no way of logging in that both sides have and that may be used over this connection"),
    (Exit::NoTls, "the replica offers no TLS, or somebody on the way hides it"),
    (Exit::Expired, "the replica's certificate has expired or is not valid yet"),
    (Exit::Stranger, "nobody we believe has signed the replica's certificate, or it is not the pinned one"),
    (Exit::OtherName, "the replica's certificate is for another name"),
    (Exit::Tls, "no TLS with the replica for another reason"),
    (Exit::OurCertificate, "the replica does not believe our certificate"),
    (Exit::Promoted, "the replica was promoted, nothing is pushed over it: see failback"),
];

impl From<Denial> for Exit {
    fn from(denial: Denial) -> Self {
        match denial {
            Denial::Login => Self::Login,
            Denial::NotAdmin => Self::NotAdmin,
            Denial::Mechanism => Self::Mechanism,
            Denial::NoTls => Self::NoTls,
            Denial::Expired => Self::Expired,
            Denial::Stranger => Self::Stranger,
            Denial::OtherName => Self::OtherName,
            Denial::Tls => Self::Tls,
            Denial::OurCertificate => Self::OurCertificate,
            Denial::Promoted => Self::Promoted,
        }
    }
}

/// The table as the end of `--help`.
pub(super) fn help() -> String {
    let rows = EXITS.iter().map(|(exit, meaning)| format!("  {:>2}  {meaning}", *exit as u8));
    format!("Exit codes:\n{}", rows.collect::<Vec<_>>().join("\n"))
}
