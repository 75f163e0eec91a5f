//! From a port to the driver: frames are read into the buffers the driver has given.
//!
//! Buffers are taken before there is a frame for them, because nobody says beforehand how long a frame
//! of a tap interface is. Those a frame did not need are for the next. What does not fit is read into a
//! buffer of our own: with `VIRTIO_NET_F_MRG_RXBUF` it is copied to further buffers of the driver when
//! there are any, otherwise the frame is dropped. While there is no buffer at all, nothing is read.

use std::collections::VecDeque;

use hv_core::Errno;

use super::port::{Kind, Port, STREAM_HEADER, Stream, again};
use super::sys::{Iovecs, Part};
use super::{HEADER, MOST_FRAME};
use crate::virtio::{Chain, QueueError, Virtqueue};

/// Frames that are received before something else has its turn.
const MOST_AT_ONCE: usize = 64;

/// The driver's buffers are gathered up to here, in descriptors. With the next chain they are fewer than
/// a system call takes, even if each is in two regions of memory.
const MOST_BUFFERS: usize = 256;

/// What is to happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// When the port is ready, there is more.
    Wait,
    /// The driver has to give buffers first.
    Starved,
    /// Nothing, ever: the other side is gone.
    Gone,
}

/// The driver's buffers for one pair of queues.
pub(super) struct Receiver {
    stock: VecDeque<Chain>,
    /// Bytes in all of them.
    room: usize,
    /// Their descriptors.
    buffers: usize,
    /// A frame may be in several of them.
    mergeable: bool,
    /// How much room there should be before a frame is read whose length nobody knows.
    wanted: usize,
    /// What has no room in them.
    over: Box<[u8]>,
    pending: Option<Pending>,
}

/// A frame of which a part is in [`Receiver::over`].
struct Pending {
    /// Its bytes, with the header.
    total: usize,
    /// Those that are in the driver's buffers.
    inside: usize,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            stock: VecDeque::new(),
            room: 0,
            buffers: 0,
            mergeable: false,
            wanted: 0,
            // One byte more than a frame, so that a longer one is known for it.
            over: vec![0; HEADER + MOST_FRAME + 1].into(),
            pending: None,
        }
    }

    /// A driver begins, which takes frames of this length with the header.
    pub(super) fn begin(&mut self, mergeable: bool, wanted: usize) {
        self.reset();
        (self.mergeable, self.wanted) = (mergeable, wanted);
    }

    /// Lets go of the driver's buffers.
    pub(super) fn reset(&mut self) {
        self.stock.clear();
        (self.room, self.buffers, self.pending) = (0, 0, None);
    }

    /// Receives what there is. Frames that are dropped, and buffers that are none, are added to `lost`.
    pub(super) fn receive(
        &mut self,
        queue: &mut Virtqueue,
        port: &mut Port,
        iovecs: &mut Iovecs,
        lost: &mut u64,
    ) -> Result<Next, QueueError> {
        for _ in 0..MOST_AT_ONCE {
            let Port { fd, kind } = &mut *port;
            let next = match kind {
                Kind::Tap => self.frame(queue, fd, 0, iovecs, lost)?,
                Kind::Frames => self.frame(queue, fd, HEADER, iovecs, lost)?,
                Kind::Stream(stream) => self.stream(queue, fd, stream, iovecs, lost)?,
            };
            if let Some(next) = next {
                return Ok(next);
            }
        }
        Ok(Next::Wait)
    }

    /// Receives one frame; the first `made` bytes of its header don't come with it.
    fn frame(
        &mut self,
        queue: &mut Virtqueue,
        fd: &std::os::fd::OwnedFd,
        made: usize,
        iovecs: &mut Iovecs,
        lost: &mut u64,
    ) -> Result<Option<Next>, QueueError> {
        if let Some(Pending { total, inside }) = self.pending {
            self.stock_up(queue, total, lost)?;
            if self.room < total && !self.is_full(queue) {
                return Ok(Some(Next::Starved));
            }
            self.pending = None;
            if self.room < total {
                // The driver's buffers are too small for it, however many they are.
                *lost += 1;
                return Ok(None);
            }
            self.copy_over(inside, total - inside)?;
            self.complete(queue, total, made)?;
            return Ok(None);
        }
        self.stock_up(queue, self.wanted, lost)?;
        if self.stock.is_empty() {
            return Ok(Some(Next::Starved));
        }
        let Self { stock, over, .. } = self;
        let read = match again(|| iovecs.read(fd, || parts(stock, made), over)) {
            Ok(read) => read,
            Err(Errno::EAGAIN) => return Ok(Some(Next::Wait)),
            Err(errno) if is_passing(errno) => {
                *lost += 1;
                return Ok(None);
            }
            Err(_) => return Ok(Some(Next::Gone)),
        };
        let total = made + read;
        let possible = HEADER + 1..=HEADER + MOST_FRAME;
        if possible.contains(&total) && total <= self.room {
            self.complete(queue, total, made)?;
        } else if possible.contains(&total) && self.mergeable {
            self.pending = Some(Pending { total, inside: self.room });
        } else {
            *lost += 1;
        }
        Ok(None)
    }

    /// Receives one frame of a stream, or a part of it.
    fn stream(
        &mut self,
        queue: &mut Virtqueue,
        fd: &std::os::fd::OwnedFd,
        stream: &mut Stream,
        iovecs: &mut Iovecs,
        lost: &mut u64,
    ) -> Result<Option<Next>, QueueError> {
        let mut next = [0; STREAM_HEADER];
        let Some(len) = stream.frame() else {
            let missing = stream.length.get_mut(stream.length_read..).unwrap_or_default();
            return Ok(match again(|| iovecs.read(fd, std::iter::empty, missing)) {
                Err(Errno::EAGAIN) => Some(Next::Wait),
                Ok(0) | Err(_) => Some(Next::Gone),
                Ok(read) => {
                    stream.length_read += read;
                    None
                }
            });
        };
        if len > MOST_FRAME {
            // That is no length: where a frame starts, nobody knows any more.
            *lost += 1;
            return Ok(Some(Next::Gone));
        }
        let left = len.saturating_sub(stream.frame_read);
        let total = HEADER + len;
        if !stream.discard {
            self.stock_up(queue, total, lost)?;
            if self.stock.is_empty() {
                return Ok(Some(Next::Starved));
            }
            if self.room < total && self.mergeable && !self.is_full(queue) {
                return Ok(Some(Next::Starved));
            }
            if self.room < total || len == 0 {
                stream.discard = true;
                *lost += 1;
            }
        }
        let Self { stock, over, .. } = &mut *self;
        let start = HEADER + stream.frame_read;
        let read = if left == 0 {
            Ok(0)
        } else if stream.discard {
            let rest = over.get_mut(..left).unwrap_or_default();
            again(|| iovecs.read(fd, std::iter::empty, rest))
        } else {
            again(|| iovecs.read(fd, || first(parts(stock, start), left), &mut next))
        };
        let read = match read {
            Err(Errno::EAGAIN) => return Ok(Some(Next::Wait)),
            Ok(0) if left > 0 => return Ok(Some(Next::Gone)),
            Err(_) => return Ok(Some(Next::Gone)),
            Ok(read) => read,
        };
        stream.frame_read += read.min(left);
        if stream.frame_read == len {
            if !stream.discard {
                self.complete(queue, total, HEADER)?;
            }
            (stream.length, stream.length_read) = (next, read.saturating_sub(left));
            (stream.frame_read, stream.discard) = (0, false);
        }
        Ok(None)
    }

    /// Takes buffers of the driver until there is room for this, if it has given as many.
    fn stock_up(
        &mut self,
        queue: &mut Virtqueue,
        wanted: usize,
        lost: &mut u64,
    ) -> Result<(), QueueError> {
        while !self.is_full(queue) && self.room < wanted {
            let Some(chain) = queue.pop()? else { break };
            if (chain.writable_len() as usize) < HEADER {
                // Not even a header fits (virtio 1.2, 5.1.6.3.1).
                *lost += 1;
                queue.push(chain, 0)?;
                continue;
            }
            self.room += chain.writable_len() as usize;
            self.buffers += chain.writable().len();
            self.stock.push_back(chain);
        }
        Ok(())
    }

    /// Whether no more buffers are to be had.
    fn is_full(&self, queue: &Virtqueue) -> bool {
        let most = if self.mergeable { queue.size().into() } else { 1 };
        self.stock.len() >= most || self.buffers >= MOST_BUFFERS
    }

    /// Copies what had no room to where it belongs.
    fn copy_over(&self, inside: usize, len: usize) -> Result<(), QueueError> {
        let mut rest = self.over.get(..len).unwrap_or_default();
        let mut skip = inside;
        for chain in &self.stock {
            let skipped = skip.min(chain.writable_len() as usize);
            skip -= skipped;
            let room = chain.writable_len() as usize - skipped;
            let (here, later) = rest.split_at(room.min(rest.len()));
            chain.write_at(skipped as u32, here)?;
            rest = later;
        }
        Ok(())
    }

    /// Gives the driver a packet of `total` bytes, header included, of which `made` bytes are to be made.
    fn complete(
        &mut self,
        queue: &mut Virtqueue,
        total: usize,
        made: usize,
    ) -> Result<(), QueueError> {
        let (mut count, mut covered) = (0, 0);
        for chain in &self.stock {
            if covered >= total {
                break;
            }
            covered += chain.writable_len() as usize;
            self.buffers -= chain.writable().len();
            count += 1;
        }
        self.room -= covered;
        if let Some(first) = self.stock.front() {
            // The last field is num_buffers, which the kernel does not know; the others are 0 for a frame
            // that is as it was sent.
            let mut header = [0; HEADER];
            let [.., low, high] = &mut header;
            [*low, *high] = (count as u16).to_le_bytes();
            let start = if made == 0 { HEADER - 2 } else { 0 };
            first.write_at(start as u32, header.get(start..).unwrap_or_default())?;
        }
        let mut left = total;
        queue.push_together(self.stock.drain(..count).map(|chain| {
            let written = left.min(chain.writable_len() as usize);
            left -= written;
            (chain, written as u32)
        }))
    }
}

/// Whether reading may go better the next time.
fn is_passing(errno: Errno) -> bool {
    // What a socket tells once: its interface is down, or nobody took what was sent.
    let passing = [
        Errno::ENETDOWN,
        Errno::ENETUNREACH,
        Errno::EHOSTUNREACH,
        Errno::ECONNREFUSED,
        Errno::ECONNRESET,
        Errno::EMSGSIZE,
        Errno::ENOBUFS,
        Errno::ENOMEM,
    ];
    passing.contains(&errno)
}

/// The buffers from `offset` on.
fn parts(stock: &VecDeque<Chain>, offset: usize) -> impl Iterator<Item = Part<'_>> {
    let mut skip = offset;
    stock.iter().flat_map(move |chain| {
        let skipped = skip.min(chain.writable_len() as usize);
        skip -= skipped;
        chain.writable_parts(skipped as u32)
    })
}

/// The first `left` bytes of them.
fn first<'m>(
    parts: impl Iterator<Item = Part<'m>>,
    mut left: usize,
) -> impl Iterator<Item = Part<'m>> {
    parts.map_while(move |part| {
        let len = part.len().min(left);
        left -= len;
        if len > 0 { part.subslice(0, len).ok() } else { None }
    })
}
