//! The `hv` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(hv_cli::cli::main(std::env::args_os()))
}
