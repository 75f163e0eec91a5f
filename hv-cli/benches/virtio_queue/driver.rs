//! The driver's side: a ring in memory whose chains are there from the beginning, and what takes the
//! requests from it.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hv_cli::virtio::{DeviceError, Direct, Memory, RingSetup, Session, VirtioDevice};
use hv_memory::RamMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{BATCH, Batch};

const SIZE: u16 = 64;
pub(super) const RAM: usize = 4 << 20;
/// Where buffers may be, a page or more for each request of a batch.
pub(super) const BUFFERS: u64 = 1 << 20;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Guest memory.
pub(super) fn memory() -> Memory {
    Arc::new(RamMemory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
}

/// A ring, whose chain N begins at descriptor 3 N.
pub(super) struct Ring {
    pub(super) memory: Memory,
    at: u64,
    next: u16,
}

impl Ring {
    /// Each chain is one buffer of 4 KiB to write to.
    pub(super) fn new(memory: &Memory, index: u64) -> Self {
        let ring = Self { memory: memory.clone(), at: 0x1000 + 0x4000 * index, next: 0 };
        for n in 0..BATCH {
            ring.descriptor(3 * n, BUFFERS + 4096 * u64::from(n), 4096, WRITE);
        }
        // VRING_AVAIL_F_NO_INTERRUPT
        ring.memory.write_obj(1u16, GuestAddress(ring.setup().available)).unwrap();
        ring
    }

    pub(super) fn setup(&self) -> RingSetup {
        let at = self.at;
        RingSetup { size: SIZE, descriptors: at, available: at + 0x1000, used: at + 0x2000 }
    }

    /// Writes a descriptor; the one it goes on with is the next.
    pub(super) fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16) {
        let at = self.at + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a batch available.
    pub(super) fn offer(&mut self) {
        let available = self.setup().available;
        for n in 0..BATCH {
            let slot = u64::from(self.next.wrapping_add(n) % SIZE);
            self.memory.write_obj(3 * n, GuestAddress(available + 4 + 2 * slot)).unwrap();
        }
        self.next = self.next.wrapping_add(BATCH);
        self.memory.store(self.next, GuestAddress(available + 2), Ordering::Release).unwrap();
    }

    /// Whether all that was made available is used.
    pub(super) fn all_used(&self) -> bool {
        let at = GuestAddress(self.setup().used + 2);
        self.memory.load::<u16>(at, Ordering::Acquire).unwrap() == self.next
    }
}

/// A device, of whose queues one is measured.
pub(super) struct Subject {
    pub(super) direct: Direct,
    pub(super) ring: Ring,
    queue: usize,
}

impl Subject {
    /// One with a queue, after `prepare` has written its chains.
    pub(super) fn new(device: impl VirtioDevice, prepare: impl FnOnce(&Ring)) -> Self {
        Self::with_queue(device, &memory(), 0, 1, prepare)
    }

    /// One with so many queues.
    pub(super) fn with_queue(
        device: impl VirtioDevice,
        memory: &Memory,
        queue: usize,
        queues: usize,
        prepare: impl FnOnce(&Ring),
    ) -> Self {
        let mut rings: Vec<_> = (0..queues).map(|n| Ring::new(memory, n as u64)).collect();
        prepare(&rings[queue]);
        let mut direct = Direct::new(Box::new(device), memory.clone()).unwrap();
        let setups: Vec<_> = rings.iter().map(|ring| Some(ring.setup())).collect();
        direct.activate(FEATURE_VERSION_1, &setups).unwrap();
        Self { direct, ring: rings.swap_remove(queue), queue }
    }

    /// Calls the device until all is used.
    pub(super) fn finish(&mut self) {
        while !self.ring.all_used() {
            self.direct.turn().unwrap();
        }
    }
}

impl Batch for Subject {
    fn process(&mut self) {
        self.ring.offer();
        self.direct.ring(self.queue).unwrap();
        self.finish();
    }
}

/// A device that does nothing with its requests.
pub(super) struct Null;

impl VirtioDevice for Null {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        let queue = session.queue(queue)?;
        while let Some(request) = queue.pop()? {
            let len = request.writable_len();
            queue.push(request, black_box(len))?;
        }
        Ok(())
    }
}

/// virtio-queue's queue, with what a device has to do with it.
pub(super) struct Raw {
    ring: Ring,
    queue: Queue,
}

impl Raw {
    pub(super) fn new() -> Self {
        let memory = memory();
        let ring = Ring::new(&memory, 0);
        let RingSetup { size, descriptors, available, used } = ring.setup();
        let mut queue = Queue::new(size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_ready(true);
        Self { ring, queue }
    }
}

impl Batch for Raw {
    fn process(&mut self) {
        self.ring.offer();
        let (memory, queue) = (&*self.ring.memory, &mut self.queue);
        loop {
            queue.disable_notification(memory).unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(memory) {
                let (head, len) = (chain.head_index(), chain.map(|part| part.len()).sum());
                queue.add_used(memory, head, black_box(len)).unwrap();
            }
            if !queue.enable_notification(memory).unwrap() {
                break;
            }
        }
        black_box(queue.needs_notification(memory).unwrap());
        assert!(self.ring.all_used());
    }
}
