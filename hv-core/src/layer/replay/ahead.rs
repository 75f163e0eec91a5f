//! The next lines of a transcript: in their order, and by the object they are of.
//!
//! Only so many lines are held as are needed to say at once that a call is the wrong one, so that
//! neither a long transcript nor a hostile one fills memory.

use std::collections::{HashMap, VecDeque};
use std::io::BufRead;

use crate::layer::Object;
use crate::layer::transcript::{CallLine, Line, Numbered, Reader, TranscriptError};

/// Lines held at most.
pub(super) const LINES: usize = 4096;

/// Bytes of lines beyond which no further line is read ahead.
const BYTES: usize = 32 << 20;

/// What a transcript is read from.
pub(super) type Input = Box<dyn BufRead + Send>;

/// A transcript from the next line on.
pub(super) struct Ahead {
    reader: Reader<Input>,
    /// How it ends, once that was read.
    end: Option<Result<(), TranscriptError>>,
    order: VecDeque<Place>,
    calls: HashMap<Object, VecDeque<(u64, CallLine)>>,
    bytes: usize,
}

/// The place of a line in the order.
struct Place {
    number: u64,
    bytes: usize,
    what: What,
}

enum What {
    Call { on: Object, thread: u32 },
    Signal { event: u32, count: u32, during: Vec<Object> },
}

/// What comes next.
pub(super) enum Next<'a> {
    /// A call, with the number of its line.
    Call(u64, &'a CallLine),
    /// KVM signalled an eventfd.
    Signal {
        /// The number of the line.
        number: u64,
        /// The eventfd, by its number.
        event: u32,
        /// What was added to it.
        count: u32,
        /// The vCPUs that have to run then.
        during: &'a [Object],
    },
    /// The end of the transcript.
    End,
    /// What can't be read.
    Unreadable(&'a TranscriptError),
}

impl Ahead {
    pub(super) fn new(reader: Reader<Input>) -> Self {
        let mut ahead =
            Self { reader, end: None, order: VecDeque::new(), calls: HashMap::new(), bytes: 0 };
        ahead.fill();
        ahead
    }

    fn fill(&mut self) {
        while self.end.is_none() && self.order.len() < LINES && self.bytes < BYTES {
            match self.reader.next() {
                Ok(Some(line)) => self.push(line),
                Ok(None) => self.end = Some(Ok(())),
                Err(error) => self.end = Some(Err(error)),
            }
        }
    }

    fn push(&mut self, Numbered { number, bytes, line }: Numbered) {
        let what = match line {
            Line::Signal { event, count, during } => What::Signal { event, count, during },
            Line::Call(call) => {
                let (on, thread) = (call.on, call.thread);
                self.calls.entry(on).or_default().push_back((number, call));
                What::Call { on, thread }
            }
        };
        self.bytes = self.bytes.saturating_add(bytes);
        self.order.push_back(Place { number, bytes, what });
    }

    /// What comes next.
    pub(super) fn next(&self) -> Next<'_> {
        match self.order.front() {
            Some(&Place { number, what: What::Signal { event, count, ref during }, .. }) => {
                Next::Signal { number, event, count, during }
            }
            // A call in the order has its line in the queue of its object, at the front.
            Some(Place { what: What::Call { on, .. }, .. }) => match self.of(*on).next() {
                Some((number, line)) => Next::Call(number, line),
                None => Next::End,
            },
            None => match &self.end {
                Some(Err(error)) => Next::Unreadable(error),
                _ => Next::End,
            },
        }
    }

    /// Takes what comes next away; its line if it is a call.
    pub(super) fn take(&mut self) -> Option<CallLine> {
        let place = self.order.pop_front()?;
        self.bytes = self.bytes.saturating_sub(place.bytes);
        let line = match place.what {
            What::Signal { .. } => None,
            What::Call { on, .. } => {
                let calls = self.calls.get_mut(&on)?;
                let line = calls.pop_front();
                if calls.is_empty() {
                    self.calls.remove(&on);
                }
                line.map(|(_, line)| line)
            }
        };
        self.fill();
        line
    }

    /// The calls on an object that are known, in order.
    pub(super) fn of(&self, on: Object) -> impl Iterator<Item = (u64, &CallLine)> {
        self.calls.get(&on).into_iter().flatten().map(|(number, line)| (*number, line))
    }

    /// The first call before line `number` that is of the same thread.
    pub(super) fn before(&self, number: u64, thread: u32) -> Option<(u64, &CallLine)> {
        let places = self.order.iter().take_while(|place| place.number < number);
        let (found, on) = places
            .filter_map(|place| match place.what {
                What::Call { on, thread: its } if its == thread => Some((place.number, on)),
                _ => None,
            })
            .next()?;
        self.of(on).find(|(number, _)| *number == found)
    }

    /// Whether all of the transcript is known, well-formed to its end.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self.end, Some(Ok(())))
    }
}
