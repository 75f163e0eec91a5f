//! One call over the socket. As the server is not to be trusted either, its answer is bounded.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hv_core::Errno;
use serde_json::Value;

use crate::api::{ErrorReply, Method};
use crate::output::printable;

/// Longer than the server takes for anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer.
const ANSWER: u64 = 4 << 20;

/// Why there is no answer, or one that is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody is there.
    #[error("--socket '{}': {errno}; {}", printable(.path), advice(*.errno))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The answer did not come.
    #[error(
        "--socket '{}': no answer: {errno}; the machine may have ended, or be in trouble",
        printable(.path)
    )]
    Lost {
        /// The socket.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// What came is none.
    #[error("--socket '{}': what answers there is not hv, or the machine ended", printable(.0))]
    NoAnswer(PathBuf),
    /// The machine does not do it.
    #[error("{message} ({code})")]
    Refused {
        /// The HTTP status code.
        status: u16,
        /// What kind of error it is.
        code: String,
        /// What it says.
        message: String,
    },
}

fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT => "is the VM running, with --api-socket and this path?",
        Errno::ECONNREFUSED => "the VM that made it is gone: nobody listens",
        Errno::EACCES | Errno::EPERM => "only the user who runs the VM and root may use it",
        Errno::ENOTSOCK | Errno::EPROTOTYPE => "give the path of hv run --api-socket",
        Errno::EAGAIN => "too many wait for it: try again",
        Errno::ENAMETOOLONG | Errno::EINVAL => "the path of a socket has at most 107 bytes",
        _ => "give the path of hv run --api-socket",
    }
}

/// Makes a call and takes the answer.
///
/// # Errors
/// See [`ClientError`].
pub(super) fn call(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&[u8]>,
) -> Result<Value, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(|error| ClientError::Connect {
        path: socket.to_owned(),
        errno: Errno::from(&error),
    })?;
    let lost = |error: io::Error| ClientError::Lost {
        path: socket.to_owned(),
        errno: Errno::from(&error),
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
    let length = match body {
        Some(body) => format!("Content-Length: {}\r\n", body.len()),
        None => String::new(),
    };
    let head = format!("{method} {path} HTTP/1.1\r\nHost: hv\r\nConnection: close\r\n{length}\r\n");
    let request = [head.as_bytes(), body.unwrap_or_default()].concat();
    // One that is refused before it was read has an answer all the same.
    let sent = stream.write_all(&request);
    let mut bytes = Vec::new();
    match stream.take(ANSWER).read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset || bytes.is_empty() => {
            return Err(lost(error));
        }
        _ => {}
    }
    let Some((status, body)) = parse(&bytes) else {
        sent.map_err(lost)?;
        return Err(ClientError::NoAnswer(socket.to_owned()));
    };
    match serde_json::from_slice(body) {
        Ok(answer) if status == 200 => Ok(answer),
        Ok(error) => match serde_json::from_value::<ErrorReply>(error) {
            Ok(ErrorReply { error }) => {
                let message = printable(Path::new(&error.message));
                let code = printable(Path::new(&error.code));
                Err(ClientError::Refused { status, code, message })
            }
            Err(_) => Err(ClientError::NoAnswer(socket.to_owned())),
        },
        Err(_) => Err(ClientError::NoAnswer(socket.to_owned())),
    }
}

/// The status code and the body of a whole answer.
fn parse(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes).ok()? else { return None };
    let length =
        response.headers.iter().find(|it| it.name.eq_ignore_ascii_case("content-length"))?;
    let length: usize = std::str::from_utf8(length.value).ok()?.parse().ok()?;
    let body = bytes.get(head..)?.get(..length)?;
    Some((response.code?, body))
}
