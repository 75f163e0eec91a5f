//! What a client may cost.

use std::time::Duration;

/// Bounds of what clients can make the server spend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at the same time, each with a thread; others are told to come again.
    pub connections: usize,
    /// Bytes of a request line and its headers.
    pub head: usize,
    /// Bytes of a body.
    pub body: usize,
    /// For a request to come, from the connection to its last byte, and again for its answer to go.
    pub transfer: Duration,
}

/// How many headers a request may have.
pub(super) const HEADERS: usize = 32;

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 8, head: 8 << 10, body: 4 << 10, transfer: Duration::from_secs(5) }
    }
}
