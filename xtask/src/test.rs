//! `cargo xtask test`: every test that needs no hardware, and every example that needs none.
//!
//! It never opens `/dev/kvm`: see [`crate::workspace`] for how tests that do are kept out.

use thiserror::Error;

use crate::libtest::Tally;
use crate::process::{self, Event, Read};
use crate::workspace;

/// Why the tests did not pass.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error("no test ran: something is wrong with how they are built")]
    NothingRan,
}

/// Runs them and prints how many there were.
pub(crate) fn run() -> Result<Tally, Error> {
    let targets = workspace::targets(&workspace::metadata()?)?;

    // Builds the examples too, and runs the documentation tests.
    let mut tally = Tally::default();
    let mut tests = workspace::cargo();
    tests.args(["test", "--workspace"]);
    process::stream(&mut tests, Read::Stdout, None, |event| {
        if let Event::Line(line) = event {
            anstream::println!("{line}");
            tally += Tally::parse(line).unwrap_or_default();
        }
    })?;
    if tally.ran() == 0 {
        return Err(Error::NothingRan);
    }

    let mut examples = 0;
    for example in targets.iter().filter(|target| target.example && !target.needs_kvm) {
        anstream::println!("example {} of {}", example.name, example.package);
        process::run(&mut example.command("run"))?;
        examples += 1;
    }
    anstream::println!("tests without hardware: {tally}; {examples} examples ran");
    Ok(tally)
}
