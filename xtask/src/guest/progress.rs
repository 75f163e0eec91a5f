//! What a long build shows: one line that changes on a terminal, a line now and then elsewhere, and
//! everything in a log.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::Error;
use super::cache::io;
use crate::process::{self, Event, Read};

/// How often something is said when it is not a terminal.
const QUIET: Duration = Duration::from_secs(15);

/// How many lines of the log a failure shows.
const TAIL: usize = 20;

/// A build in steps.
pub(crate) struct Build {
    log: File,
    log_path: PathBuf,
    start: Instant,
    terminal: bool,
    /// When something was last said.
    said: Instant,
}

/// What one step has done so far.
#[derive(Default)]
struct Step {
    name: &'static str,
    objects: u32,
    tail: Vec<String>,
}

impl Build {
    /// A build that logs to `log_path`.
    pub(crate) fn new(log_path: &Path) -> Result<Self, Error> {
        let log = io("creating", log_path, File::create(log_path))?;
        let now = Instant::now();
        let terminal = io::stderr().is_terminal();
        Ok(Self { log, log_path: log_path.to_owned(), start: now, terminal, said: now })
    }

    /// Runs the command as the next step.
    pub(crate) fn step(&mut self, name: &'static str, command: &mut Command) -> Result<(), Error> {
        let mut step = Step { name, ..Step::default() };
        self.say(&step);
        let mut logged = writeln!(self.log, "$ {}", process::shown(command));
        let result = process::stream(command, Read::StdoutAndStderr, None, |event| {
            if let Event::Line(line) = event {
                if logged.is_ok() {
                    logged = writeln!(self.log, "{line}");
                }
                step.line(line);
            }
            if self.terminal || self.said.elapsed() >= QUIET {
                self.say(&step);
            }
        });
        if self.terminal {
            self.say(&step);
            eprintln!();
        }
        io("writing", &self.log_path, logged)?;
        result.map_err(|source| Error::Step {
            step: name,
            source,
            tail: step.tail.join("\n"),
            log: self.log_path.clone(),
        })
    }

    fn say(&mut self, step: &Step) {
        let line = step.shown(self.start.elapsed());
        if self.terminal {
            // To the start of the line, and clear it.
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
        self.said = Instant::now();
    }
}

impl Step {
    fn line(&mut self, line: &str) {
        if is_object(line) {
            self.objects = self.objects.saturating_add(1);
        }
        if self.tail.len() == TAIL {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
    }

    fn shown(&self, elapsed: Duration) -> String {
        let seconds = elapsed.as_secs();
        let time = format!("{}:{:02}", seconds / 60, seconds % 60);
        match self.objects {
            0 => format!("guest: {time} {}", self.name),
            objects => format!("guest: {time} {}, {objects} objects", self.name),
        }
    }
}

/// Whether kbuild says that it made an object file: `  CC      init/main.o`.
fn is_object(line: &str) -> bool {
    let mut words = line.split_whitespace();
    matches!((words.next(), words.next()), (Some("CC" | "AS"), Some(file)) if file.ends_with(".o"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_counted() {
        assert!(is_object("  CC      init/main.o"));
        assert!(is_object("  AS      arch/x86/entry/entry_64.o"));
        assert!(!is_object("  LD      vmlinux"));
        assert!(!is_object("  HOSTCC  scripts/basic/fixdep"));
        assert!(!is_object("CC"));
    }

    #[test]
    fn a_step_says_what_it_does_how_far_it_is_and_for_how_long() {
        let mut step = Step { name: "compiling", ..Step::default() };
        assert_eq!(step.shown(Duration::from_secs(5)), "guest: 0:05 compiling");
        step.line("  CC      init/main.o");
        assert_eq!(step.shown(Duration::from_secs(125)), "guest: 2:05 compiling, 1 objects");
    }

    #[test]
    fn a_failed_step_shows_the_end_of_its_log_and_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("build.log");
        let mut build = Build::new(&log).unwrap();
        build.step("first", Command::new("sh").args(["-c", "echo one"])).unwrap();
        let error = build
            .step("second", Command::new("sh").args(["-c", "seq 100; echo broken >&2; exit 2"]))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("second: `sh"), "{error}");
        assert!(error.contains("100\nbroken\n") && !error.contains("\n80\n"), "{error}");
        assert!(error.contains(&log.display().to_string()), "{error}");
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(log.starts_with("$ sh -c 'echo one'\none\n$ sh") && log.contains("\n80\n"));
    }
}
