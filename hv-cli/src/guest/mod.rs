//! The guest built into `hv`: code that checks from inside what a machine must do, and the device
//! it checks it with.
//!
//! The guest only acts and observes. What it reports, and what the host saw of the same, is judged
//! here, so that a check passes only if both sides agree. A check that can't be made on a machine
//! is reported as such by name, never left out.
//!
//! A machine that runs it needs: the image ([`load`]) and its [`BootState`]; the devices of
//! [`Checks`] on both buses and on COM1; a read-only slot at [`ROM`] with [`rom_contents`]; a GSI
//! routed to [`irqfd_msi`] with an irqfd; an ioeventfd for 4-byte writes of [`DOORBELL_VALUE`] to
//! [`DOORBELL`]; and a watch that stops it after [`DEADLINE`].

mod check;
mod device;
mod evidence;
mod image;
mod judge;
mod protocol;
mod report;
#[cfg(test)]
mod tests;

pub use check::Facts;
pub use device::{Checks, Com1Tap, Host, irqfd_msi, rom_contents};
pub use protocol::{DOORBELL, DOORBELL_VALUE, MMIO, MMIO_LEN, PORTS, PORTS_LEN, ROM};
pub use report::{CheckResult, Report, Status};

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::loader::{BootState, CpuMode, Protocol};
use image::{BASE, ENTRY, GDT, PAGE_TABLES, image};

/// A guest that has not ended after this long hangs. It takes milliseconds; what does not happen
/// costs it up to a few seconds a check.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The guest memory can't hold the built-in guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the built-in guest needs RAM up to {end:#x}; give the guest more memory")]
pub struct NoRam {
    /// End of the RAM it needs.
    pub end: u64,
}

/// Copies the guest into `memory` and says how its boot CPU starts.
///
/// # Errors
/// There is no RAM where it belongs.
pub fn load<M: GuestMemoryBackend>(memory: &M) -> Result<BootState, NoRam> {
    let end = BASE + image().len() as u64;
    memory.write_slice(image(), GuestAddress(BASE)).map_err(|_| NoRam { end })?;
    Ok(BootState {
        // It looks at no register, and is otherwise what a Linux kernel expects.
        protocol: Protocol::Linux64,
        mode: CpuMode::Long { gdt: BASE + GDT, page_tables: BASE + PAGE_TABLES },
        entry: BASE + ENTRY,
        info: 0,
        kernel: BASE..end,
        initrd: None,
    })
}
