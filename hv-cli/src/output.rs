//! Writing the reports of `hv`: JSON for programs, text of at most 80 columns for people.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use hv_core::Errno;
use serde::Serialize;

/// Columns of text for people.
pub(crate) const COLUMNS: usize = 80;

/// A report could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the report can't be written: {errno}")]
pub struct OutputError {
    /// What `write(2)` left.
    pub errno: Errno,
}

/// Flushes `out` after `written`. A reader that has closed its end has read what it wanted, so that
/// is no error.
///
/// # Errors
/// Those of writing, except `EPIPE`.
pub(crate) fn finish(out: &mut dyn Write, written: io::Result<()>) -> Result<(), OutputError> {
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(OutputError { errno: Errno::from(&error) })
        }
        _ => Ok(()),
    }
}

/// Writes `report` as JSON.
///
/// # Errors
/// Those of writing.
pub(crate) fn json(report: &impl Serialize, out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, report)?;
    writeln!(out)
}

/// `text` in lines of at most [`COLUMNS`] with `indent` spaces before each, broken at spaces. A
/// longer word gets a line of its own.
pub(crate) fn wrap(text: &str, indent: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= COLUMNS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("{:indent$}{word}", "")),
        }
    }
    lines
}

/// The name of a file in a message. It may hold anything; a message is one line and moves no cursor.
pub(crate) fn printable(path: &Path) -> String {
    let mut name = String::new();
    for c in path.to_string_lossy().chars() {
        if c.is_control() {
            name.extend(c.escape_default());
        } else {
            name.push(c);
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_at_spaces_and_indented() {
        let text = "word ".repeat(40);
        let lines = wrap(&text, 6);
        assert!(lines.len() > 1);
        assert!(lines.iter().all(|l| l.starts_with("      word") && l.len() <= COLUMNS));
        assert_eq!(lines.iter().map(|l| l.split_whitespace().count()).sum::<usize>(), 40);
        assert!(wrap("", 4).is_empty());
    }

    #[test]
    fn a_word_that_does_not_fit_is_not_cut() {
        let long = "x".repeat(100);
        assert_eq!(wrap(&format!("a {long} b"), 2), ["  a", &format!("  {long}"), "  b"]);
    }

    #[test]
    fn exactly_as_wide_as_allowed() {
        let text = format!("{} {}", "x".repeat(39), "y".repeat(40));
        assert_eq!(wrap(&text, 0).len(), 1);
        assert_eq!(wrap(&text, 1).len(), 2);
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        let mut out = Vec::new();
        assert!(finish(&mut out, Err(ErrorKind::BrokenPipe.into())).is_ok());
        let full = io::Error::from_raw_os_error(Errno::ENOSPC.0);
        let error = finish(&mut out, Err(full)).unwrap_err();
        assert!(error.to_string().starts_with("the report can't be written: ENOSPC"), "{error}");
    }
}
