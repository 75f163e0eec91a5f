//! virtio 1.2 devices: what each has in common, and each in a file of its own.
//!
//! - [`VirtioDevice`] is what a device implements. It knows its queues and what it drives; it does not
//!   know PCI, KVM or the guest's interrupt controllers.
//! - [`Session`] is the time between the driver's `DRIVER_OK` and the next reset: the queues, guest
//!   memory and interrupts a device has then. Nothing of it outlives a reset, because a device only
//!   borrows it.
//! - [`Virtqueue`] and [`Chain`] are the rings (virtio-queue does the ring work). What a driver puts
//!   there is checked before a device sees it.
//! - [`DeviceConfig`] is the device configuration space, [`Counters`] what is counted.
//!
//! # Threads
//!
//! Each device has one thread, which owns it: [`VirtioDevice`] needs no lock, and a device that waits
//! for its disk keeps back no other device and no vCPU. One event loop for all devices would need fewer
//! threads, but a single blocking call would stop them all, and not every file of a host can be used
//! without blocking. The thread sleeps in epoll(7) and is woken by the doorbells of the queues
//! (ioeventfds), by the descriptors the device watches, and by the transport.
//!
//! The vCPUs touch the registers of the transport and, under its own short lock, the
//! [`DeviceConfig`]; they never wait for the thread of a device. So a reset is not over when the driver
//! has written it, but when the device's thread has let go of the queues: until then the device status
//! does not read 0, which is what drivers wait for (virtio 1.2, 4.1.4.3.1 and 2.1.2).
//!
//! At the end of the machine, after its vCPUs, each thread is told to stop and joined. A device must
//! therefore not block without bound in any of its methods.

mod balloon;
mod blk;
mod config;
mod console;
mod counters;
mod device;
mod direct;
mod interrupts;
mod net;
mod poller;
mod queue;
mod rng;
mod session;
mod transport;
mod vsock;
mod worker;

pub use balloon::{BALLOON_PAGE, Balloon, BalloonTarget};
pub use blk::{Blk, DiskError};
pub use config::DeviceConfig;
pub use console::{ConsoleDevice, ConsoleInput, ConsoleOutput};
pub use counters::{CounterValues, Counters};
pub use device::{DeviceError, VirtioDevice};
pub use direct::{Direct, RingSetup};
pub use interrupts::DeviceInterrupts;
pub use net::{Net, NetError, Passt, PasstError};
pub use poller::{Interest, Ready};
use queue::Slice;
pub use queue::{Buffer, Chain, ChainError, QueueError, Virtqueue};
pub use rng::Rng;
pub use session::Session;
pub use transport::{Platform, VirtioError, VirtioPci, registers};
pub use vsock::{Vsock, VsockError};

use std::sync::Arc;

use hv_memory::RamMemory;

/// Guest memory as devices share it.
pub type Memory = Arc<RamMemory>;
