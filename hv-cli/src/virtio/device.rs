//! What a device is to the transport and to its thread.

use std::path::PathBuf;

use hv_core::Errno;

use crate::isolation::SystemCall;

use super::{DeviceConfig, QueueError, Ready, Session};

/// A virtio device.
///
/// It is made with all it needs of the host (files, descriptors) before the machine runs; then a thread
/// owns it and calls it, one call at a time:
///
/// 1. [`activate`](Self::activate) when its driver is ready;
/// 2. [`queue_ready`](Self::queue_ready), [`host_ready`](Self::host_ready) and
///    [`config_written`](Self::config_written) as things happen;
/// 3. [`reset`](Self::reset) when the driver resets it or the machine ends. Then 1, if there is a driver
///    again.
///
/// Every call gets the [`Session`], from which the device takes its queues, and returns soon: it must
/// not wait for the guest, and for the host only what one request takes. An error makes the device ask
/// its driver for a reset (`DEVICE_NEEDS_RESET`): no call but [`reset`](Self::reset) follows. So what
/// only concerns a request (a read error of a disk) is no error here: the request is completed with the
/// status its specification has, and counted with [`Session::count_error`].
///
/// ```
/// use hv_cli::virtio::{DeviceError, Session, VirtioDevice};
///
/// /// Fills every buffer with zeros.
/// struct Zeros;
///
/// impl VirtioDevice for Zeros {
///     fn device_type(&self) -> u32 {
///         virtio_bindings::virtio_ids::VIRTIO_ID_RNG
///     }
///     fn queue_sizes(&self) -> Vec<u16> {
///         vec![64]
///     }
///     fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
///         let queue = session.queue(queue)?;
///         while let Some(request) = queue.pop()? {
///             // The driver says how long a buffer is: what is done at once is bounded.
///             let len = request.writable_len().min(4096);
///             request.write_at(0, &vec![0; len as usize])?;
///             queue.push(request, len)?;
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait VirtioDevice: Send + 'static {
    /// Which device it is (virtio 1.2, section 5; `virtio_bindings::virtio_ids`).
    fn device_type(&self) -> u32;

    /// The features of this device type that it offers, as bits. Those of the transport and the rings
    /// (`VIRTIO_F_VERSION_1`, `VIRTIO_RING_F_INDIRECT_DESC`, `VIRTIO_RING_F_EVENT_IDX`) are added.
    fn features(&self) -> u64 {
        0
    }

    /// The most descriptors of each queue: powers of two, at most 32768. Asked once, before the machine
    /// runs.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The system calls that it makes in its thread, beyond those every thread may make. Asked once, before
    /// the machine runs. One that is missing ends the process when it is made.
    fn system_calls(&self) -> &'static [SystemCall] {
        &[]
    }

    /// The files that it removes in its thread. Asked once, before the machine runs.
    fn removes(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Its configuration space, of which it keeps a clone. Asked once, before the machine runs.
    fn config(&self) -> DeviceConfig {
        DeviceConfig::default()
    }

    /// The driver is ready (`DRIVER_OK`): which features it took, and which queues it enabled, is in the
    /// session. Requests that are there already are told of by [`queue_ready`](Self::queue_ready) next.
    ///
    /// # Errors
    /// The device can't work like that.
    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let _ = session;
        Ok(())
    }

    /// A queue has requests: the driver rang, or there were too many to take in the last call. May be
    /// called without any.
    ///
    /// # Errors
    /// The driver broke a rule, or the host side is of no use any more.
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError>;

    /// A descriptor is ready that the device watches ([`Session::watch`]).
    ///
    /// # Errors
    /// As [`queue_ready`](Self::queue_ready).
    fn host_ready(&mut self, session: &mut Session, ready: Ready) -> Result<(), DeviceError> {
        let _ = (session, ready);
        Ok(())
    }

    /// The driver wrote to the configuration space: what is there now.
    ///
    /// # Errors
    /// As [`queue_ready`](Self::queue_ready).
    fn config_written(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let _ = session;
        Ok(())
    }

    /// The machine ends, and its vCPUs have stopped: what the driver asked for and did not wait for, such
    /// as its last output, can be done now. Called in a session only, and followed by
    /// [`reset`](Self::reset). What takes long is given up.
    ///
    /// # Errors
    /// As [`queue_ready`](Self::queue_ready).
    fn finish(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let _ = session;
        Ok(())
    }

    /// The session ends. When this returns, the device does nothing to guest memory any more: what is
    /// under way was waited for or cancelled, and requests it still has are dropped.
    fn reset(&mut self) {}
}

/// Why a device can't go on without a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke a rule of the queues.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver broke a rule of this device.
    #[error("{0}")]
    Driver(&'static str),
    /// The host refuses what the device can't do without.
    #[error("{what}: {errno}")]
    Host {
        /// What it was to do.
        what: &'static str,
        /// How that failed.
        errno: Errno,
    },
}
