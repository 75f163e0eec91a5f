//! Why a call was not made, as its client is told.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::routes::Method;
use crate::gdb::HoldError;

/// What is wrong with a request, or why it could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// It is no HTTP request.
    #[error("this is no HTTP/1.1 request: {0}")]
    Malformed(Cow<'static, str>),
    /// It has a body where none is taken.
    #[error("{method} {path} takes no body, and {len} bytes came")]
    UnexpectedBody {
        /// The method.
        method: Method,
        /// The path.
        path: &'static str,
        /// Bytes of the body.
        len: usize,
    },
    /// The body is not what the call takes.
    #[error("{method} {path}: the body is not as described: {error}")]
    BadBody {
        /// The method.
        method: Method,
        /// The path.
        path: &'static str,
        /// What is wrong with it, and where.
        error: String,
    },
    /// There is no balloon.
    #[error("this machine has no memory balloon: run it with --balloon")]
    NoBalloon,
    /// The balloon can't be that large.
    #[error("the guest has {memory} bytes of memory: a balloon can't have {target}")]
    BalloonTooLarge {
        /// What was asked for.
        target: u64,
        /// What there is.
        memory: u64,
    },
    /// The path names a vCPU by what is no number.
    #[error("'{0}' is no vCPU: they are numbers from 0")]
    NotANumber(String),
    /// The peer is another user.
    #[error(
        "user {0} may not use this socket: only the user of the machine and root; run `hv ctl` as they do"
    )]
    Forbidden(u32),
    /// There is no such path.
    #[error("there is no '{0}'; the paths are those of GET /v1/vm and its like, see openapi.json")]
    NotFound(String),
    /// The path has other methods.
    #[error("{path} is for {}", list(.allowed))]
    Method {
        /// The path, as it is documented.
        path: &'static str,
        /// Its methods.
        allowed: Vec<Method>,
    },
    /// The request did not come.
    #[error("the request was not whole after {0:?}")]
    Timeout(Duration),
    /// The body is too long.
    #[error("a body has at most {limit} bytes, and {len} were to come")]
    Body {
        /// Bytes there may be.
        limit: usize,
        /// Bytes there are.
        len: u64,
    },
    /// The request line and the headers are too long or too many.
    #[error("a request has at most {bytes} bytes before its body, and {headers} headers")]
    Head {
        /// Bytes there may be.
        bytes: usize,
        /// Headers there may be.
        headers: usize,
    },
    /// The body comes in a way that is not taken.
    #[error("Transfer-Encoding is not supported: send the body with its Content-Length")]
    TransferEncoding,
    /// It is another HTTP.
    #[error("only HTTP/1.0 and HTTP/1.1 are spoken here")]
    Version,
    /// All connections are in use.
    #[error("{0} connections are open, which is all there may be; try again later")]
    Connections(usize),
    /// vCPUs were not parked.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] hv_core::Error),
    /// A bug.
    #[error("hv failed to handle this request; please report it")]
    Internal,
}

fn list(methods: &[Method]) -> String {
    methods.iter().map(Method::to_string).collect::<Vec<_>>().join(", ")
}

impl ApiError {
    /// The HTTP status code, and the code in the body: a word for each kind of error, that stays.
    #[must_use]
    pub fn kind(&self) -> (u16, &'static str) {
        match self {
            Self::Malformed(_) => (400, "malformed"),
            Self::UnexpectedBody { .. } => (400, "unexpected-body"),
            Self::BadBody { .. } => (400, "bad-body"),
            Self::BalloonTooLarge { .. } => (400, "balloon-too-large"),
            Self::NoBalloon => (404, "no-balloon"),
            Self::NotANumber(_) => (400, "not-a-number"),
            Self::Forbidden(_) => (403, "forbidden"),
            Self::NotFound(_) => (404, "not-found"),
            Self::Hold(HoldError::NoSuchVcpu { .. }) => (404, "no-such-vcpu"),
            Self::Method { .. } => (405, "method-not-allowed"),
            Self::Timeout(_) => (408, "timeout"),
            Self::Body { .. } => (413, "body-too-large"),
            Self::Head { .. } => (431, "head-too-large"),
            Self::Kvm(_) => (500, "kvm"),
            Self::Internal => (500, "internal"),
            Self::TransferEncoding => (501, "transfer-encoding"),
            Self::Connections(_) => (503, "too-many-connections"),
            Self::Hold(HoldError::Busy { .. }) => (503, "vcpu-busy"),
            Self::Hold(HoldError::Stopping) => (503, "stopping"),
            Self::Version => (505, "http-version"),
        }
    }

    pub(super) fn reply(&self) -> ErrorReply {
        let code = self.kind().1.to_owned();
        ErrorReply { error: ErrorBody { code, message: self.to_string() } }
    }
}

/// The body of an answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// The error.
    pub error: ErrorBody,
}

/// An error, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What kind it is.
    pub code: String,
    /// What is wrong, and what to do.
    pub message: String,
}
