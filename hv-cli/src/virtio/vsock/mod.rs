//! The socket device (virtio 1.2, 5.10): streams between ports of the guest and unix sockets of the host.
//!
//! All of it is done in the device's thread, without waiting: a connection whose host does not read, or
//! whose guest has no room, waits by itself. What is kept is bounded: the connections, what each holds,
//! and the answers to packets that belong to none, for which the guest's next packets wait.

mod connection;
mod host;
mod packet;

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use zerocopy::IntoBytes;

use crate::event::Event;
use crate::isolation::SystemCall;

use super::{Chain, DeviceConfig, DeviceError, Interest, Ready, Session, VirtioDevice};
use connection::{BUFFER, Connection, Ports, Violation};
pub use host::VsockError;
use host::{Greeting, Host, Said};
use packet::{HEADER, HOST_CID, Header, STREAM, op};

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u32 = 0;

/// Queues: packets for the guest and from it, and events, of which there are none.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 128;

/// The most connections.
const CONNECTIONS: usize = 256;
/// The most who have connected and not said whereto; the next takes the place of the oldest.
const GREETINGS: usize = 16;
/// How many resets may wait for the guest to make room before its packets are left alone.
const RESETS: usize = 128;
/// The most that are accepted in one call.
const ACCEPTS: usize = 16;

/// The token of the listening socket. The others are those of connections and greetings.
const LISTENER: u32 = 0;

/// Ports of the host, for connections that it asks for: from here on, as many.
const FIRST_PORT: u32 = 1 << 30;

/// A socket device.
pub struct Vsock {
    cid: u32,
    host: Host,
    config: DeviceConfig,
    connections: BTreeMap<u32, Connection>,
    tokens: BTreeMap<Ports, u32>,
    greetings: BTreeMap<u32, Greeting>,
    last_token: u32,
    next_port: u32,
    /// Tokens of connections that may have a packet for the guest, each once.
    ready: VecDeque<u32>,
    /// Resets of what is no connection.
    resets: VecDeque<Header>,
    /// Whether the listening socket is watched: not while there is no descriptor for who connects.
    listening: bool,
    /// A descriptor that can be given up.
    spare: Option<Event>,
    buffer: Box<[u8; BUFFER as usize]>,
}

impl Vsock {
    /// A device of the guest with this CID, which is reached by a unix socket at `path`.
    ///
    /// # Errors
    /// There can't be a socket there.
    pub fn new(cid: u32, path: &Path) -> Result<Self, VsockError> {
        Ok(Self {
            cid,
            host: Host::bind(path)?,
            config: DeviceConfig::new(u64::from(cid).to_le_bytes()),
            connections: BTreeMap::new(),
            tokens: BTreeMap::new(),
            greetings: BTreeMap::new(),
            last_token: LISTENER,
            next_port: FIRST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            listening: false,
            spare: Event::new().ok(),
            buffer: Box::new([0; BUFFER as usize]),
        })
    }

    /// Takes the guest's packets and gives it those for it, as far as both are possible.
    fn work(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        loop {
            while self.resets.len() < RESETS
                && let Some(request) = session.queue(TRANSMIT)?.pop()?
            {
                self.take(session, &request)?;
                session.queue(TRANSMIT)?.push(request, 0)?;
            }
            let waited = self.resets.len() >= RESETS;
            self.give(session)?;
            if !waited || self.resets.len() >= RESETS {
                return Ok(());
            }
        }
    }

    /// Takes a packet of the guest.
    fn take(&mut self, session: &mut Session, request: &Chain) -> Result<(), DeviceError> {
        if request.readable_len() < HEADER {
            session.count_error();
            return Ok(());
        }
        let header = Header::read(request)?;
        if header.src_cid.get() != u64::from(self.cid) {
            // Nobody to answer.
            session.count_error();
            return Ok(());
        }
        if header.dst_cid.get() != HOST_CID || header.kind.get() != STREAM {
            session.count_error();
            self.refuse(&header);
            return Ok(());
        }
        let ports = Ports { host: header.dst_port.get(), guest: header.src_port.get() };
        let token = self.tokens.get(&ports).copied();
        match (header.op.get(), token) {
            (op::REQUEST, None) => self.guest_connects(session, ports, &header)?,
            (op::RST, Some(token)) => self.remove(session, token)?,
            (op::RST, None) => {}
            (_, None) => {
                session.count_error();
                self.refuse(&header);
            }
            (_, Some(token)) => {
                if self.take_of(token, &header, request)?.is_err() {
                    session.count_error();
                    self.remove(session, token)?;
                    self.refuse(&header);
                } else {
                    self.settle(session, token)?;
                }
            }
        }
        Ok(())
    }

    /// Takes a packet that belongs to a connection.
    fn take_of(
        &mut self,
        token: u32,
        header: &Header,
        request: &Chain,
    ) -> Result<Result<(), Violation>, DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else { return Ok(Ok(())) };
        if connection.credit(header).is_err() {
            return Ok(Err(Violation));
        }
        Ok(match header.op.get() {
            op::RESPONSE => connection.accept(),
            op::SHUTDOWN => connection.shut_down(header.flags.get()),
            op::RW => {
                let there = request.readable_len().saturating_sub(HEADER);
                let len = header.len.get();
                match self.buffer.get_mut(..len as usize).filter(|_| len <= there) {
                    Some(data) => {
                        request.read_at(HEADER, data)?;
                        connection.data(data)
                    }
                    None => Err(Violation),
                }
            }
            op::CREDIT_UPDATE => Ok(()),
            op::CREDIT_REQUEST => {
                connection.credit_requested();
                Ok(())
            }
            _ => Err(Violation),
        })
    }

    /// Answers a packet by a reset.
    fn refuse(&mut self, header: &Header) {
        if header.op.get() != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// The guest wants to reach a socket of the host.
    fn guest_connects(
        &mut self,
        session: &Session,
        ports: Ports,
        header: &Header,
    ) -> Result<(), DeviceError> {
        let room = self.connections.len() < CONNECTIONS;
        match self.host.connect(ports.host) {
            Ok(stream) if room => {
                self.add(session, Connection::accepted(ports, stream, header))?;
            }
            _ => {
                session.count_error();
                self.refuse(header);
            }
        }
        Ok(())
    }

    /// Somebody wants to reach the guest.
    fn host_connects(
        &mut self,
        session: &Session,
        port: u32,
        stream: UnixStream,
    ) -> Result<(), DeviceError> {
        if self.connections.len() >= CONNECTIONS {
            session.count_error();
            return Ok(());
        }
        let ports = loop {
            let ports = Ports { host: self.next_port, guest: port };
            self.next_port = FIRST_PORT | self.next_port.wrapping_add(1) & (FIRST_PORT - 1);
            if !self.tokens.contains_key(&ports) {
                break ports;
            }
        };
        self.add(session, Connection::requested(ports, stream))
    }

    fn add(&mut self, session: &Session, mut connection: Connection) -> Result<(), DeviceError> {
        let token = self.token();
        let interest = connection.interest();
        session.watch(&connection, token, interest)?;
        connection.watched = Some(interest);
        self.tokens.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.settle(session, token)
    }

    /// A token that is not in use, and was not for a long time.
    fn token(&mut self) -> u32 {
        loop {
            self.last_token = self.last_token.wrapping_add(1);
            let token = self.last_token;
            let used = self.connections.contains_key(&token) || self.greetings.contains_key(&token);
            if token != LISTENER && !used {
                return token;
            }
        }
    }

    /// Forgets a connection.
    fn remove(&mut self, session: &Session, token: u32) -> Result<(), DeviceError> {
        if let Some(connection) = self.connections.remove(&token) {
            self.tokens.remove(&connection.ports);
            self.ready.retain(|ready| *ready != token);
        }
        self.listen(session)
    }

    /// Forgets a connection, of which the guest is told if it knows it.
    fn reset_connection(&mut self, session: &Session, token: u32) -> Result<(), DeviceError> {
        if let Some(connection) = self.connections.get(&token)
            && !connection.is_unknown()
        {
            self.resets.push_back(self.header(connection.ports, op::RST));
        }
        self.remove(session, token)
    }

    /// After anything happened to a connection: what comes of it.
    fn settle(&mut self, session: &Session, token: u32) -> Result<(), DeviceError> {
        let Some(connection) = self.connections.get_mut(&token) else { return Ok(()) };
        if connection.is_over() {
            return self.reset_connection(session, token);
        }
        if !connection.queued && connection.has_packet() {
            connection.queued = true;
            self.ready.push_back(token);
        }
        let interest = connection.interest();
        if connection.watched.is_some_and(|watched| watched != interest) {
            session.rewatch(&*connection, token, interest)?;
            connection.watched = Some(interest);
        }
        Ok(())
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: u64::from(self.cid).into(),
            src_port: ports.host.into(),
            dst_port: ports.guest.into(),
            len: 0.into(),
            kind: STREAM.into(),
            op: op.into(),
            flags: 0.into(),
            buf_alloc: 0.into(),
            fwd_cnt: 0.into(),
        }
    }

    /// Gives the guest the packets there are for it, as long as it has buffers for them.
    fn give(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        while !self.resets.is_empty() || !self.ready.is_empty() {
            let Some(request) = session.queue(RECEIVE)?.pop()? else { break };
            let room = request.writable_len().saturating_sub(HEADER);
            if room == 0 {
                session.count_error();
                session.queue(RECEIVE)?.push(request, 0)?;
                continue;
            }
            let Some(header) = self.next(session, room)? else {
                session.queue(RECEIVE)?.unpop(request);
                break;
            };
            request.write_at(0, header.as_bytes())?;
            let len = header.len.get();
            request.write_at(HEADER, self.buffer.get(..len as usize).unwrap_or_default())?;
            session.queue(RECEIVE)?.push(request, HEADER.saturating_add(len))?;
        }
        Ok(())
    }

    /// The next packet for the guest, with at most `room` bytes of data in `self.buffer`.
    fn next(&mut self, session: &Session, room: u32) -> Result<Option<Header>, DeviceError> {
        if let Some(reset) = self.resets.pop_front() {
            return Ok(Some(reset));
        }
        while let Some(token) = self.ready.pop_front() {
            let room = room.min(BUFFER) as usize;
            let buffer = self.buffer.get_mut(..room).unwrap_or_default();
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.queued = false;
            let Some(packet) = connection.packet(buffer) else {
                self.settle(session, token)?;
                continue;
            };
            let ports = connection.ports;
            let mut header = self.header(ports, packet.op);
            (header.flags, header.len) = (packet.flags.into(), packet.len.into());
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.stamp(&mut header);
            }
            self.settle(session, token)?;
            return Ok(Some(header));
        }
        Ok(None)
    }

    /// Watches the listening socket, if it is not.
    fn listen(&mut self, session: &Session) -> Result<(), DeviceError> {
        if !self.listening {
            session.watch(&self.host, LISTENER, Interest::READ)?;
            self.listening = true;
        }
        Ok(())
    }

    /// Lets in who wants to connect.
    fn accept(&mut self, session: &Session) -> Result<(), DeviceError> {
        for _ in 0..ACCEPTS {
            let stream = match self.host.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    // No descriptor. The spare one makes room to refuse who waits; without one, listening goes
                    // on when something else has gone.
                    session.count_error();
                    let refused = self.spare.take().is_some() && self.host.accept().is_ok();
                    self.spare = Event::new().ok();
                    if refused {
                        continue;
                    }
                    session.unwatch(&self.host)?;
                    self.listening = false;
                    break;
                }
            };
            if self.greetings.len() >= GREETINGS {
                self.greetings.pop_first();
            }
            let token = self.token();
            if session.watch(&stream, token, Interest::READ).is_err() {
                // The host watches as much as it may: this one is refused.
                session.count_error();
                continue;
            }
            self.greetings.insert(token, Greeting::new(stream));
        }
        Ok(())
    }

    /// Somebody who has connected says whereto.
    fn greeted(&mut self, session: &Session, token: u32) -> Result<(), DeviceError> {
        let said = self.greetings.get_mut(&token).map_or(Said::Nothing, Greeting::read);
        if said == Said::Nothing {
            return Ok(());
        }
        let Some(greeting) = self.greetings.remove(&token) else { return Ok(()) };
        match said {
            Said::Port(port) => {
                session.unwatch(&greeting.stream)?;
                self.host_connects(session, port, greeting.stream)
            }
            _ => {
                session.count_error();
                drop(greeting);
                self.listen(session)
            }
        }
    }

    /// The socket of a connection is ready.
    fn socket_ready(&mut self, session: &Session, ready: Ready) -> Result<(), DeviceError> {
        let token = ready.token;
        let Some(connection) = self.connections.get_mut(&token) else { return Ok(()) };
        if ready.write {
            connection.flush();
        }
        if ready.read {
            connection.is_readable();
        }
        if ready.hangup {
            // It would be told again and again.
            session.unwatch(&*connection)?;
            connection.watched = None;
            if !connection.hung_up() {
                return self.reset_connection(session, token);
            }
        }
        self.settle(session, token)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << F_STREAM
    }

    fn system_calls(&self) -> &'static [SystemCall] {
        const CALLS: &[SystemCall] = &[
            SystemCall::with(libc::SYS_socket, 0, libc::AF_UNIX as u64),
            SystemCall::new(libc::SYS_connect),
            SystemCall::new(libc::SYS_accept4),
            SystemCall::new(libc::SYS_recvfrom),
            SystemCall::new(libc::SYS_sendto),
            SystemCall::new(libc::SYS_shutdown),
            SystemCall::new(libc::SYS_getsockopt),
            SystemCall::new(libc::SYS_statx),
            SystemCall::new(libc::SYS_newfstatat),
            SystemCall::new(libc::SYS_unlink),
            SystemCall::ioctl(libc::FIONBIO),
        ];
        CALLS
    }

    fn removes(&self) -> Vec<PathBuf> {
        vec![self.host.path().to_owned()]
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn config(&self) -> DeviceConfig {
        self.config.clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        self.listen(session)
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RECEIVE | TRANSMIT => self.work(session),
            _ => Ok(()),
        }
    }

    fn host_ready(&mut self, session: &mut Session, ready: Ready) -> Result<(), DeviceError> {
        match ready.token {
            LISTENER => self.accept(session)?,
            token if self.greetings.contains_key(&token) => self.greeted(session, token)?,
            _ => self.socket_ready(session, ready)?,
        }
        self.work(session)
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.greetings.clear();
        self.ready.clear();
        self.resets.clear();
        self.listening = false;
    }
}
