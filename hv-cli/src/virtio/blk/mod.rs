//! The block device (virtio 1.2, 5.2): a disk of the guest in a file of the host.
//!
//! Data goes between the file and guest memory without a copy here: readv and writev get the addresses
//! of the guest's buffers. The disk is raw: sector N is at byte 512 N of the file.
//!
//! # What is safe when
//!
//! A flush is an fdatasync(2), begun after every write that was completed before it, and completed when
//! that returns. A driver that can't flush, or has switched the cache to write-through, gets its writes
//! completed when they are safe (`RWF_DSYNC`). Nothing is kept in this process, so what was completed is
//! in the hands of the host's kernel, whatever becomes of the process.
//!
//! The kernel tells of a failed writeback once. So after a flush has failed, all later ones fail: what
//! was written before the first may be lost, and it is never said to be safe.
//!
//! # A file that changes
//!
//! The size of the disk is that of its file at the start. If the file gets shorter, reads beyond its
//! end fail, and writes make it longer again.

mod calls;
mod disk;
mod engine;
mod job;
mod request;
mod ring;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use rustix::fs::fdatasync;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use disk::DiskError;

use super::{Chain, ChainError, DeviceConfig, DeviceError, Interest, Ready, Session, VirtioDevice};
use crate::config::{CacheMode, DiskConfig};
use crate::isolation::SystemCall;
use disk::Disk;
use engine::Engine;
use job::{Durable, Ended, Job};
use request::{Failure, Geometry, MOST_SECTORS, MOST_SEGMENTS, Request, SECTOR};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;

/// Bytes of a serial number.
const ID_BYTES: usize = 20;

/// Bytes of the configuration space, up to what write-zeroes has.
const CONFIG_BYTES: usize = 60;
/// Where in it the driver says whether there is a cache.
const WRITEBACK: usize = 32;

/// A block device.
pub struct Blk {
    engine: Engine,
    geometry: Geometry,
    id: [u8; ID_BYTES],
    cache: CacheMode,
    config: DeviceConfig,
    writes: Writes,
    /// Requests under way, by queue.
    under_way: Vec<u16>,
    /// A flush has failed.
    lost: bool,
}

/// Whether writes are completed only when they are safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writes {
    Cached,
    Durable,
    /// As the configuration space says.
    AsConfigured,
}

impl Blk {
    /// A device with the disk that `config` names, which it locks.
    ///
    /// # Errors
    /// The file can't be used as a disk.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let Disk { file, sectors } = Disk::open(config)?;
        let geometry = Geometry { sectors, read_only: config.read_only };
        let most = u32::from(config.queues) * u32::from(QUEUE_SIZE);
        let engine = Engine::new(file, config.io, most)
            .map_err(|errno| DiskError::NoRing { path: config.path.clone(), errno })?;
        Ok(Self::new(engine, geometry, config))
    }

    fn new(engine: Engine, geometry: Geometry, config: &DiskConfig) -> Self {
        let mut id = [0; ID_BYTES];
        for (byte, serial) in id.iter_mut().zip(config.serial.bytes()) {
            *byte = serial;
        }
        Self {
            engine,
            geometry,
            id,
            cache: config.cache,
            config: config_space(geometry, config),
            writes: Writes::Durable,
            under_way: vec![0; config.queues.into()],
            lost: false,
        }
    }

    /// Begins a request, or completes it if there is nothing to wait for.
    fn begin(
        &mut self,
        session: &mut Session,
        queue: usize,
        chain: Chain,
    ) -> Result<(), DeviceError> {
        let durable = Durable(self.writes_are_durable());
        let job = match Request::parse(&chain, self.geometry) {
            Ok(Request::Read { offset }) => Job::read(chain, queue, offset)?,
            Ok(Request::Write { offset }) => Job::write(chain, queue, offset, durable)?,
            Ok(Request::Flush) => Job::sync(chain, queue),
            Ok(Request::Allocate(all)) => Job::allocate(chain, queue, all, durable),
            Ok(Request::Id) => {
                let room = chain.writable_len().saturating_sub(1).min(ID_BYTES as u32);
                chain.write_at(0, self.id.get(..room as usize).unwrap_or_default())?;
                return complete(session, queue, chain, room, Ok(()));
            }
            Err(failure) => return complete(session, queue, chain, 0, Err(failure)),
        };
        if job.op().is_none() {
            return self.end(session, job.ended(Ok(()), false));
        }
        // A driver has no more than its descriptors, unless it makes one available twice.
        let most = session.queue(queue)?.size();
        match self.under_way.get_mut(queue) {
            Some(n) if *n < most => *n += 1,
            _ => return Err(DeviceError::Driver("more requests are under way than a queue has")),
        }
        self.engine.start(job);
        Ok(())
    }

    fn writes_are_durable(&self) -> bool {
        match self.writes {
            Writes::Cached => false,
            Writes::Durable => true,
            // Not what it was when the driver was last seen to change it: that was after.
            Writes::AsConfigured => !self.has_writeback(),
        }
    }

    fn has_writeback(&self) -> bool {
        let mut writeback = [0];
        self.config.get(WRITEBACK, &mut writeback);
        writeback != [0]
    }

    /// Has everything done that was begun, and completes what is done.
    fn proceed(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        loop {
            self.engine
                .submit()
                .map_err(|errno| DeviceError::Host { what: "io_uring_enter", errno })?;
            let mut again = false;
            while let Some((job, done)) = self.engine.next() {
                match job.advance(done) {
                    // A machine that ends does not wait for what the guest does not know to be done.
                    ControlFlow::Continue(_) if session.is_stopping() => {}
                    ControlFlow::Continue(job) => {
                        self.engine.start(job);
                        again = true;
                    }
                    ControlFlow::Break(ended) => {
                        if let Some(n) = self.under_way.get_mut(ended.queue) {
                            *n = n.saturating_sub(1);
                        }
                        self.end(session, ended)?;
                    }
                }
            }
            if !again {
                return Ok(());
            }
        }
    }

    fn end(&mut self, session: &mut Session, ended: Ended) -> Result<(), DeviceError> {
        let Ended { chain, queue, written, mut result, lost, synced } = ended;
        self.lost |= lost;
        if synced && self.lost {
            result = Err(Failure::Io);
        }
        complete(session, queue, chain, written, result)
    }
}

/// Completes a request of whose data so many bytes were written.
fn complete(
    session: &mut Session,
    queue: usize,
    chain: Chain,
    data: u32,
    result: Result<(), Failure>,
) -> Result<(), DeviceError> {
    let status = match result {
        Ok(()) => VIRTIO_BLK_S_OK as u8,
        Err(failure) => {
            session.count_error();
            failure.status()
        }
    };
    let last = chain.writable_len().saturating_sub(1);
    chain.write_at(last, &[status])?;
    // What is told is how much was written from the beginning on, without a gap.
    let written = if data == last { last + 1 } else { data };
    session.queue(queue)?.push(chain, written)?;
    Ok(())
}

/// The configuration space (virtio 1.2, 5.2.4).
fn config_space(geometry: Geometry, config: &DiskConfig) -> DeviceConfig {
    let mut bytes = vec![0; CONFIG_BYTES];
    let mut put = |offset: usize, value: &[u8]| {
        for (byte, value) in bytes.iter_mut().skip(offset).zip(value) {
            *byte = *value;
        }
    };
    put(0, &geometry.sectors.to_le_bytes());
    // A request has a header and a status besides.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes()); // seg_max
    put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
    put(34, &config.queues.to_le_bytes()); // num_queues
    if !geometry.read_only {
        put(WRITEBACK, &[u8::from(config.cache == CacheMode::Writeback)]);
        for (offset, value) in [
            (36, MOST_SECTORS), // max_discard_sectors
            (40, MOST_SEGMENTS),
            (44, 8),            // discard_sector_alignment: pages, which file systems have
            (48, MOST_SECTORS), // max_write_zeroes_sectors
            (52, MOST_SEGMENTS),
        ] {
            put(offset, &value.to_le_bytes());
        }
        put(56, &[1]); // write_zeroes_may_unmap
    }
    let space = DeviceConfig::new(bytes);
    match config.cache {
        CacheMode::Writeback if !geometry.read_only => space.writable(WRITEBACK..WRITEBACK + 1),
        _ => space,
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.under_way.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.geometry.read_only {
            return features | 1 << VIRTIO_BLK_F_RO;
        }
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        match self.cache {
            CacheMode::Writeback => {
                features | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE
            }
            // Without a cache there is nothing to flush.
            CacheMode::Writethrough => features,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.under_way.len()]
    }

    fn system_calls(&self) -> &'static [SystemCall] {
        self.engine.system_calls()
    }

    fn config(&self) -> DeviceConfig {
        self.config.clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let flushes = session.has_feature(VIRTIO_BLK_F_FLUSH);
        self.writes = match session.has_feature(VIRTIO_BLK_F_CONFIG_WCE) {
            true if flushes => Writes::AsConfigured,
            false if flushes => Writes::Cached,
            _ => Writes::Durable,
        };
        match self.engine.fd() {
            Some(ring) => session.watch(ring, 0, Interest::READ),
            None => Ok(()),
        }
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(chain) = session.queue(queue)?.pop()? {
            if chain.writable_len() == 0 {
                // Without a byte for the status the driver can't be told what it did wrong.
                return Err(chain.error(ChainError::TooShort).into());
            }
            if session.is_stopping() {
                break;
            }
            self.begin(session, queue, chain)?;
        }
        self.proceed(session)
    }

    fn host_ready(&mut self, session: &mut Session, _ready: Ready) -> Result<(), DeviceError> {
        self.proceed(session)
    }

    /// What the driver has written with a cache, it will not flush without.
    fn config_written(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        if self.writes == Writes::AsConfigured
            && !self.has_writeback()
            && fdatasync(self.engine.file()).is_err()
        {
            self.lost = true;
            session.count_error();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.engine.finish();
        self.under_way.fill(0);
        if self.config.len() > WRITEBACK && self.cache == CacheMode::Writeback {
            self.config.set(WRITEBACK, &[u8::from(!self.geometry.read_only)]);
        }
    }
}
