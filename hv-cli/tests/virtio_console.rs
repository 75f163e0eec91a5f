//! The virtio console with a driver over PCI, on the KVM in memory: nothing that was sent is lost, and
//! neither a driver nor an output that does nothing keeps anyone waiting.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, OwnedFd};

use hv_cli::console::GuestInput;
use hv_cli::event::Event;
use hv_cli::virtio::{ConsoleDevice, ConsoleInput, ConsoleOutput};
use hv_core::fake::Finding;
use rustix::pipe::fcntl_setpipe_size;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const TYPED: u64 = 0x8_0000;
const TEXT: u64 = 0x9_0000;

fn never(_: &Finding) -> bool {
    false
}

/// A console on a pipe or a terminal, with what was typed and where it is told that it was taken.
struct Parts {
    input: ConsoleInput,
    drained: Event,
    device: Option<ConsoleDevice>,
}

fn console(output: impl AsFd) -> Parts {
    let drained = Event::new().unwrap();
    let input = ConsoleInput::new(drained.clone()).unwrap();
    let output = ConsoleOutput::new(output.as_fd()).unwrap();
    let device = Some(ConsoleDevice::new(input.clone(), output).unwrap());
    Parts { input, drained, device }
}

fn rings(machine: &Machine) -> [Ring; 2] {
    [0x1_0000, 0x2_0000].map(|at| Ring::new(machine, at, 16))
}

/// Runs `test` with a console on a pipe, its driver and the rings of its two queues.
fn with_console(test: impl FnOnce(&Machine, &Driver<'_>, &[Ring; 2], &Parts, PipeReader)) {
    let machine = Machine::new();
    let (reader, writer) = pipe();
    let mut parts = console(&writer);
    drop(writer);
    let driver = machine.add(parts.device.take().unwrap());
    let rings = rings(&machine);
    driver.start_all(VERSION_1, &[&rings[0], &rings[1]]);
    test(&machine, &driver, &rings, &parts, reader);
    machine.end(never);
}

/// Bytes a pipe here has room for.
const PIPE: usize = 4096;

fn pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    assert_eq!(fcntl_setpipe_size(&writer, PIPE).unwrap(), PIPE);
    (reader, writer)
}

fn read(reader: &mut PipeReader, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    reader.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_sent_is_shown_when_its_request_is_completed() {
    with_console(|machine, driver, [_, transmit], _, mut reader| {
        machine.memory.write_slice(b"hello, world", GuestAddress(TEXT)).unwrap();
        transmit.descriptor(0, TEXT, 7, NEXT, 1);
        transmit.descriptor(1, TEXT + 7, 5, 0, 0);
        transmit.offer(0);
        driver.ring(TRANSMIT);
        transmit.wait_for_used(1);
        assert_eq!(transmit.used_element(0), (0, 0));
        assert_eq!(read(&mut reader, 12), b"hello, world");
        assert_eq!(driver.counters().bytes_from_guest, 12);
    });
}

#[test]
fn what_is_typed_arrives_in_order_however_small_the_buffers_are() {
    with_console(|machine, driver, [receive, _], parts, _reader| {
        assert_eq!(parts.input.offer(b"typed"), 5, "before there is a buffer");
        for head in 0..3 {
            driver.offer(RECEIVE, receive, head, (TYPED + 2 * u64::from(head), 2, WRITE));
        }
        receive.wait_for_used(3);
        assert_eq!(
            (0..3).map(|n| receive.used_element(n)).collect::<Vec<_>>(),
            [(0, 2), (1, 2), (2, 1)]
        );
        assert_eq!(machine.memory_at(TYPED), *b"typed");
        assert!(parts.drained.take().is_some());
        driver.offer(RECEIVE, receive, 3, (TYPED, 16, WRITE));
        assert_eq!(parts.input.offer(b"!"), 1, "while there is one");
        receive.wait_for_used(4);
        assert_eq!(receive.used_element(3), (3, 1));
    });
}

#[test]
fn a_driver_that_never_takes_input_bounds_what_is_kept() {
    with_console(|machine, driver, [receive, transmit], parts, mut reader| {
        let taken: usize = (0..100).map(|_| parts.input.offer(&[b'x'; 1000])).sum();
        assert!((1000..100_000).contains(&taken), "{taken}");
        assert_eq!(parts.input.offer(b"x"), 0);
        // It is shown what it sends, and gets what was kept when it wants it.
        machine.memory.write_slice(b"out", GuestAddress(TEXT)).unwrap();
        driver.offer(TRANSMIT, transmit, 0, (TEXT, 3, 0));
        assert_eq!(read(&mut reader, 3), b"out");
        driver.offer(RECEIVE, receive, 0, (TYPED, 8192, WRITE));
        receive.wait_for_used(1);
        assert_eq!(receive.used_element(0), (0, taken as u32));
    });
}

/// Sends two requests, of which the first is more than a pipe has room for, and waits for what fits.
fn block(driver: &Driver<'_>, transmit: &Ring, reader: &PipeReader) {
    for head in 0..2 {
        driver.offer(TRANSMIT, transmit, head, (TEXT, 8192, 0));
    }
    let there = || rustix::io::ioctl_fionread(reader).unwrap();
    wait_for("a full pipe", || there() == PIPE as u64);
}

#[test]
fn an_output_that_blocks_keeps_its_request_and_nothing_else() {
    with_console(|machine, driver, [receive, transmit], parts, mut reader| {
        machine.memory.write_slice(&[b'a'; 8192], GuestAddress(TEXT)).unwrap();
        block(driver, transmit, &reader);
        driver.offer(RECEIVE, receive, 0, (TYPED, 16, WRITE));
        assert_eq!(parts.input.offer(b"in"), 2);
        receive.wait_for_used(1);
        assert_eq!(transmit.used_index(), 0);
        let all = read(&mut reader, 2 * 8192);
        assert!(all.iter().all(|byte| *byte == b'a'));
        transmit.wait_for_used(2);
        assert_eq!(driver.counters().errors, 0);
    });
}

#[test]
fn a_reset_does_not_wait_for_an_output_that_blocks() {
    with_console(|machine, driver, [receive, transmit], _, mut reader| {
        block(driver, transmit, &reader);
        driver.start_all(VERSION_1, &[receive, transmit]);
        // What the pipe has is of before.
        machine.memory.write_slice(b"END", GuestAddress(TEXT)).unwrap();
        driver.offer(TRANSMIT, transmit, 0, (TEXT, 3, 0));
        let mut last = [0; 3];
        while &last != b"END" {
            last.rotate_left(1);
            reader.read_exact(&mut last[2..]).unwrap();
        }
        transmit.wait_for_used(1);
    });
}

#[test]
fn an_output_that_is_closed_loses_what_is_sent_and_says_so() {
    with_console(|_, driver, [_, transmit], _, reader| {
        drop(reader);
        for head in 0..3 {
            driver.offer(TRANSMIT, transmit, head, (TEXT, 100, 0));
        }
        transmit.wait_for_used(3);
        assert_eq!((driver.counters().errors, driver.counters().needs_reset), (3, 0));
    });
}

#[test]
fn an_output_that_is_closed_while_it_blocks_lets_the_driver_go_on() {
    with_console(|_, driver, [_, transmit], _, reader| {
        block(driver, transmit, &reader);
        drop(reader);
        transmit.wait_for_used(2);
        assert!(driver.counters().errors > 0);
    });
}

#[test]
fn the_last_output_is_not_lost_at_the_end() {
    let machine = Machine::new();
    let (mut reader, writer) = pipe();
    let driver = machine.add(console(&writer).device.take().unwrap());
    drop(writer);
    let [receive, transmit] = rings(&machine);
    driver.start_all(VERSION_1, &[&receive, &transmit]);
    machine.memory.write_slice(b"bye", GuestAddress(TEXT)).unwrap();
    // Without a doorbell: as if the machine had ended before it was heard.
    transmit.descriptor(0, TEXT, 3, 0, 0);
    transmit.offer(0);
    machine.end(never);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"bye");
}

/// A machine that ends while its console has a request that blocks.
fn end_while_blocked(at_the_end: impl FnOnce(PipeReader) + Send + 'static) {
    let machine = Machine::new();
    let (reader, writer) = pipe();
    let driver = machine.add(console(&writer).device.take().unwrap());
    drop(writer);
    let [receive, transmit] = rings(&machine);
    driver.start_all(VERSION_1, &[&receive, &transmit]);
    block(&driver, &transmit, &reader);
    let reading = std::thread::spawn(move || at_the_end(reader));
    machine.end(never);
    reading.join().unwrap();
}

#[test]
fn the_end_waits_for_a_reader() {
    end_while_blocked(|mut reader| {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 2 * 8192);
    });
}

#[test]
fn the_end_does_not_wait_for_a_reader_that_never_reads() {
    // It stays open, so that the machine ends because its time is up.
    end_while_blocked(std::mem::forget);
}

#[test]
fn hostile_requests_are_completed_or_refused() {
    with_console(|_, driver, [receive, transmit], parts, mut reader| {
        // Nothing to read; 15 MiB, which are the same one MiB; a place for nothing.
        driver.offer(TRANSMIT, transmit, 0, (TEXT, 8, WRITE));
        transmit.wait_for_used(1);
        for index in 0..15 {
            let flags = if index == 14 { 0 } else { NEXT };
            transmit.descriptor(index, 0, LOW_RAM as u32, flags, index + 1);
        }
        transmit.offer(0);
        driver.ring(TRANSMIT);
        read(&mut reader, 15 << 20);
        transmit.wait_for_used(2);
        parts.input.offer(b"x");
        driver.offer(RECEIVE, receive, 0, (TYPED, 8, 0));
        receive.wait_for_used(1);
        assert_eq!((receive.used_element(0), driver.counters().errors), ((0, 0), 1));
        driver.offer(RECEIVE, receive, 1, (TYPED, 8, WRITE));
        receive.wait_for_used(2);
        assert_eq!(receive.used_element(1), (1, 1), "it is still there");
        driver.offer(TRANSMIT, transmit, 0, (LOW_RAM, 8, 0));
        driver.wait_for_needs_reset();
    });
}

fn terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let controller = openpt(flags).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
    (controller, terminal)
}

#[test]
fn the_driver_knows_the_size_of_the_terminal_and_hears_of_another() {
    let (_controller, terminal) = terminal();
    let set_size = |columns, rows| {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
    };
    set_size(80, 24);
    let machine = Machine::new();
    let mut parts = console(&terminal);
    let driver = machine.add(parts.device.take().unwrap());
    assert_eq!(driver.features() & 1, 1);
    let [receive, transmit] = rings(&machine);
    driver.start_all(VERSION_1 | 1, &[&receive, &transmit]);
    assert_eq!(driver.device_config(0), [80, 0, 24, 0]);
    let told = driver.isr();
    set_size(132, 43);
    parts.input.resized();
    wait_for("the change", || driver.device_config(0) == [132, 0, 43, 0]);
    wait_for("the interrupt", || (driver.isr() | told) & 2 != 0);
    machine.end(never);
}

#[test]
fn what_is_no_terminal_has_no_size() {
    with_console(|_, driver, _, parts, _reader| {
        assert_eq!(driver.features() & 1, 0);
        parts.input.resized();
        assert_eq!(driver.device_config(0), [0; 4]);
    });
}
