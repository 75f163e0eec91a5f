//! The device of no kind that uses all a queue offers.

use hv_cli::virtio::{Chain, DeviceConfig, DeviceError, Session, VirtioDevice};

/// A device that does everything a queue can do: copies, looks at buffers where they are, keeps
/// requests, puts them back, changes its configuration.
#[derive(Default)]
pub(crate) struct Plain {
    kept: Vec<Chain>,
    config: DeviceConfig,
}

const MOST_KEPT: usize = 4;
const MOST_BYTES: u32 = 4096;

impl Plain {
    fn copy(chain: &Chain) -> Result<u32, DeviceError> {
        let len = chain.readable_len().min(chain.writable_len()).min(MOST_BYTES);
        let mut data = vec![0; len as usize];
        chain.read_at(0, &mut data)?;
        chain.write_at(0, &data)?;
        Ok(len)
    }

    /// Without a copy, from an offset the request has.
    fn look(chain: &Chain) -> Result<u32, DeviceError> {
        let offset: u32 = chain.read_obj(0)?;
        let len = chain.readable_len().saturating_sub(offset).min(MOST_BYTES);
        let mut sum = 0u8;
        for slice in chain.readable_slices(offset, len as usize)? {
            let mut bytes = vec![0; slice.len()];
            slice.copy_to(&mut bytes);
            sum = bytes.iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
        }
        let len = chain.writable_len().saturating_sub(offset).min(MOST_BYTES);
        for slice in chain.writable_slices(offset, len as usize)? {
            slice.copy_from(&vec![sum; slice.len()]);
        }
        Ok(if len == 0 { 0 } else { offset + len })
    }
}

impl VirtioDevice for Plain {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 64, 16]
    }

    fn config(&self) -> DeviceConfig {
        self.config.clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        self.config = DeviceConfig::new([0; 8]).writable(2..4).writable(4..8);
        session.change_config(0, &[1]);
        Ok(())
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        let kept = &mut self.kept;
        let ring = session.queue(queue)?;
        while let Some(chain) = ring.pop()? {
            match queue {
                0 => {
                    let len = Self::copy(&chain)?;
                    ring.push(chain, len)?;
                }
                1 => {
                    let len = Self::look(&chain)?;
                    ring.push(chain, len)?;
                    ring.signal()?;
                }
                _ if kept.len() < MOST_KEPT => kept.push(chain),
                // As one that waits for the host.
                _ => {
                    ring.unpop(chain);
                    ring.silence()?;
                    while let Some(chain) = kept.pop() {
                        // More than was written is not said.
                        ring.push(chain, u32::MAX)?;
                    }
                    break;
                }
            }
        }
        Ok(())
    }

    fn config_written(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        session.change_config(0, &[2, 3]);
        session.count_error();
        Ok(())
    }

    fn reset(&mut self) {
        self.kept.clear();
    }
}
