//! Archives: what a replica must do, what a crash may not do, and whole recordings kept in one and read back.

mod replays;
