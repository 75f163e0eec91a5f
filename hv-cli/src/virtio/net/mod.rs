//! The network device (virtio 1.2, 5.1): frames between the driver and a tap interface, a socket or passt.
//!
//! A frame is read and written by the kernel where it is in guest memory; it is copied once, by the
//! kernel. A frame that can't be sent or received is dropped and counted, as networks do. When the other side
//! is gone for good (the tap interface was removed, passt ended), the link is down.
//!
//! It must not read a port for which the driver has no buffers: what waits there, waits in the kernel.

mod control;
mod open;
mod passt;
mod port;
mod receive;
mod sys;
#[cfg(test)]
mod tests;

use hv_core::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::isolation::SystemCall;

use super::{DeviceConfig, DeviceError, Interest, Ready, Session, VirtioDevice};
pub use open::NetError;
pub use passt::{Passt, PasstError};
use port::{Kind, Port, Sent};
use receive::{Next, Receiver};
use sys::Iovecs;

/// Bytes before a frame in a request (`struct virtio_net_hdr_v1`).
const HEADER: usize = 12;

/// The longest frame: the most that can be sent as one to be cut (virtio 1.2, 5.1.6.3.1).
const MOST_FRAME: usize = 65550;

/// A frame nobody cuts or puts together: Ethernet's 1500 bytes, its header and a VLAN tag. There are longer
/// ones, for which more buffers are gathered when they are there.
const ORDINARY_FRAME: usize = 1518;

/// Descriptors of the queues.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;

/// `struct virtio_net_config` up to `max_virtqueue_pairs`: the address is followed by the status.
const CONFIG_LEN: usize = 10;
const STATUS: usize = 6;
const MOST_PAIRS: usize = 8;

/// The features with which the driver takes frames that are longer than the network's.
const LONG_FRAMES: [u32; 5] = [
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
];

/// A network device.
pub struct Net {
    // Before passt, which then has nobody left to talk to.
    pairs: Vec<Pair>,
    /// What the ports can do, as feature bits.
    offloads: u64,
    config: DeviceConfig,
    /// The control queue of this session.
    control: Option<usize>,
    passt: Option<Passt>,
}

/// A pair of queues, one to receive and one to transmit, and what they are connected to.
struct Pair {
    port: Port,
    receiver: Receiver,
    iovecs: Iovecs,
    /// The driver uses it, and the other side is there.
    used: bool,
    gone: bool,
    /// It is not read before the driver gives buffers.
    starved: bool,
    /// It can't be written to before the other side has room.
    blocked: bool,
    watched: Option<Interest>,
}

impl Pair {
    fn new(port: Port) -> Self {
        Self {
            port,
            receiver: Receiver::new(),
            iovecs: Iovecs::default(),
            used: false,
            gone: false,
            starved: false,
            blocked: false,
            watched: None,
        }
    }

    /// Has it watched for what is waited for.
    fn watch(&mut self, session: &Session, index: usize) -> Result<(), DeviceError> {
        let interest = Interest { read: !self.starved, write: self.blocked };
        let wanted = (self.used && !self.gone).then_some(interest);
        let (fd, token) = (&self.port.fd, index as u32);
        match (self.watched, wanted) {
            (None, Some(interest)) => session.watch(fd, token, interest)?,
            (Some(_), None) => session.unwatch(fd)?,
            (Some(now), Some(interest)) if now != interest => {
                session.rewatch(fd, token, interest)?
            }
            _ => {}
        }
        self.watched = wanted;
        Ok(())
    }

    /// Sends what the driver has. A frame that is dropped is counted before its request is completed.
    fn transmit(&mut self, session: &mut Session, index: usize) -> Result<(), DeviceError> {
        let queue = 2 * index + 1;
        self.blocked = false;
        while let Some(chain) = session.queue(queue)?.pop()? {
            let sent = if self.used && !self.gone {
                self.port.send(&chain, &mut self.iovecs)?
            } else {
                Sent::No
            };
            match sent {
                Sent::Yes => {}
                Sent::No => session.count_error(),
                Sent::Later => {
                    let queue = session.queue(queue)?;
                    queue.unpop(chain);
                    queue.silence()?;
                    self.blocked = true;
                    break;
                }
                Sent::Gone => {
                    session.count_error();
                    self.gone = true;
                }
            }
            session.queue(queue)?.push(chain, 0)?;
        }
        if self.used && !self.gone {
            match self.port.flush() {
                Sent::Later => self.blocked = true,
                Sent::Gone => self.gone = true,
                Sent::Yes | Sent::No => {}
            }
        }
        Ok(())
    }

    /// Receives what there is. Returns how many frames were dropped.
    fn receive(&mut self, session: &mut Session, index: usize) -> Result<u64, DeviceError> {
        let Self { port, receiver, iovecs, .. } = self;
        let mut dropped = 0;
        let next = receiver.receive(session.queue(2 * index)?, port, iovecs, &mut dropped)?;
        self.starved = next == Next::Starved;
        self.gone |= next == Next::Gone;
        Ok(dropped)
    }

    /// The descriptor has an error or a hang-up. Returns how many frames were lost.
    fn hangup(&mut self) -> u64 {
        match self.port.kind {
            Kind::Tap => self.gone = true,
            // An error is told once, here.
            Kind::Frames => match rustix::net::sockopt::socket_error(&self.port.fd) {
                Ok(Err(_)) => return 1,
                _ => self.gone = true,
            },
            // What was sent before is still to be read, if there are buffers for it.
            Kind::Stream(_) => self.gone |= self.starved,
        }
        0
    }
}

impl Net {
    fn new(ports: Vec<Port>, offloads: u64, mac: [u8; 6], passt: Option<Passt>) -> Self {
        let mut bytes = [0; CONFIG_LEN];
        let pairs = (ports.len() as u16).to_le_bytes();
        for (start, part) in [(0, &mac[..]), (STATUS, &link(true)), (MOST_PAIRS, &pairs)] {
            for (to, from) in bytes.iter_mut().skip(start).zip(part) {
                *to = *from;
            }
        }
        Self {
            pairs: ports.into_iter().map(Pair::new).collect(),
            offloads,
            config: DeviceConfig::new(bytes),
            control: None,
            passt,
        }
    }

    /// The passt that was started for it, which ends when it is dropped. The device's thread may not end
    /// a program; this is for who lives longer.
    pub fn take_passt(&mut self) -> Option<Passt> {
        self.passt.take()
    }

    /// After anything was done with a pair: frames that were dropped are counted, the descriptor is
    /// watched for what is waited for, and the driver is told when the other side has gone.
    fn after(
        &mut self,
        session: &mut Session,
        index: usize,
        dropped: u64,
    ) -> Result<(), DeviceError> {
        (0..dropped).for_each(|_| session.count_error());
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        pair.watch(session, index)?;
        let mut status = [0; 2];
        self.config.get(STATUS, &mut status);
        if pair.gone && status == link(true) {
            if session.has_feature(VIRTIO_NET_F_STATUS) {
                session.change_config(STATUS, &link(false));
            } else {
                self.config.set(STATUS, &link(false));
            }
        }
        Ok(())
    }

    /// Uses the first pairs. Without a driver that has more queues, the first is the only one.
    fn use_pairs(&mut self, session: &mut Session, count: usize) -> Result<bool, DeviceError> {
        let several = self.pairs.len() > 1;
        let mut done = true;
        for index in 0..self.pairs.len() {
            let Some(pair) = self.pairs.get_mut(index) else { break };
            pair.used = index < count;
            // A queue the interface does not use has errors only: it is not watched any more.
            if !pair.used {
                pair.watch(session, index)?;
            }
            if several && pair.port.has_header() && !pair.gone {
                match sys::set_queue(&pair.port.fd, pair.used) {
                    // It is as it should be already.
                    Ok(()) | Err(Errno::EINVAL) => {}
                    Err(_) => done = false,
                }
            }
            self.after(session, index, 0)?;
        }
        Ok(done)
    }

    fn commands(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(command) = session.queue(queue)?.pop()? {
            let most =
                if session.has_feature(VIRTIO_NET_F_MQ) { self.pairs.len() as u16 } else { 0 };
            let done = match control::pairs(&command, most)? {
                Some(count) => self.use_pairs(session, count.into())?,
                None => false,
            };
            if !done {
                session.count_error();
            }
            let written = control::acknowledge(&command, done)?;
            session.queue(queue)?.push(command, written)?;
        }
        Ok(())
    }

    fn receive(&mut self, session: &mut Session, index: usize) -> Result<(), DeviceError> {
        match self.pairs.get_mut(index) {
            Some(pair) if pair.used && !pair.gone => {
                let dropped = pair.receive(session, index)?;
                self.after(session, index, dropped)
            }
            _ => Ok(()),
        }
    }

    fn transmit(&mut self, session: &mut Session, index: usize) -> Result<(), DeviceError> {
        let Some(pair) = self.pairs.get_mut(index) else { return Ok(()) };
        pair.transmit(session, index)?;
        self.after(session, index, 0)
    }
}

/// The status field.
fn link(up: bool) -> [u8; 2] {
    (if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 }).to_le_bytes()
}

/// Features as bits.
fn bits(features: &[u32]) -> u64 {
    features.iter().fold(0, |bits, feature| bits | 1 << feature)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let several = bits(&[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ]);
        let always = bits(&[VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF]);
        always | self.offloads | if self.pairs.len() > 1 { several } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.pairs.len()];
        if self.pairs.len() > 1 {
            sizes.push(CONTROL_SIZE);
        }
        sizes
    }

    fn system_calls(&self) -> &'static [SystemCall] {
        const CALLS: &[SystemCall] = &[
            SystemCall::new(libc::SYS_readv),
            SystemCall::new(libc::SYS_getsockopt),
            SystemCall::ioctl(libc::TUNSETOFFLOAD),
            SystemCall::ioctl(libc::TUNSETQUEUE),
        ];
        CALLS
    }

    fn config(&self) -> DeviceConfig {
        self.config.clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        // The control queue follows those there are, which without MQ are two (5.1.2).
        let pairs = if session.has_feature(VIRTIO_NET_F_MQ) { self.pairs.len() } else { 1 };
        self.control = session.has_feature(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs);
        let mergeable = session.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let long = LONG_FRAMES.iter().any(|feature| session.has_feature(*feature));
        let frame = if long { MOST_FRAME } else { ORDINARY_FRAME };
        for pair in &mut self.pairs {
            pair.receiver.begin(mergeable, HEADER + frame);
            (pair.starved, pair.blocked, pair.watched) = (false, false, None);
        }
        self.use_pairs(session, 1)?;
        // What the interface leaves to who reads is the same for all of its queues.
        let taken = open::offload_flags(session);
        if let Some(pair) = self.pairs.first_mut()
            && pair.port.has_header()
            && let Err(errno) = sys::set_offload(&pair.port.fd, taken)
        {
            if port::failed(errno) != Sent::Gone {
                return Err(DeviceError::Host { what: "TUNSETOFFLOAD", errno });
            }
            pair.gone = true;
            self.after(session, 0, 0)?;
        }
        Ok(())
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        if self.control == Some(queue) {
            return self.commands(session, queue);
        }
        match (queue / 2, queue % 2) {
            (index, 0) => match self.pairs.get(index) {
                // Otherwise the buffers are for the next frame.
                Some(pair) if pair.starved => self.receive(session, index),
                _ => Ok(()),
            },
            (index, _) => self.transmit(session, index),
        }
    }

    fn host_ready(&mut self, session: &mut Session, ready: Ready) -> Result<(), DeviceError> {
        let index = ready.token as usize;
        if ready.hangup
            && let Some(pair) = self.pairs.get_mut(index)
        {
            let dropped = pair.hangup();
            self.after(session, index, dropped)?;
        }
        if ready.read {
            self.receive(session, index)?;
        }
        if ready.write { self.transmit(session, index) } else { Ok(()) }
    }

    fn reset(&mut self) {
        for pair in &mut self.pairs {
            pair.receiver.reset();
            pair.port.reset();
            (pair.used, pair.watched) = (false, None);
        }
    }
}
