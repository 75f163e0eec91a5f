//! `hv ctl`: asks a running machine by its API, and shows what it says.

mod client;
mod show;

use std::io::{self, Write};
use std::path::Path;

use clap::Subcommand;
use serde_json::Value;

pub use client::ClientError;

use crate::api::{BalloonRequest, Method};
use crate::config::MemorySize;
use crate::exit_code::ExitCode;
use crate::output::{self, OutputError};

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum Request {
    /// Say what the machine is and does
    State,
    /// Stop all vCPUs until `resume`. Devices finish what they have begun, and the clocks go on
    Pause,
    /// Let a paused machine go on
    Resume,
    /// Show what was counted until now, as `--stats-json` does at the end
    Stats,
    /// Press the ACPI power button: a guest that listens shuts down
    PowerButton,
    /// End the machine as Ctrl-A x does: hv ends with exit code 14
    Stop,
    /// Show the memory balloon, or ask for one of SIZE: memory that the guest does without
    Balloon {
        /// How large, as --memory
        size: Option<MemorySize>,
    },
    /// Show the registers of a vCPU, which is stopped for the moment
    Registers {
        /// The vCPU
        #[arg(default_value_t = 0)]
        vcpu: u32,
    },
}

impl Request {
    /// The method, the path and the body of the call.
    fn call(self) -> (Method, String, Option<Vec<u8>>) {
        let (method, path) = match self {
            Self::State => (Method::Get, "/v1/vm"),
            Self::Pause => (Method::Put, "/v1/vm/pause"),
            Self::Resume => (Method::Put, "/v1/vm/resume"),
            Self::Stats => (Method::Get, "/v1/vm/stats"),
            Self::PowerButton => (Method::Put, "/v1/vm/power-button"),
            Self::Stop => (Method::Put, "/v1/vm/stop"),
            Self::Registers { vcpu } => {
                return (Method::Get, format!("/v1/vcpus/{vcpu}/registers"), None);
            }
            Self::Balloon { size: None } => (Method::Get, "/v1/balloon"),
            Self::Balloon { size: Some(MemorySize(target)) } => {
                let body = serde_json::json!(BalloonRequest { target }).to_string();
                return (Method::Put, "/v1/balloon".to_owned(), Some(body.into_bytes()));
            }
        };
        (method, path.to_owned(), None)
    }
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CtlError {
    /// The machine was not reached, or does not want to.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The answer is not as this version knows it.
    #[error("the machine is run by another version of hv: {0}; use --json")]
    Foreign(io::Error),
    /// The answer can't be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl CtlError {
    /// The exit code: what was asked for can't be, or it can't be now.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Client(ClientError::Refused { status: 400..=499, .. }) => ExitCode::Usage,
            _ => ExitCode::Vmm,
        }
    }
}

/// Asks the machine whose API is at `socket`, and writes its answer to `out`.
///
/// # Errors
/// There is no such machine, it does not do it, or the answer can't be written.
pub fn run(
    socket: &Path,
    request: Request,
    json: bool,
    out: &mut dyn Write,
) -> Result<ExitCode, CtlError> {
    let (method, path, body) = request.call();
    let answer = client::call(socket, method, &path, body.as_deref())?;
    let written = if json {
        output::json(&answer, out)
    } else {
        let mut text = Vec::new();
        show(request, &answer, &mut text).map_err(CtlError::Foreign)?;
        out.write_all(&text)
    };
    output::finish(out, written)?;
    Ok(ExitCode::Success)
}

fn show(request: Request, answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    match request {
        Request::State => show::state(answer, out),
        Request::Stats => show::stats(answer, out),
        Request::Balloon { .. } => show::balloon(answer, out),
        Request::Registers { .. } => show::registers(answer, out),
        Request::PowerButton => show::power_button(answer, out),
        Request::Pause | Request::Resume | Request::Stop => show::changed(answer, out),
    }
}

#[cfg(test)]
mod tests;
