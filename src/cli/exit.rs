//! Exit codes, one table: `spooltap --help`, spooltap(1) and the program itself have them from here.

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
    (Exit::Refused, "the replica refuses us (login, rights, wrong kind of server)"),
    (Exit::Config, "the configuration is faulty"),
];

/// The table as the end of `--help`.
pub(super) fn help() -> String {
    let rows = EXITS.iter().map(|(exit, meaning)| format!("  {:>2}  {meaning}", *exit as u8));
    format!("Exit codes:\n{}", rows.collect::<Vec<_>>().join("\n"))
}
