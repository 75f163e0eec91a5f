//! The server's threads: one that accepts, and one for each connection.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

use super::control::Control;
use super::error::ApiError;
use super::http::{self, Answer, NoRequest};
use super::limits::Limits;
use super::routes::dispatch;
use crate::isolation::{Kind, Sandbox};
use crate::machine::stop::Stopper;
use crate::socket::UnixSocket;

/// A thread that serves clients until the machine stops.
pub struct Server(JoinHandle<()>);

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(
        socket: UnixSocket,
        control: Arc<dyn Control>,
        stopper: Stopper,
        limits: Limits,
    ) -> io::Result<Self> {
        let sandbox = Sandbox::new(Kind::Control, &[])?.removing([socket.path().to_owned()]);
        let serve = move || {
            sandbox.enter_or_end();
            serve(&socket, &*control, &stopper, &limits);
        };
        thread::Builder::new().name("api".to_owned()).spawn(serve).map(Self)
    }

    /// Waits until it has ended, which it does when the machine has stopped and those who asked before
    /// have their answers.
    pub fn join(self) {
        // It has no result, and what it served is stopped.
        let _ = self.0.join();
    }
}

/// A connection that is counted as long as this lives.
struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(socket: &UnixSocket, control: &dyn Control, stopper: &Stopper, limits: &Limits) {
    let open = AtomicUsize::new(0);
    thread::scope(|scope| {
        while !stopper.is_stopped() {
            let mut fds =
                [PollFd::new(socket, PollFlags::IN), PollFd::new(stopper.event(), PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                // Interrupted, or short of memory.
                thread::yield_now();
                continue;
            }
            let stream = match socket.accept() {
                Ok(stream) => stream,
                Err(_) => {
                    pause(stopper);
                    continue;
                }
            };
            if let Err(error) = admit(&stream, &open, limits) {
                // Nothing was sent before, so there is room for it.
                Answer::new(Err::<(), _>(&error), true).send(&stream, Duration::ZERO);
                continue;
            }
            open.fetch_add(1, Ordering::Relaxed);
            let counted = Counted(&open);
            let connection = move || {
                let _counted = counted;
                connection(&stream, control, stopper, limits);
            };
            // Without a thread for it, the connection is closed.
            let _ = thread::Builder::new()
                .name("api-client".to_owned())
                .spawn_scoped(scope, connection);
        }
    });
}

/// Waits a little, or until the machine stops: one that is there may still not be accepted, for want of
/// descriptors.
fn pause(stopper: &Stopper) {
    let a_little = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let _ = poll(&mut [PollFd::new(stopper.event(), PollFlags::IN)], Some(&a_little));
}

/// Whether a client is one to talk to, now.
fn admit(stream: &UnixStream, open: &AtomicUsize, limits: &Limits) -> Result<(), ApiError> {
    // One that can't be told is nobody.
    let peer = socket_peercred(stream).map_or(u32::MAX, |peer| peer.uid.as_raw());
    if !is_allowed(peer, geteuid().as_raw()) {
        return Err(ApiError::Forbidden(peer));
    }
    if open.load(Ordering::Relaxed) >= limits.connections {
        return Err(ApiError::Connections(limits.connections));
    }
    Ok(())
}

fn is_allowed(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

/// Serves a client: one request.
fn connection(stream: &UnixStream, control: &dyn Control, stopper: &Stopper, limits: &Limits) {
    let (result, with_body) = match http::read(stream, stopper, limits) {
        Ok(request) => {
            // A bug that a request finds is its own.
            let result = catch_unwind(AssertUnwindSafe(|| dispatch(&request, control)));
            (result.unwrap_or(Err(ApiError::Internal)), request.method != "HEAD")
        }
        Err(NoRequest::Error(error)) => (Err(error), true),
        Err(NoRequest::Gone) => return,
    };
    Answer::new(result.as_ref(), with_body).send(stream, limits.transfer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_user_and_root_are_let_in() {
        assert!(is_allowed(0, 0) && is_allowed(0, 1000) && is_allowed(1000, 1000));
        assert!(!is_allowed(1000, 0) && !is_allowed(1000, 1001) && !is_allowed(u32::MAX, 1000));
    }
}
