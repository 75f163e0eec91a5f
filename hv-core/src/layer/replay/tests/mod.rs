//! Transcripts that are recorded and replayed.

mod differences;
mod fake;
mod guest;
mod hostile;
mod rings;
mod waiting;

use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};

use super::Replay;

/// A file in memory.
#[derive(Clone, Default)]
struct File(Arc<Mutex<Vec<u8>>>);

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl File {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn replay(transcript: &str) -> Replay {
    Replay::new(Cursor::new(transcript.to_owned())).unwrap()
}
