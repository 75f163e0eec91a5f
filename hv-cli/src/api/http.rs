//! One request and its answer on a connection, with a bound on everything.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::error::ApiError;
use super::limits::{HEADERS, Limits};
use super::routes::Method;
use crate::machine::stop::Stopper;

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

/// Why there is no request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRequest {
    /// The client is told.
    Error(ApiError),
    /// The client has gone, or the machine has stopped: nobody is told.
    Gone,
}

impl From<ApiError> for NoRequest {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

/// What the head of a request says.
struct Head {
    len: usize,
    body: usize,
    method: String,
    path: String,
}

/// Reads a request, for as long and as far as the limits let it.
pub(super) fn read(
    stream: &UnixStream,
    stopper: &Stopper,
    limits: &Limits,
) -> Result<Request, NoRequest> {
    let deadline = Instant::now() + limits.transfer;
    let mut bytes = Vec::new();
    let mut head = None;
    loop {
        if head.is_none() {
            head = parse(&bytes, limits)?;
        }
        if let Some(Head { len, body, .. }) = &head
            && bytes.len() >= len + body
        {
            break;
        }
        if !wait(stream, PollFlags::IN, deadline, Some(stopper)) {
            let stopped = stopper.is_stopped();
            return Err(if stopped {
                NoRequest::Gone
            } else {
                ApiError::Timeout(limits.transfer).into()
            });
        }
        let mut chunk = [0; 1024];
        match (&*stream).read(&mut chunk) {
            Ok(0) if bytes.is_empty() => return Err(NoRequest::Gone),
            Ok(0) => return Err(ApiError::Malformed("it ends in its middle".into()).into()),
            Ok(n) => bytes.extend(chunk.iter().take(n)),
            Err(error) if is_transient(&error) => {}
            Err(_) => return Err(NoRequest::Gone),
        }
    }
    let Some(Head { len, body, method, path }) = head else { return Err(NoRequest::Gone) };
    let body = bytes.get(len..len + body).unwrap_or_default().to_vec();
    Ok(Request { method, path, body })
}

/// The head, once it is whole.
fn parse(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, ApiError> {
    let too_large = || ApiError::Head { bytes: limits.head, headers: HEADERS };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let len = match request.parse(bytes.get(..limits.head).unwrap_or(bytes)) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() >= limits.head => return Err(too_large()),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(too_large()),
        Err(httparse::Error::Version) => return Err(ApiError::Version),
        Err(error) => return Err(ApiError::Malformed(error.to_string().into())),
    };
    let (Some(method), Some(path)) = (request.method, request.path) else {
        return Err(ApiError::Malformed("it has no request line".into()));
    };
    let mut body = None;
    for header in request.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(ApiError::TransferEncoding);
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            let len = content_length(header.value)?;
            if body.replace(len).is_some_and(|other| other != len) {
                return Err(ApiError::Malformed("it has two Content-Lengths".into()));
            }
        }
    }
    let body = match body.unwrap_or(0) {
        long if long > limits.body as u64 => {
            return Err(ApiError::Body { limit: limits.body, len: long });
        }
        len => len as usize,
    };
    Ok(Some(Head { len, body, method: method.to_owned(), path: path.to_owned() }))
}

/// Digits and nothing else. More than fit in 64 bits are as many as do.
fn content_length(value: &[u8]) -> Result<u64, ApiError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(ApiError::Malformed("its Content-Length is no number".into()));
    }
    let add = |n: u64, digit: &u8| n.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    Ok(value.iter().fold(0, add))
}

/// An answer.
pub(super) struct Answer {
    bytes: Vec<u8>,
}

impl Answer {
    /// A result, or an error.
    pub(super) fn new(result: Result<impl Serialize, &ApiError>, with_body: bool) -> Self {
        let (status, json, allowed) = match result {
            Ok(body) => (200, serde_json::to_vec(&body), &[][..]),
            Err(error) => {
                let allowed = match error {
                    ApiError::Method { allowed, .. } => allowed.as_slice(),
                    _ => &[],
                };
                (error.kind().0, serde_json::to_vec(&error.reply()), allowed)
            }
        };
        // All that is sent is made of numbers, texts and maps with texts as keys.
        let mut json = json.unwrap_or_default();
        json.push(b'\n');
        let mut head = format!(
            "HTTP/1.1 {status} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n",
            reason(status),
            json.len()
        );
        if !allowed.is_empty() {
            let allowed: Vec<_> = allowed.iter().map(Method::to_string).collect();
            head.push_str(&format!("Allow: {}\r\n", allowed.join(", ")));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if with_body {
            bytes.extend(json);
        }
        Self { bytes }
    }

    /// Sends it, as far as the client reads in time.
    pub(super) fn send(&self, stream: &UnixStream, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut left = self.bytes.as_slice();
        while !left.is_empty() {
            match (&*stream).write(left) {
                Ok(n) => left = left.get(n..).unwrap_or_default(),
                Err(error) if is_transient(&error) => {
                    if !wait(stream, PollFlags::OUT, deadline, None) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Whether the stream became ready before the deadline and the stop.
fn wait(stream: impl AsFd, flags: PollFlags, deadline: Instant, stopper: Option<&Stopper>) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stopper.is_some_and(Stopper::is_stopped) {
            return false;
        }
        let timeout = Timespec::try_from(left).ok();
        let result = match stopper {
            Some(stopper) => {
                let stop = PollFd::new(stopper.event(), PollFlags::IN);
                let mut fds = [PollFd::new(&stream, flags), stop];
                poll(&mut fds, timeout.as_ref()).map(|_| !fds[0].revents().is_empty())
            }
            None => {
                let mut fds = [PollFd::new(&stream, flags)];
                poll(&mut fds, timeout.as_ref()).map(|_| !fds[0].revents().is_empty())
            }
        };
        match result {
            Ok(true) => return true,
            Ok(false) => {}
            // Interrupted, or short of memory.
            Err(_) => std::thread::yield_now(),
        }
    }
}
