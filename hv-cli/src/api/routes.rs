//! The calls there are: which path and method is which.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::control::{BalloonRequest, Control, State, StateReply};
use super::error::ApiError;
use super::http::Request;

/// The methods of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Tells.
    Get,
    /// Does. Doing it twice is doing it once, but for the power button, which is pressed again.
    Put,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        })
    }
}

/// What a call is made with.
struct Call<'a> {
    control: &'a dyn Control,
    /// What stands for `{vcpu}` in the path.
    parameter: &'a str,
    /// The body, of a call that takes one.
    body: &'a [u8],
}

type Result = std::result::Result<Value, ApiError>;

/// A call.
pub struct Route {
    /// Its method.
    pub method: Method,
    /// Its path, with a `{name}` for what varies.
    pub path: &'static str,
    /// Whether it takes a body.
    pub takes_body: bool,
    run: fn(&Call<'_>) -> Result,
}

const fn route(method: Method, path: &'static str, run: fn(&Call<'_>) -> Result) -> Route {
    Route { method, path, takes_body: false, run }
}

const PUT_BALLOON: Route = Route {
    method: Method::Put,
    path: "/v1/balloon",
    takes_body: true,
    run: |call| {
        let BalloonRequest { target } = serde_json::from_slice(call.body).map_err(|error| {
            let (method, path) = (PUT_BALLOON.method, PUT_BALLOON.path);
            ApiError::BadBody { method, path, error: printable(&error.to_string()) }
        })?;
        json(call.control.set_balloon(target)?)
    },
};

/// All calls.
pub const ROUTES: &[Route] = &[
    route(Method::Get, "/v1/vm", |call| json(call.control.info())),
    route(Method::Put, "/v1/vm/pause", |call| {
        call.control.pause()?;
        state(State::Paused)
    }),
    route(Method::Put, "/v1/vm/resume", |call| {
        call.control.resume();
        state(State::Running)
    }),
    route(Method::Put, "/v1/vm/stop", |call| {
        call.control.stop();
        state(State::Stopping)
    }),
    route(Method::Put, "/v1/vm/power-button", |call| json(call.control.power_button())),
    route(Method::Get, "/v1/vm/stats", |call| json(call.control.stats())),
    route(Method::Get, "/v1/vcpus/{vcpu}/registers", |call| {
        let vcpu = call.parameter;
        let number = vcpu.parse().map_err(|_| ApiError::NotANumber(printable(vcpu)));
        json(call.control.registers(number?)?)
    }),
    route(Method::Get, PUT_BALLOON.path, |call| json(call.control.balloon()?)),
    PUT_BALLOON,
];

fn json(value: impl Serialize) -> Result {
    serde_json::to_value(value).map_err(|_| ApiError::Internal)
}

fn state(state: State) -> Result {
    json(StateReply { state })
}

/// The part of a path that stands for its parameter, if the path is one of `template`; empty without one.
fn matches<'a>(template: &str, path: &'a str) -> Option<&'a str> {
    let mut parameter = "";
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(parameter),
            (Some(wanted), Some(given)) if wanted.starts_with('{') && !given.is_empty() => {
                parameter = given;
            }
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return None,
        }
    }
}

/// As much of what a client wrote as is worth repeating.
fn printable(text: &str) -> String {
    text.chars().take(100).flat_map(char::escape_default).collect()
}

/// Makes the call a request asks for.
pub(super) fn dispatch(request: &Request, control: &dyn Control) -> Result {
    let mut allowed = Vec::new();
    let mut known = None;
    for route in ROUTES {
        let Some(parameter) = matches(route.path, &request.path) else { continue };
        if route.method.to_string() == request.method {
            if !route.takes_body && !request.body.is_empty() {
                let (method, path, len) = (route.method, route.path, request.body.len());
                return Err(ApiError::UnexpectedBody { method, path, len });
            }
            return (route.run)(&Call { control, parameter, body: &request.body });
        }
        known = Some(route.path);
        allowed.push(route.method);
    }
    match known {
        Some(path) => Err(ApiError::Method { path, allowed }),
        None => Err(ApiError::NotFound(printable(&request.path))),
    }
}
