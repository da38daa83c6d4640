//! Parses arguments, calls `cli::run`, prints the error chain, returns the exit code.

fn main() -> std::process::ExitCode {
    spooltap::cli::run()
}
