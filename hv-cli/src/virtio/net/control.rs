//! The control queue (virtio 1.2, 5.1.6.5): how many pairs of queues the driver uses.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::{Chain, QueueError};

const MQ: [u8; 2] = [VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8];
const LEAST: u16 = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN as u16;

/// How many pairs a command asks for, if it is one that can be done with `most`.
pub(super) fn pairs(command: &Chain, most: u16) -> Result<Option<u16>, QueueError> {
    // Class, command, and a number.
    let mut bytes = [0; 4];
    if command.readable_len() < 4 || command.writable_len() == 0 {
        return Ok(None);
    }
    command.read_at(0, &mut bytes)?;
    let [class, number, low, high] = bytes;
    let pairs = u16::from_le_bytes([low, high]);
    let known = [class, number] == MQ && (LEAST..=most).contains(&pairs);
    Ok(known.then_some(pairs))
}

/// Says whether a command was done. Returns how many bytes that are.
pub(super) fn acknowledge(command: &Chain, done: bool) -> Result<u32, QueueError> {
    let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let len = command.writable_len().min(1);
    command.write_at(0, [ack as u8].get(..len as usize).unwrap_or_default())?;
    Ok(len)
}
