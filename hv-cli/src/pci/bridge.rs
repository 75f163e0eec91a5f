//! The host bridge at 00:00.0: there for those who look for it.

use super::{ConfigSpace, Identity, PciFunction};

/// A host bridge without registers of its own.
pub struct HostBridge(ConfigSpace);

/// The PCI ID of a bridge that no driver wants to fix (Red Hat's generic PCIe host bridge).
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_00_00, subsystem: (0, 0) };

impl HostBridge {
    /// The bridge.
    #[must_use]
    pub fn new() -> Self {
        Self(ConfigSpace::new(&IDENTITY))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
}
