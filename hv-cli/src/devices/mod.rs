//! The devices of a machine, each for itself: a guest touches them through the
//! [`Bus`](crate::machine::bus::Bus), and they reach the world through what they are given.
//!
//! A device knows no hypervisor, no address and no other device.

mod debug_exit;
mod i8042;
mod power;
mod rtc;
mod serial;
mod testdev;

pub use debug_exit::DebugExit;
pub use i8042::I8042;
pub use power::{Button, PowerControl, ResetPort};
pub use rtc::Rtc;
pub use serial::Com1;
pub use testdev::{IrqLines, Latch, PageRemap, Scratch, SetIrq};

/// An interrupt line that is edge-triggered: raising it is all a device can do.
pub trait EdgeIrq: Send + Sync {
    /// Raises it once.
    fn raise(&self);
}
