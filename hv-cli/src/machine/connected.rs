//! The virtio devices that are connected to other parts of the machine.

use std::io;
use std::sync::Arc;

use super::devices::Named;
use crate::config::{ConsoleChoice, VirtioConfig};
use crate::console::GuestInput;
use crate::event::Event;
use crate::virtio::{ConsoleDevice, ConsoleInput, ConsoleOutput};

/// The devices, and what others need to reach them.
pub(super) struct Connected {
    pub(super) devices: Vec<Named>,
    /// Where what is typed goes, if not to the serial port.
    pub(super) input: Option<Arc<dyn GuestInput>>,
}

/// Makes the devices that `config` asks for. `drained` is signalled when the guest has taken input.
///
/// # Errors
/// The process has no descriptor left.
pub(super) fn open(config: &VirtioConfig, drained: &Event) -> io::Result<Connected> {
    let mut connected = Connected { devices: Vec::new(), input: None };
    if config.console == ConsoleChoice::Hvc0 {
        let input = ConsoleInput::new(drained.clone())?;
        let output = ConsoleOutput::new(rustix::stdio::stdout())?;
        let device = ConsoleDevice::new(input.clone(), output)?;
        connected.devices.push(("console0".to_owned(), Box::new(device)));
        connected.input = Some(Arc::new(input));
    }
    Ok(connected)
}
