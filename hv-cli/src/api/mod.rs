//! The API of a running machine: JSON over HTTP/1.1 on a unix socket, `hv run --api-socket`.
//!
//! `api/openapi.json` of this crate describes it, and a test keeps the two the same. What a call does to
//! the machine is behind [`Control`]; this module knows HTTP and nothing of KVM.
//!
//! # The machine is never affected by who connects
//!
//! Parsing is httparse's; the rest is a small server of our own, so that all that a client can make it
//! spend is bounded, by [`Limits`]: connections, each a thread; bytes of a request; the time it takes to
//! come and to be answered. A connection is one request, and none is served by a thread the machine
//! needs. Beside the mode of the socket's file, each peer is asked who it is (`SO_PEERCRED`): the user of
//! this process or root.
//!
//! # A new call
//!
//! It is a method of [`Control`], a line in `routes`, and its description. A body is given to calls that say
//! they take one; the others are refused one.

mod control;
mod error;
mod http;
mod limits;
mod routes;
mod server;

pub use control::{
    Balloon, BalloonRequest, Control, Descriptor, General, Info, PowerButton, Registers, Segment,
    Segments, State, StateReply, System,
};
pub use error::{ApiError, ErrorBody, ErrorReply};
pub use limits::Limits;
pub use routes::{Method, ROUTES, Route};
pub use server::Server;

#[cfg(test)]
mod openapi;
#[cfg(test)]
pub(crate) mod tests;
