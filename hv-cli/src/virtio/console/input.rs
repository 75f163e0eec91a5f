//! What is typed, on its way from the main thread to the device.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::console::GuestInput;
use crate::event::Event;

/// The most bytes that wait for a driver.
const ROOM: usize = 4096;

/// A bounded buffer of what is typed. Clones share it; no call waits.
#[derive(Debug, Clone)]
pub struct ConsoleInput(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bytes: Mutex<VecDeque<u8>>,
    /// Signalled when something was typed, or the terminal got another size.
    arrived: Event,
    resized: AtomicBool,
    /// Signalled when there is room again.
    drained: Event,
}

impl ConsoleInput {
    /// An empty one, which signals `drained` when bytes were taken out of it.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(drained: Event) -> io::Result<Self> {
        let (bytes, resized) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self(Arc::new(Shared { bytes, arrived: Event::new()?, resized, drained })))
    }

    /// What becomes readable when there is something to do.
    pub(super) fn event(&self) -> &Event {
        &self.0.arrived
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// Fills `buffer` as far as there are bytes, and returns how far.
    pub(super) fn take(&self, buffer: &mut [u8]) -> usize {
        let mut bytes = self.bytes();
        let len = bytes.len().min(buffer.len());
        for (place, byte) in buffer.iter_mut().zip(bytes.drain(..len)) {
            *place = byte;
        }
        drop(bytes);
        if len > 0 {
            self.0.drained.signal();
        }
        len
    }

    /// Whether the terminal has got another size. The event is taken.
    pub(super) fn was_resized(&self) -> bool {
        let _ = self.0.arrived.take();
        self.0.resized.swap(false, Ordering::AcqRel)
    }

    fn bytes(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestInput for ConsoleInput {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut there = self.bytes();
        let len = bytes.len().min(ROOM.saturating_sub(there.len()));
        there.extend(bytes.iter().take(len));
        drop(there);
        self.0.arrived.signal();
        len
    }

    fn resized(&self) {
        self.0.resized.store(true, Ordering::Release);
        self.0.arrived.signal();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_driver_does_not_take_is_bounded_and_kept_in_order() {
        let drained = Event::new().unwrap();
        let input = ConsoleInput::new(drained.clone()).unwrap();
        assert_eq!(input.offer(&[1; ROOM - 1]), ROOM - 1);
        assert_eq!(input.offer(&[2, 3]), 1);
        assert_eq!(input.offer(&[3]), 0);
        assert_eq!(drained.take(), None);
        let mut buffer = [0; ROOM + 1];
        assert_eq!(input.take(&mut buffer), ROOM);
        assert_eq!((buffer[ROOM - 2], buffer[ROOM - 1], buffer[ROOM]), (1, 2, 0));
        assert_eq!(drained.take(), Some(1));
        assert_eq!((input.take(&mut buffer), drained.take()), (0, None));
    }

    #[test]
    fn a_new_size_is_told_once() {
        let input = ConsoleInput::new(Event::new().unwrap()).unwrap();
        input.resized();
        assert!(input.was_resized() && !input.was_resized());
        assert_eq!(input.event().take(), None);
    }
}
