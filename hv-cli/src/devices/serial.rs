//! COM1, a 16550 (vm-superio's), as a device on the bus.
//!
//! What the guest sends goes to a writer; what the user types waits outside until the FIFO has
//! room, so nothing typed is lost and nothing is buffered without bound.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use super::EdgeIrq;
use crate::event::Event;
use crate::machine::bus::Device;

struct Irq(Arc<dyn EdgeIrq>);

impl Trigger for Irq {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

/// Tells the input side that the guest has read all there was.
struct Drained(Event);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.signal();
    }
}

/// The serial port.
pub struct Com1<W: Write> {
    serial: Serial<Irq, Drained, W>,
    lost: Arc<AtomicU64>,
}

impl<W: Write> Com1<W> {
    /// A port that raises `irq`, sends to `out`, and signals `drained` when all input was read.
    pub fn new(irq: Arc<dyn EdgeIrq>, drained: Event, out: W) -> Self {
        Self { serial: Serial::with_events(Irq(irq), Drained(drained), out), lost: Arc::default() }
    }

    /// Offers input; returns how many bytes the FIFO took.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        // The only error that can be is a full FIFO: it takes nothing.
        self.serial.enqueue_raw_bytes(bytes).unwrap_or_default()
    }

    /// Bytes the guest sent that the writer refused. Others may look at them while the port waits for its
    /// writer.
    pub fn lost(&self) -> Arc<AtomicU64> {
        self.lost.clone()
    }
}

impl<W: Write + Send> Device for Com1<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // A 16550 has 8-bit registers; a wider access reads consecutive ones.
        for (byte, register) in data.iter_mut().zip(offset..) {
            *byte = self.serial.read(register as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, register) in data.iter().zip(offset..) {
            if self.serial.write(register as u8, *byte).is_err() {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Line(AtomicU32);

    impl EdgeIrq for Line {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const LSR: u64 = 5;

    fn port<W: Write>(out: W) -> (Com1<W>, Arc<Line>, Event) {
        let line = Arc::new(Line::default());
        let drained = Event::new().unwrap();
        (Com1::new(line.clone(), drained.clone(), out), line, drained)
    }

    #[test]
    fn what_the_guest_sends_comes_out() {
        let (mut com1, _, _) = port(Vec::new());
        for byte in b"R\n" {
            com1.write(DATA, &[*byte]);
        }
        assert_eq!(com1.serial.writer(), b"R\n");
        assert_eq!(com1.lost().load(Ordering::Relaxed), 0);
    }

    #[test]
    fn input_raises_the_line_and_its_end_is_told() {
        let (mut com1, line, drained) = port(Vec::new());
        com1.write(IER, &[1]);
        assert_eq!(com1.input(b"hi"), 2);
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        let mut byte = [0];
        com1.read(LSR, &mut byte);
        assert_eq!(byte[0] & 1, 1, "data ready");
        com1.read(DATA, &mut byte);
        assert_eq!(&byte, b"h");
        assert!(drained.take().is_none(), "one byte is left");
        com1.read(DATA, &mut byte);
        assert_eq!(&byte, b"i");
        assert_eq!(drained.take(), Some(1));
    }

    #[test]
    fn a_full_fifo_takes_what_fits() {
        let (mut com1, _, _) = port(Vec::new());
        let taken = com1.input(&[b'x'; 1000]);
        assert!(taken > 0 && taken < 1000);
        assert_eq!(com1.input(b"y"), 0);
    }

    #[test]
    fn a_writer_that_fails_costs_bytes_not_the_machine() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (mut com1, _, _) = port(Closed);
        com1.write(DATA, b"a");
        com1.write(DATA, b"b");
        assert_eq!(com1.lost().load(Ordering::Relaxed), 2);
    }
}
