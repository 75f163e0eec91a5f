//! One connection: a socket of the host and a port of the guest, with the credit of both.
//!
//! What the guest sends waits here until its socket takes it, never more than [`BUFFER`] bytes; what the
//! host sends waits in its socket until the guest has room.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND, op};
use crate::virtio::Interest;

/// Bytes the guest may send before they are taken: what it is told as `buf_alloc`.
pub(super) const BUFFER: u32 = 64 << 10;

/// The ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A packet for the guest, without what all of a connection have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// The guest broke a rule: the connection is to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    stream: UnixStream,
    /// Whether both sides have agreed to it.
    open: bool,
    /// Whether the guest is to be told of it first: by a request or a response.
    hello: Option<u16>,
    /// What the guest sent and the socket has not taken.
    to_host: VecDeque<u8>,
    /// Bytes the guest has sent, those of them that were taken, and those it was told of.
    received: u32,
    forwarded: u32,
    told: u32,
    tell_credit: bool,
    /// Bytes the guest was sent, those it has taken, and what it has room for.
    sent: u32,
    guest_forwarded: u32,
    guest_room: u32,
    ask_credit: bool,
    asked_credit: bool,
    /// What the guest will not do any more, as flags of a shutdown.
    guest_ended: u32,
    /// What the host will not do any more, and what the guest knows of that.
    host_ended: u32,
    told_ended: u32,
    /// Whether the socket has something to read.
    readable: bool,
    /// Whether its token is in the list of those that have something for the guest.
    pub(super) queued: bool,
    /// What the socket is watched for, if it is.
    pub(super) watched: Option<Interest>,
}

impl Connection {
    /// One that the host asks for: the guest is to be told by a request.
    pub(super) fn requested(ports: Ports, stream: UnixStream) -> Self {
        Self {
            ports,
            stream,
            open: false,
            hello: Some(op::REQUEST),
            to_host: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            tell_credit: false,
            sent: 0,
            guest_forwarded: 0,
            guest_room: 0,
            ask_credit: false,
            asked_credit: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            readable: false,
            queued: false,
            watched: None,
        }
    }

    /// One that the guest asked for with `header`, and gets.
    pub(super) fn accepted(ports: Ports, stream: UnixStream, header: &Header) -> Self {
        let mut this = Self::requested(ports, stream);
        (this.open, this.hello) = (true, Some(op::RESPONSE));
        this.guest_room = header.buf_alloc.get();
        this
    }

    /// Whether the guest has not heard of it yet.
    pub(super) fn is_unknown(&self) -> bool {
        self.hello == Some(op::REQUEST)
    }

    /// The guest accepts a connection the host asked for.
    pub(super) fn accept(&mut self) -> Result<(), Violation> {
        if self.open || self.hello.is_some() {
            return Err(Violation);
        }
        self.open = true;
        // It is the first that is written, so there is room; or its peer has gone.
        let line = format!("OK {}\n", self.ports.host);
        match self.stream.write(line.as_bytes()) {
            Ok(n) if n == line.len() => Ok(()),
            _ => Err(Violation),
        }
    }

    /// The guest tells how much it has taken, and what it has room for.
    pub(super) fn credit(&mut self, header: &Header) -> Result<(), Violation> {
        // More than it was sent it can't have taken. Less than before is one packet overtaking another.
        if self.sent.wrapping_sub(header.fwd_cnt.get()) > u32::MAX / 2 {
            return Err(Violation);
        }
        (self.guest_forwarded, self.guest_room) = (header.fwd_cnt.get(), header.buf_alloc.get());
        if self.room() > 0 {
            (self.ask_credit, self.asked_credit) = (false, false);
        }
        Ok(())
    }

    /// Bytes the guest has room for.
    fn room(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The guest wants to know what there is room for.
    pub(super) fn credit_requested(&mut self) {
        self.tell_credit = true;
    }

    /// The guest sends data.
    pub(super) fn data(&mut self, data: &[u8]) -> Result<(), Violation> {
        let len = data.len() as u32;
        let waiting = self.received.wrapping_sub(self.forwarded);
        let fits = waiting.checked_add(len).is_some_and(|all| all <= BUFFER);
        if !self.open || self.guest_ended & NO_SEND != 0 || !fits {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        self.to_host.extend(data);
        self.flush();
        Ok(())
    }

    /// The guest will not receive or not send any more.
    pub(super) fn shut_down(&mut self, flags: u32) -> Result<(), Violation> {
        if !self.open {
            return Err(Violation);
        }
        self.guest_ended |= flags & (NO_RECEIVE | NO_SEND);
        if flags & NO_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
        Ok(())
    }

    /// Whether the guest is done with it, and the host has all that it sent.
    pub(super) fn is_over(&self) -> bool {
        self.guest_ended == NO_RECEIVE | NO_SEND && self.to_host.is_empty()
    }

    /// Writes to the socket what it takes.
    pub(super) fn flush(&mut self) {
        while self.host_ended & NO_RECEIVE == 0 && !self.to_host.is_empty() {
            match self.stream.write(self.to_host.as_slices().0) {
                Ok(n) => {
                    self.to_host.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_ended |= NO_RECEIVE,
            }
        }
        if self.host_ended & NO_RECEIVE != 0 {
            // Nobody will take it.
            self.to_host = VecDeque::new();
            self.forwarded = self.received;
        }
        if self.to_host.is_empty() && self.guest_ended & NO_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        // Not for every few bytes, but before the guest has to wait.
        self.tell_credit |= self.forwarded.wrapping_sub(self.told) >= BUFFER / 4;
    }

    /// The socket has something to read, be it the end.
    pub(super) fn is_readable(&mut self) {
        self.readable = true;
    }

    /// Both directions of the socket have ended. What is in it can still be read. Returns whether there
    /// is something left of the connection.
    pub(super) fn hung_up(&mut self) -> bool {
        self.readable = true;
        self.host_ended |= NO_RECEIVE;
        self.flush();
        self.open
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let ended = self.open && self.told_ended != self.host_ended;
        self.hello.is_some() || self.tell_credit || self.ask_credit || ended || self.may_read()
    }

    fn may_read(&self) -> bool {
        let ended = self.host_ended & NO_SEND != 0 || self.guest_ended & NO_RECEIVE != 0;
        self.open && self.readable && !ended && (self.room() > 0 || !self.asked_credit)
    }

    /// The next packet for the guest, with its data in `buffer`, which has a place for some.
    pub(super) fn packet(&mut self, buffer: &mut [u8]) -> Option<Packet> {
        let control = |op, flags| Some(Packet { op, flags, len: 0 });
        if let Some(op) = self.hello.take() {
            return control(op, 0);
        }
        if self.may_read() {
            if self.room() == 0 {
                self.ask_credit = true;
            } else if let Some(len) = self.read(buffer) {
                return Some(Packet { op: op::RW, flags: 0, len });
            }
        }
        // What is still to be read comes before the end of it.
        if self.open && self.told_ended != self.host_ended {
            self.told_ended = self.host_ended;
            return control(op::SHUTDOWN, self.host_ended);
        }
        if std::mem::take(&mut self.ask_credit) {
            self.asked_credit = true;
            return control(op::CREDIT_REQUEST, 0);
        }
        std::mem::take(&mut self.tell_credit).then_some(Packet {
            op: op::CREDIT_UPDATE,
            flags: 0,
            len: 0,
        })
    }

    fn read(&mut self, buffer: &mut [u8]) -> Option<u32> {
        let most = buffer.len().min(self.room() as usize);
        match self.stream.read(buffer.get_mut(..most).unwrap_or_default()) {
            Ok(n) if n > 0 => {
                self.sent = self.sent.wrapping_add(n as u32);
                return Some(n as u32);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            _ => self.host_ended |= NO_SEND,
        }
        None
    }

    /// Completes the header of a packet for the guest.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER.into();
        header.fwd_cnt = self.forwarded.into();
        (self.told, self.tell_credit) = (self.forwarded, false);
    }

    /// What the socket is to be watched for.
    pub(super) fn interest(&self) -> Interest {
        let ended = self.host_ended & NO_SEND != 0 || self.guest_ended & NO_RECEIVE != 0;
        Interest { read: self.open && !self.readable && !ended, write: !self.to_host.is_empty() }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
