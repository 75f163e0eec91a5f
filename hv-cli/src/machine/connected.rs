//! The virtio devices that are connected to other parts of the machine.

use std::sync::Arc;

use hv_memory::GuestRam;

use super::devices::{DevicesError, Named};
use crate::config::{ConsoleChoice, RunConfig};
use crate::console::GuestInput;
use crate::event::Event;
use crate::virtio::{
    BALLOON_PAGE, Balloon, BalloonTarget, ConsoleDevice, ConsoleInput, ConsoleOutput,
};

/// The devices, and what others need to reach them.
pub(super) struct Connected {
    pub(super) devices: Vec<Named>,
    /// Where what is typed goes, if not to the serial port.
    pub(super) input: Option<Arc<dyn GuestInput>>,
    pub(super) balloon: Option<BalloonTarget>,
}

/// Makes the devices that `config` asks for. `drained` is signalled when the guest has taken input.
///
/// # Errors
/// A balloon larger than memory, or the process has no descriptor left.
pub(super) fn open(
    config: &RunConfig,
    drained: &Event,
    ram: &Arc<GuestRam>,
) -> Result<Connected, DevicesError> {
    let mut connected = Connected { devices: Vec::new(), input: None, balloon: None };
    if config.virtio.console == ConsoleChoice::Hvc0 {
        let input = ConsoleInput::new(drained.clone())?;
        let output = ConsoleOutput::new(rustix::stdio::stdout())?;
        let device = ConsoleDevice::new(input.clone(), output)?;
        connected.devices.push(("console0".to_owned(), Box::new(device)));
        connected.input = Some(Arc::new(input));
    }
    if let Some(asked) = config.virtio.balloon {
        let memory = config.memory;
        if asked > memory {
            return Err(DevicesError::Balloon { asked, memory });
        }
        let pages = u32::try_from(asked.0 / BALLOON_PAGE).unwrap_or(u32::MAX);
        let device = Balloon::new(ram.clone(), pages)?;
        connected.balloon = Some(device.target());
        connected.devices.push(("balloon0".to_owned(), Box::new(device)));
    }
    Ok(connected)
}
