//! The program `volary`: parses the command line and hands over to one file per command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
