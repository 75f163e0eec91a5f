//! What the fuzz targets do: a hostile guest or file against hv, without a VM and without threads
//! where that is possible.
//!
//! Each module has a `run` that makes everything anew of the bytes it gets, does what they say and
//! asserts what must hold whatever they say; so an input does the same every time. A program is read
//! from its beginning, a byte or a few at a time ([`Input`]), and ends where the bytes end: a seed can
//! be written by hand, and any change to it is another program.

mod devices;
mod hosts;
mod input;
pub mod loader;
pub mod msix;
pub mod pci_config;
mod plain;
pub mod queue;

pub use devices::{DEVICES, Subject};
pub use input::Input;
